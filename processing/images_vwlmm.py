# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
What an image is: one set of rules for the check of a dataset, for training and for inference.

Every image becomes an upright RGB image of 8 bits a channel, or a `ValueError` that names it and says why not:

- EXIF orientation is applied once. What is transparent lies on white. Of an animation the first frame counts.
- 16 bits are scaled by 1/257. 32-bit integers are 8 bits where none is above 255, 16 where none is above 65,535, and
  floating point numbers are 0 to 1 or 0 to 255. Anything else is refused, as are NaN and infinity.
- No image file has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels, for it could be a bomb, which one in memory is not;
  and no image has a side of more than 32,768, which padded to a square would take seconds, or of none.
"""

import base64
import copy
import os
import re
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import torch
from transformers import BaseImageProcessor
from transformers.image_utils import httpx
from transformers.utils import logging


logger = logging.get_logger(__name__)

MAX_SIDE = 2**15
# Beyond so many pixels a padded square is never made: the image is resized in one direction before it is padded.
MAX_SQUARE = 2**26
STRIP = 2**24  # pixels that are padded and resized at once
NO_BASE64 = re.compile(r"[^A-Za-z0-9+/=\s]")


def open_image(source: str | bytes | os.PathLike) -> PIL.Image.Image:
    """
    Opens an image, without decoding it.

    Args:
        source (`str`, `bytes` or `os.PathLike`):
            A path, a URL, base64 with or without `data:` in front, or the content of a file.

    Raises:
        ValueError: If there is no image.
    """
    name = f"An image of {len(source)} bytes" if isinstance(source, (bytes, bytearray)) else os.fspath(source)[:200]
    try:
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            source = httpx.get(source, follow_redirects=True).raise_for_status().content
        elif isinstance(source, str) and not os.path.exists(source):
            is_path = len(source) < 64 or NO_BASE64.search(source)  # shorter than any image, or with a dot, say
            if is_path and not source.startswith("data:image/"):
                raise FileNotFoundError("the file does not exist")
            source = base64.b64decode(source.split(",", 1)[-1])
        return PIL.Image.open(BytesIO(source) if isinstance(source, (bytes, bytearray)) else source)
    except Exception as error:  # Pillow raises whatever a broken file leads it to
        raise ValueError(f"{name} is no readable image: {describe(error)}.") from error


def convert_to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    An image by the rules above; itself if there is nothing to do.

    Args:
        image (`PIL.Image.Image`): The image, decoded or not.

    Returns:
        `PIL.Image.Image` of mode `"RGB"`, upright.

    Raises:
        ValueError: If it cannot be decoded, or is none that the rules accept.
    """
    name = getattr(image, "filename", "") or f"An image of mode {image.mode} and {image.width} x {image.height} pixels"
    try:
        return _convert(image)
    except Exception as error:  # Pillow raises whatever a broken file leads it to
        raise ValueError(f"{name} is no readable image: {describe(error)}.") from error


def find_problem(path: str | os.PathLike) -> str | None:
    """What is wrong with an image file, `None` if it is an image by the rules above. It is decoded to find out."""
    try:
        with PIL.Image.open(path) as image:
            _check_size(image)  # before a draft makes it smaller
            image.draft("RGB", (1, 1))  # a JPEG is read whole, but decoded at an eighth of its size
            _convert(image)
    except FileNotFoundError:
        return "the file does not exist"
    except Exception as error:  # Pillow raises whatever a broken file leads it to
        return describe(error)
    return None


def describe(error: Exception) -> str:
    """An error in words. Its type says what is wrong where it is none of those with a message for the user."""
    is_message = type(error) in (ValueError, OSError, FileNotFoundError) and str(error)
    return str(error).removesuffix(".") if is_message else f"{type(error).__name__}: {error}".removesuffix(".")


def _convert(image: PIL.Image.Image) -> PIL.Image.Image:
    _check_size(image)
    # A photo of a phone may carry a second picture, which is no next frame.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        logger.warning_once("Of an animation, or of a file with several pages, only the first is read.")
    image.load()
    if image.getexif().get(PIL.Image.ExifTags.Base.Orientation) is not None:
        image = PIL.ImageOps.exif_transpose(image)
    transparency = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        is_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        values = np.asarray(image)  # [height, width]
        pixels = scale_to_8_bits(values.astype(np.uint16) if is_16_bits else values)
        if isinstance(transparency, int):
            pixels = np.where(values == transparency, np.uint8(255), pixels)
        return PIL.Image.fromarray(pixels).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or transparency is not None:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_size(image: PIL.Image.Image) -> None:
    limit = PIL.Image.MAX_IMAGE_PIXELS if isinstance(image, PIL.ImageFile.ImageFile) else None
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, more than the {limit} of `PIL.Image.MAX_IMAGE_PIXELS`. "
            "Make it smaller, or raise the limit if you trust it"
        )
    if min(image.size) < 1 or max(image.size) > MAX_SIDE:
        raise ValueError(f"it has {image.width} x {image.height} pixels, expected sides of 1 to {MAX_SIDE}. Cut it")


def scale_to_8_bits(values: np.ndarray) -> np.ndarray:
    """
    Pixels of any type as 8 bits, by the rules above.

    Args:
        values (`np.ndarray`): Pixels, of any shape.

    Returns:
        `np.ndarray` of the same shape, `uint8`.

    Raises:
        ValueError: If they are not finite, or their range is none that is known.
    """
    if values.dtype in (np.uint8, np.bool_) or not values.size:
        return values.astype(np.uint8) * (255 if values.dtype == np.bool_ else 1)
    if values.dtype == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it has pixels that are NaN or infinite. Replace them")
    is_float = np.issubdtype(values.dtype, np.floating)
    largest = (1 if high <= 1 else 255) if is_float else (255 if high <= 255 else 65535)
    if low < 0 or high > largest:
        expected = "numbers from 0 to 1 or from 0 to 255" if is_float else "integers from 0 to 255 or from 0 to 65535"
        raise ValueError(f"it has pixels from {low} to {high}, expected {expected}. Scale them")
    return (values.astype(np.float64) * (255 / largest) + 0.5).astype(np.uint8)


