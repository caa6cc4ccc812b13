# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
High-resolution patches: an image is padded to a grid of squares of the vision tower's size, and cut.

Boxes are (y0, x0, y1, x1) in the unit square of the image's snapshot, which is what the image processor makes of the
whole image. Where that pads, the image's shorter side lies in the middle of the square.
"""

import math
from dataclasses import dataclass
from typing import Any

import PIL.Image


@dataclass(frozen=True)
class Grid:
    """
    How an image is cut.

    Args:
        height, width (`int`): Of the image when it is cut, in pixels: its own, or less if it has to be shrunk.
        rows, columns (`int`): How many patches lie above and beside each other.
    """

    height: int
    width: int
    rows: int
    columns: int


def fit_grid(height: int, width: int, patch_height: int, patch_width: int, max_patches: int) -> Grid:
    """
    The grid of an image: the smallest that holds it, or, where that has too many patches, the one of at most
    `max_patches` that holds it at the largest scale.

    Args:
        height, width (`int`): Of the image, in pixels.
        patch_height, patch_width (`int`): Of a patch, in pixels.
        max_patches (`int`): Most patches.

    Raises:
        ValueError: If the image has no pixels.
    """
    if min(height, width) < 1:
        raise ValueError(f"An image has {width} x {height} pixels; expected one at least. Leave it out.")
    rows, columns = math.ceil(height / patch_height), math.ceil(width / patch_width)
    if rows * columns > max_patches:
        scales = []
        for rows in range(1, max_patches + 1):
            columns = max_patches // rows
            scales.append((min(rows * patch_height / height, columns * patch_width / width), rows, columns))
        # Of several that hold it equally well the one with the fewest patches, here and below.
        scale, rows, columns = max(scales, key=lambda scale: scale[0])
        height = min(max(1, round(height * scale)), rows * patch_height)
        width = min(max(1, round(width * scale)), columns * patch_width)
        rows, columns = math.ceil(height / patch_height), math.ceil(width / patch_width)
    return Grid(height, width, rows, columns)


def cut(
    image: PIL.Image.Image,
    patch_height: int,
    patch_width: int,
    max_patches: int,
    color: tuple[int, ...],
    resample: int,
) -> list[PIL.Image.Image]:
    """
    The patches of an RGB image in raster order. It is shrunk if it has to be, and padded on all sides alike.

    Args:
        image (`PIL.Image.Image`): The image.
        patch_height, patch_width, max_patches (`int`): See [`fit_grid`].
        color (`tuple[int, ...]`): Of the padding.
        resample (`int`): How it is shrunk.
    """
    grid = fit_grid(image.height, image.width, patch_height, patch_width, max_patches)
    if image.size != (grid.width, grid.height):
        image = image.resize((grid.width, grid.height), resample)
    height, width = grid.rows * patch_height, grid.columns * patch_width
    padded = PIL.Image.new("RGB", (width, height), color)
    padded.paste(image, ((width - grid.width) // 2, (height - grid.height) // 2))
    return [
        padded.crop((left, top, left + patch_width, top + patch_height))
        for top in range(0, height, patch_height)
        for left in range(0, width, patch_width)
    ]


def get_boxes(
    height: int, width: int, patch_height: int, patch_width: int, max_patches: int, settings: dict[str, Any]
) -> list[list[float]]:
    """
    The boxes of an image's patches, in raster order.

    Args:
        height, width, patch_height, patch_width, max_patches (`int`): See [`fit_grid`].
        settings (`dict[str, Any]`): The image processor's, which say what of the image the snapshot shows.
    """
    grid = fit_grid(height, width, patch_height, patch_width, max_patches)
    sides = []
    shown = get_shown_size(height, width, settings)
    for size, cut_size, patch_size, count, frame in (
        (height, grid.height, patch_height, grid.rows, shown[0]),
        (width, grid.width, patch_width, grid.columns, shown[1]),
    ):
        # From pixels of the padded image to those of the original, and from these to the snapshot's unit square.
        offset, scale = (count * patch_size - cut_size) // 2, size / cut_size
        edges = [(index * patch_size - offset) * scale for index in range(count + 1)]
        sides.append([(edge + (frame - size) / 2) / frame for edge in edges])
    rows, columns = sides
    return [
        [rows[row], columns[column], rows[row + 1], columns[column + 1]]
        for row in range(grid.rows)
        for column in range(grid.columns)
    ]


def get_shown_size(height: int, width: int, settings: dict[str, Any]) -> tuple[float, float]:
    """
    What a snapshot shows, in pixels of the image: a rectangle around its middle, of this height and width.

    Args:
        height, width (`int`): Of the image, in pixels.
        settings (`dict[str, Any]`): `do_pad`, `do_resize`, `size`, `do_center_crop` and `crop_size` of LLaVA's image
            processor: it pads to a square, resizes, and keeps the middle, each if it is told to.
    """
    if settings["do_pad"]:
        height = width = max(height, width)
    if not settings["do_center_crop"]:
        return height, width
    resized_height, resized_width = height, width
    if settings["do_resize"]:
        size = settings["size"]
        if size.get("shortest_edge"):
            scale = size["shortest_edge"] / min(height, width)
            resized_height, resized_width = height * scale, width * scale
        else:
            resized_height, resized_width = size["height"], size["width"]
    crop = settings["crop_size"]
    return height * crop["height"] / resized_height, width * crop["width"] / resized_width
