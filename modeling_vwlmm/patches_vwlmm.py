# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
High-resolution patches of images, beside their snapshots: which rows of a batch are which.

Shapes: `R` rows of `pixel_values`, `I` images, `M` high-resolution patches of all images together, `N` image tokens of
one image, `W` width of the tower's patch features.
"""

from dataclasses import dataclass

import torch


@dataclass
class Patches:
    """
    features (`torch.Tensor` of shape `[M, N, W]`):
        What the tower made of the patches, in the order of their images.
    boxes (`torch.Tensor` of shape `[M, 4]`):
        Where they are: (y0, x0, y1, x1) in the unit square of the snapshot. Padding reaches outside of it.
    num_patches (`list[int]`):
        How many each image has.
    """

    features: torch.Tensor
    boxes: torch.Tensor
    num_patches: list[int]


def find_snapshots(patch_boxes: torch.Tensor) -> torch.Tensor:
    """Which rows of `pixel_values` are snapshots, of boxes `[R, 4]`: those whose box is zero. `torch.BoolTensor`."""
    return (patch_boxes == 0).all(dim=-1)


def split_patches(patch_features: torch.Tensor, patch_boxes: torch.Tensor) -> tuple[torch.Tensor, Patches]:
    """
    Takes snapshots and patches apart. Reads the boxes, for which the host waits.

    Args:
        patch_features (`torch.Tensor` of shape `[R, N, W]`): Of each image its snapshot, then its patches.
        patch_boxes (`torch.Tensor` of shape `[R, 4]`): Box of each row, zeros for a snapshot.

    Returns:
        `torch.Tensor` of shape `[I, N, W]`, the snapshots' features, and [`Patches`].

    Raises:
        ValueError: If there is not a box for each row, or the rows do not begin with a snapshot, or a snapshot has no
            patches, or a box is none.
    """
    num_rows = len(patch_features)
    if getattr(patch_boxes, "shape", None) != (num_rows, 4):
        found = getattr(patch_boxes, "shape", None) or type(patch_boxes).__name__
        raise ValueError(
            f"`patch_boxes` is {found}, and `pixel_values` has {num_rows} rows; expected a tensor of shape "
            f"{(num_rows, 4)}, a box for each row. Pass both as the processor returns them, and cut neither."
        )
    patch_boxes = patch_boxes.to(patch_features.device)
    is_snapshot = find_snapshots(patch_boxes)  # [R]
    is_box = patch_boxes.isfinite().all(dim=-1) & (patch_boxes[:, :2] < patch_boxes[:, 2:]).all(dim=-1)  # [R]
    kinds = torch.stack([is_snapshot, is_box], dim=1).tolist()  # one read for both
    starts = [row for row, (is_start, _) in enumerate(kinds) if is_start]
    if num_rows and starts[:1] != [0]:
        raise ValueError(
            f"Row 0 of `patch_boxes` is {patch_boxes[0].tolist()}; expected zeros, for an image begins with its "
            "snapshot. Pass rows in the order of the processor."
        )
    num_patches = [end - start - 1 for start, end in zip(starts, [*starts[1:], num_rows], strict=True)]
    if [False, False] in kinds:
        row = kinds.index([False, False])
        raise ValueError(
            f"Row {row} of `patch_boxes` is {patch_boxes[row].tolist()}; expected finite (y0, x0, y1, x1) with y0 < "
            "y1 and x0 < x1, or zeros for a snapshot. Pass boxes as the processor returns them."
        )
    if 0 in num_patches:
        raise ValueError(
            f"Row {starts[num_patches.index(0)]} of `patch_boxes` is a snapshot (zeros) with no patch behind it; "
            "expected one at least. Leave `patch_boxes` out where all rows are snapshots."
        )
    patches = Patches(patch_features[~is_snapshot], patch_boxes[~is_snapshot], num_patches)
    return patch_features[is_snapshot], patches


def get_token_centres(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Where the tokens of crops are.

    Args:
        boxes (`torch.Tensor` of shape `[M, 4]`): (y0, x0, y1, x1) of each crop.
        height, width (`int`): Tokens in a column, and in a row.

    Returns:
        `torch.Tensor` of shape `[M, height, width, 2]`, (y, x) of the tokens' centres.
    """
    y, x = (
        boxes[:, axis, None] + (torch.arange(n).to(boxes) + 0.5) / n * (boxes[:, axis + 2] - boxes[:, axis])[:, None]
        for axis, n in enumerate((height, width))
    )  # [M, height], [M, width]
    return torch.stack([y[:, :, None].expand(-1, -1, width), x[:, None].expand(-1, height, -1)], dim=-1)