class WithImageRules:
    """
    An image processor of Transformers for whatever images there are. It reads files and their content, too, and makes
    no larger squares than it has to.
    """

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """See `BaseImageProcessor.fetch_images`. What is opened keeps its mode and orientation until it is used."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(one) for one in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, bytes, bytearray, os.PathLike)):
            return open_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image: Any, **kwargs: Any) -> np.ndarray | torch.Tensor:
        """See `BaseImageProcessor.process_image`."""
        if 0 in getattr(image, "shape", ()):
            raise ValueError(f"An image of shape {tuple(image.shape)} has no pixels. Leave it out.")
        if isinstance(image, PIL.Image.Image):
            image = _fit(convert_to_rgb(image), **kwargs)
        elif kwargs.get("do_rescale") and abs(kwargs["rescale_factor"] * 255 - 1) < 1e-3:  # else they are as wanted
            values = image.detach().cpu() if isinstance(image, torch.Tensor) else image
            values = values.float() if getattr(values, "dtype", None) == torch.bfloat16 else values
            try:
                pixels = scale_to_8_bits(np.asarray(values))
            except ValueError as error:
                raise ValueError(f"An image of shape {tuple(image.shape)} cannot be used: {error}.") from error
            image = torch.from_numpy(pixels).to(image.device) if isinstance(image, torch.Tensor) else pixels
        return super().process_image(image, **kwargs)

    def convert_to_8_bits(self, image: Any, **kwargs: Any) -> PIL.Image.Image:
        """
        An image of any kind as the RGB image that the rules make of it.

        Args:
            image: A PIL image, an array or a tensor.
            kwargs: What the image processor is called with.

        Raises:
            ValueError: If it is none by the rules, or if its pixels are to be taken as they are (`do_rescale`).
        """
        if isinstance(image, PIL.Image.Image):
            return convert_to_rgb(image)
        options = {name: getattr(self, name) for name in ("do_rescale", "rescale_factor", "do_convert_rgb")}
        options |= {name: value for name, value in kwargs.items() if value is not None}
        pixels = self.process_image(image, **options)  # [3, height, width]
        pixels = pixels.cpu().numpy() if isinstance(pixels, torch.Tensor) else pixels
        if pixels.dtype != np.uint8 or len(pixels) != 3:
            raise ValueError(
                f"An image of shape {tuple(image.shape)} is {pixels.dtype} with {len(pixels)} channels where it is "
                "cut into patches; expected 8 bits and 3 channels. Leave `do_rescale` and `rescale_factor` out, or "
                "set `max_patches` of the processor to None."
            )
        return PIL.Image.fromarray(pixels.transpose(1, 2, 0))

    def __reduce__(self) -> tuple:
        return _restore, (self.without_rules, self.__dict__)


def add_image_rules(image_processor: BaseImageProcessor) -> BaseImageProcessor:
    """
    A copy of an image processor that applies the rules above. It keeps its class's name, under which it is saved, so
    that a saved folder needs no code for it.
    """
    if isinstance(image_processor, WithImageRules):
        return image_processor
    return _restore(type(image_processor), copy.copy(image_processor.__dict__))


def _restore(cls: type, state: dict[str, Any]) -> BaseImageProcessor:
    image_processor = object.__new__(_with_rules(cls))
    image_processor.__dict__.update(state)
    return image_processor


@lru_cache
def _with_rules(cls: type) -> type:
    return type(cls.__name__, (WithImageRules, cls), {"__module__": cls.__module__, "without_rules": cls})


def _fit(
    image: PIL.Image.Image,
    do_resize: bool | None = None,
    do_pad: bool | None = None,
    size: Any = None,
    resample: Any = None,
    image_mean: Any = None,
    **_: Any,
) -> PIL.Image.Image:
    """The image; or, where padding it to a square takes too much memory, the resized square."""
    longest, shortest = max(image.size), min(image.size)
    if not do_resize or size is None:
        return image
    if not do_pad:
        if size.shortest_edge and size.shortest_edge**2 * longest / shortest > MAX_SQUARE:
            raise ValueError(
                f"An image of {image.width} x {image.height} pixels is too long to be resized: its short side would "
                f"have {size.shortest_edge} pixels, its long one {size.shortest_edge * longest // shortest}. Cut it."
            )
        return image
    if longest**2 <= MAX_SQUARE:
        return image
    height, width = size.height or size.shortest_edge, size.width or size.shortest_edge
    resample = getattr(PIL.Image.Resampling, getattr(resample, "name", ""), resample)
    color = tuple(int(mean * 255) for mean in image_mean)
    # Pillow resizes rows, then columns, with 8 bits between: what follows are the same steps, in strips of rows.
    narrow = PIL.Image.new("RGB", (width, longest), color)
    left, top = (longest - image.width) // 2, (longest - image.height) // 2
    rows = max(1, STRIP // longest)
    for start in range(0, image.height, rows):
        part = image.crop((0, start, image.width, min(start + rows, image.height)))
        strip = PIL.Image.new("RGB", (longest, part.height), color)
        strip.paste(part, (left, 0))
        narrow.paste(strip.resize((width, part.height), resample), (0, top + start))
    return narrow.resize((width, height), resample)
