# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Figures of what a model makes of an image: visual words, nearest tokens, predictions, codes and reconstructions.

Each `draw_...` returns a `matplotlib.figure.Figure` that no other figure knows of: it shows itself as the last line of
a notebook's cell, and `figure.savefig("words.svg")` writes PNG, SVG or PDF. What is drawn comes from
[`~inspection.inspect_image`]; [`draw_image`] does both in one call.

Shapes: `N` image tokens of an image, in raster order; `C` vocabulary size of the LLM.
"""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback, is_deepspeed_zero3_enabled
from transformers.utils import logging

from processing_vwlmm import VWLMMProcessor

from .inspection import DROPPED, InspectedImage, TopTokens, inspect_image
from .modeling_vwlmm import VWLMMForConditionalGeneration


try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, fontManager, get_font
    from matplotlib.patches import Rectangle
    from matplotlib.text import Text
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter
except ImportError as error:
    raise ImportError(
        "matplotlib is not installed, which draws the figures. Install it with `pip install matplotlib`."
    ) from error

if TYPE_CHECKING:
    from .training import VWLMMTrainer


logger = logging.get_logger(__name__)

# All lengths are inches.
DPI = 150
PATCH, PANEL = 0.34, 3.8  # the least side of a patch with a word in it, and of a panel
MARGIN, GAP, TITLE, LINE = 0.2, 0.3, 0.32, 0.2
BAR, BAR_SPACE = 0.14, 0.85  # a colour bar, and with its ticks
ROOM = 0.82  # of a box, for a text in it: at a low resolution letters are wider, for they begin at whole pixels

FONT_SIZE, SMALLEST = 9.0, 4.5  # points; what is smaller nobody reads
INK, GREY, WARNING = "#1a1a1a", "#d0d0d0", "#a02000"
COLOUR_MAP = "viridis"  # the same to those who see no red or no green
LIGHT = 0.6  # share of white over what lies behind a word, so that ink is readable on any colour
DIMMED = 0.85  # and over dropped patches
# Fonts with letters that matplotlib's own lacks. Of these it takes what is installed.
FALLBACK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("PingFang SC", "Hiragino Sans", "Microsoft YaHei", "SimHei", "Malgun Gothic", "Arial Unicode MS"),
    *("Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Segoe UI Emoji", "Segoe UI Symbol"),
)
NO_GLYPH = "\N{WHITE SQUARE}"

# What a panel of `draw_visual_words` can show, and its title.
PANELS = {
    "image": "image",
    "visual_words": "visual words, P′",
    "nearest_tokens": "nearest tokens",
    "predictions": "predicted before the patch is seen, Q",
    "kl": "KL(P′‖Q)",
    "entropy": "entropy of the visual words",
}
OF_VM_HEAD = ("visual_words", "kl", "entropy")
UNTRAINED = "No stage has trained this model's VM head: its visual words are random."
RECONSTRUCTIONS = ("image", "what the VAE keeps of it", "drawn from the image features")


@dataclass
class CodedImage:
    """
    What [`draw_kept`] and [`draw_codes`] read of an [`InspectedImage`], where there is a visual tokenizer and no LLM.

    image (`PIL.Image.Image` or `str`):
        The image as the vision tower sees it, or its path.
    grid (`tuple[int, int]`):
        Rows and columns of patches.
    codes (`torch.LongTensor` of shape `[N]`):
        The visual tokenizer's codes, -1 where it drops a patch.
    """

    image: Image.Image | str
    grid: tuple[int, int]
    codes: torch.Tensor


def draw_image(
    model: VWLMMForConditionalGeneration,
    processor: VWLMMProcessor,
    image: Image.Image | str,
    draw: Callable[..., Figure] | None = None,
    **options: Any,
) -> Figure:
    """
    Inspects an image and draws what the model makes of it.

    Args:
        model, processor, image: As [`~inspection.inspect_image`] takes them.
        draw (`Callable`, *optional*): What draws an [`InspectedImage`], here without layers: [`draw_visual_words`], by
            default, [`draw_word`], [`draw_entropy`] or [`draw_patch`].
        options: What else `draw` takes.

    Example:

    ```python
    >>> draw_image(model, processor, "photo.png").savefig("words.png")
    >>> draw_image(model, processor, "photo.png", draw_word, word="red")
    ```
    """
    return (draw or draw_visual_words)(inspect_image(model, processor, image, layers=()), **options)


def draw_visual_words(
    inspected: InspectedImage | Sequence[InspectedImage],
    panels: Sequence[str] = ("visual_words", "nearest_tokens", "predictions", "kl"),
    captions: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """
    The image with its most probable visual word on every patch (figure 4 of the paper), with its nearest tokens
    (figure 3c) and with what the decoder predicted before it saw the patch; and `KL(P' || Q)` between visual words and
    prediction (equation 6) as colour, in nats. Image tokens that are dropped are grey and hatched.

    Args:
        inspected ([`InspectedImage`] or a list): One image, or several, each of which is a row.
        panels (`Sequence[str]`, *optional*): What to show, some of `PANELS`.
        captions (`Sequence[str]`, *optional*): What stands below each image, in one line or more.
        title (`str`, *optional*): What stands on top.

    Raises:
        ValueError: If a panel is unknown, there is no image, or there are not as many captions as images.
    """
    images = [inspected] if isinstance(inspected, InspectedImage) else list(inspected)
    if not panels or not set(panels) <= PANELS.keys():
        raise ValueError(f"`panels` is {list(panels)}; expected some of {', '.join(map(repr, PANELS))}.")
    if not images or captions is not None and len(captions) != len(images):
        raise ValueError(
            f"Found {len(images)} images and {'no' if captions is None else len(captions)} captions; expected one "
            "image or more, and a caption for each if there are captions."
        )
    columns = len(panels)
    if len(images) == 1 and columns > 3:  # a block of panels; of several images each has a row
        columns = 2 if columns == 4 else 3
    rows, below = [], []
    for image, caption in zip(images, captions or [""] * len(images), strict=True):
        made = [_make_panel(image, name) for name in panels]
        own = [made[start : start + columns] for start in range(0, len(made), columns)]
        rows += own
        below += [""] * (len(own) - 1) + [caption]
    return _draw_rows(rows, below, title)


def draw_word(inspected: InspectedImage, word: str) -> Figure:
    """
    Where a word is: the image, and beside it the word's probability among the visual words of each patch.

    Args:
        inspected ([`InspectedImage`]): The image.
        word (`str`): A word of the vocabulary, see [`InspectedImage.find_word`].

    Raises:
        ValueError: If no token of the vocabulary reads as the word.
    """
    values = inspected.find_word(word)
    title = f"“{word.strip()}” among the visual words"
    shown = _Panel(title, inspected, values=values, unit="probability", is_of_vm_head=True)
    return _draw_rows([[_make_panel(inspected, "image"), shown]])


def draw_entropy(inspected: InspectedImage) -> Figure:
    """The image, and beside it the entropy of each patch's visual words in nats; `log C` is uniform."""
    return _draw_rows([[_make_panel(inspected, "image"), _make_panel(inspected, "entropy")]])


def draw_patch(inspected: InspectedImage, row: int, column: int, top_k: int = 8) -> Figure:
    """
    One patch, marked on the image, and as bars its first visual words, what the decoder predicted before it saw the
    patch, and its nearest tokens.

    Args:
        inspected ([`InspectedImage`]): The image.
        row, column (`int`): Which patch, from 0 on.
        top_k (`int`, *optional*, defaults to 8): Bars of each.

    Raises:
        ValueError: If there is no such patch, or its image token is dropped.
    """
    rows, columns = inspected.grid
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(f"There is no patch in row {row} and column {column}: the image has {rows} x {columns}.")
    patch = row * columns + column
    if not inspected.keep_mask[patch]:
        kept = inspected.keep_mask.nonzero()[:, 0].tolist()
        example = f": in row {kept[0] // columns}, column {kept[0] % columns}, for example" if kept else ""
        raise ValueError(
            f"The image token of the patch in row {row} and column {column} is dropped, and has no words. Choose one "
            f"that is kept{example}."
        )
    charts = {
        "visual_words": (inspected.get_top_words(top_k), "probability"),
        "predictions": (inspected.get_top_predictions(top_k), "probability"),
        "nearest_tokens": (inspected.get_nearest_tokens(top_k), "cosine"),
    }
    gutter, width = 0.95, 1.9  # of a chart: its words, and its bars
    notes = _make_notes(f"patch in row {row}, column {column}", [_make_panel(inspected, name) for name in charts])
    image_width, height = _get_sides(inspected.grid)
    step = gutter + width + GAP
    figure, top = _make_figure(2 * MARGIN + image_width + 3 * step, height + 2 * TITLE + LINE, notes)
    top += TITLE
    axes = figure.place(MARGIN, top, image_width, height)
    _show(axes, inspected.image, inspected.grid)
    _mark(axes, column, row)
    figure.write(axes, 0, 1, PANELS["image"], image_width, TITLE, **_TITLE_STYLE, transform=axes.transAxes)
    for index, (name, (found, unit)) in enumerate(charts.items()):
        left = MARGIN + image_width + GAP + index * step + gutter
        axes = figure.place(left, top, width, height)
        _draw_bars(figure, axes, inspected, TopTokens(found.token_ids[patch], found.values[patch]), gutter, width)
        axes.set_xlabel(unit, fontsize=8, color=INK)
        offset = -gutter / width  # the title begins where the words do
        title = {"text": PANELS[name], "width": gutter + width, "height": TITLE}
        figure.write(axes, offset, 1, **title, **_TITLE_STYLE, transform=axes.transAxes)
    return figure


def draw_kept(images: Sequence[InspectedImage | CodedImage], columns: int = 8) -> Figure:
    """
    Images, and below each the patches that the visual tokenizer keeps of it (LaVIT's figure 3); dropped ones are
    dimmed.

    Args:
        images (`Sequence[InspectedImage | CodedImage]`): The images.
        columns (`int`, *optional*, defaults to 8): Images in a line.

    Raises:
        ValueError: If there is no image, or it has no codes.
    """
    _check_has_codes(images)
    side, gap, caption = 1.5, 0.1, 0.34
    columns = min(columns, len(images))
    num_lines = -(-len(images) // columns)
    heights = [side * image.grid[0] / image.grid[1] for image in images]
    line = 2 * max(heights) + gap + caption
    figure, top = _make_figure(2 * MARGIN + columns * (side + gap) - gap, num_lines * line, [])
    for index, (image, height) in enumerate(zip(images, heights, strict=True)):
        left, begin = MARGIN + index % columns * (side + gap), top + index // columns * line
        picture, is_kept = _open(image), image.codes >= 0
        _show(figure.place(left, begin, side, height), picture, image.grid)
        axes = figure.place(left, begin + height + gap, side, height)
        _show(axes, picture, image.grid)
        _cover(axes, image.grid, ~is_kept, (1, 1, 1, DIMMED))
        text = f"{int(is_kept.sum())} of {len(is_kept)}"
        figure.write(axes, 0.5, -0.03, text, side, LINE, va="top", transform=axes.transAxes)
    return figure


def draw_codes(images: Sequence[InspectedImage | CodedImage], num_codes: int = 8, num_patches: int = 6) -> Figure:
    """
    Patches that share a code (LaVIT's figure 3), each marked in its surroundings: a row for each of the most frequent
    codes.

    Args:
        images (`Sequence[InspectedImage | CodedImage]`): The images, the more the better.
        num_codes (`int`, *optional*, defaults to 8): Rows.
        num_patches (`int`, *optional*, defaults to 6): Patches of a code, of as many images.

    Raises:
        ValueError: If there is no image, or it has no codes.
    """
    _check_has_codes(images)
    places: dict[int, list[tuple[int, int, int]]] = {}  # which of its image's patches, image, patch
    for index, image in enumerate(images):
        seen = Counter()
        for patch in (image.codes >= 0).nonzero()[:, 0].tolist():
            code = int(image.codes[patch])
            places.setdefault(code, []).append((seen[code], index, patch))
            seen[code] += 1
    frequent = sorted(places, key=lambda code: (-len(places[code]), code))[:num_codes]
    side, gap, gutter = 1.25, 0.1, 0.95
    size = (gutter + num_patches * (side + gap) - gap + 2 * MARGIN, len(frequent) * (side + gap) - gap + MARGIN)
    figure, top = _make_figure(*size, [])
    for row, code in enumerate(frequent):
        found = places[code]
        begin = top + row * (side + gap)
        for column, (_, index, patch) in enumerate(sorted(found)[:num_patches]):  # of different images first
            axes = figure.place(MARGIN + gutter + column * (side + gap), begin, side, side)
            image = images[index]
            rows, columns = image.grid
            y, x = divmod(patch, columns)
            _show(axes, _open(image), image.grid)
            _mark(axes, x, y, widths=(2.4, 0.8))
            # At most eight by eight patches around it, where the image goes on that far.
            window = min(8, rows, columns)
            x, y = (min(max(at - window // 2, 0), most - window) for at, most in ((x, columns), (y, rows)))
            axes.set(xlim=(x, x + window), ylim=(y + window, y))
            if column == 0:
                left = {"x": -0.08, "ha": "right", "transform": axes.transAxes}
                room = {"width": gutter, "height": LINE}
                figure.write(axes, y=0.56, text=f"code {code}", **left, **room)
                figure.write(axes, y=0.44, text=f"{len(found):,} patches", size=7.5, color="#606060", **left, **room)
    return figure


def draw_reconstructions(pictures: Sequence[torch.Tensor], titles: Sequence[str] = RECONSTRUCTIONS) -> Figure:
    """
    Pictures side by side, one image a row: VLSA's images, what a VAE keeps of them, and what is drawn from their image
    features, as `examples/reconstruct.py` makes them. No pixel is left out at the figure's own resolution.

    Args:
        pictures (`Sequence[torch.Tensor]`): Of each image `[len(titles), 3, H, W]`, from -1 to 1.
        titles (`Sequence[str]`, *optional*): What the columns are.

    Raises:
        ValueError: If there is no image, or it has not as many pictures as there are titles.
    """
    if not len(pictures) or any(len(row) != len(titles) for row in pictures):
        raise ValueError(
            f"Found {[len(row) for row in pictures]} pictures of the images; expected {len(titles)} of each, and one "
            "image or more."
        )
    most = max(row.shape[-1] for row in pictures)
    scale = max(-(-360 // most), 1) / DPI  # inches of a pixel; small pictures grow by whole numbers
    width, gap = most * scale, 0.1
    height = sum(row.shape[-2] * scale + gap for row in pictures) - gap
    figure, top = _make_figure(len(titles) * (width + gap) - gap + 2 * MARGIN, height + TITLE + MARGIN, [])
    top += TITLE - MARGIN / 2
    for index, row in enumerate(pictures):
        sides = row.shape[-1] * scale, row.shape[-2] * scale
        for column, (pixels, title) in enumerate(zip(to_pixels(row), titles, strict=True)):
            axes = figure.place(MARGIN + column * (width + gap), top, *sides)
            _show(axes, pixels, pixels.shape[:2], interpolation="nearest")
            if index == 0:
                figure.write(axes, 0, 1, title, width, TITLE, **_TITLE_STYLE, transform=axes.transAxes)
        top += sides[1] + gap
    return figure


def to_pixels(pictures: torch.Tensor) -> np.ndarray:
    """Pictures `[I, 3, H, W]` from -1 to 1 as `uint8` of shape `[I, H, W, 3]`."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1).cpu().numpy()


class LogsVisualWords(TrainerCallback):
    """
    Draws the visual words of a few images every so many steps: [`draw_visual_words`] as `figures/step_000123.png` in
    the output folder, and to TensorBoard and Weights & Biases where the run reports to them. The main process draws,
    with the model in evaluation mode; what the run learns is the same without.

    Args:
        trainer ([`VWLMMTrainer`]): The trainer.
        images (`Sequence[str | PIL.Image.Image]`): The images, or their paths.
        steps (`int`): Steps between figures. The last step has one, too.

    Raises:
        OSError: If an image is cut short.
        ValueError: If an image does not exist, there is none, `steps` is not positive, the model has no LLM, or its
            weights are sharded: one process has no model to draw with.

    Example:

    ```python
    >>> trainer.add_callback(LogsVisualWords(trainer, ["cat.jpg", "dog.jpg"], steps=500))
    ```
    """

    def __init__(self, trainer: "VWLMMTrainer", images: Sequence[str | Image.Image], steps: int) -> None:
        self.trainer, self.steps = trainer, steps
        if steps < 1 or not images:
            raise ValueError(f"Found {len(images)} images every {steps} steps; expected one or more of both.")
        if not isinstance(self._get_model(), VWLMMForConditionalGeneration):
            raise ValueError(
                f"The model is a {type(self._get_model()).__name__}, which has no words; expected a "
                "VWLMMForConditionalGeneration. Draw none in LaVIT's stage 1."
            )
        if (
            trainer.is_fsdp_enabled
            or is_deepspeed_zero3_enabled()
            or any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
        ):
            raise ValueError(
                "The weights of the model are sharded over processes (FSDP, ZeRO-3 or tensor parallelism), and visual "
                "words are drawn by the main process alone, which would wait for the others. Leave it out, train with "
                "DDP or ZeRO-2, or draw from the saved checkpoints with `draw_image`."
            )
        self.images = trainer.processing_class.image_processor.fetch_images(list(images))
        for image in self.images:
            image.load()  # now, and not in the first step with a figure

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_step_end`."""
        is_due = state.global_step % self.steps == 0 or state.global_step >= state.max_steps
        if not is_due or not state.is_world_process_zero:
            return
        figure = draw_visual_words(self._inspect(), title=f"step {state.global_step:,}")
        file = Path(args.output_dir, "figures", f"step_{state.global_step:06}.png")
        file.parent.mkdir(exist_ok=True)
        figure.savefig(file)
        for callback in self.trainer.callback_handler.callbacks:
            if getattr(callback, "tb_writer", None) is not None:
                pixels = np.asarray(Image.open(file).convert("RGB"))
                callback.tb_writer.add_image("visual_words", pixels, state.global_step, dataformats="HWC")
            elif isinstance(callback, WandbCallback):
                import wandb  # an optional dependency, which this run reports to

                wandb.log({"visual_words": wandb.Image(str(file)), "train/global_step": state.global_step})

    def _get_model(self) -> torch.nn.Module:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return model.get_base_model() if is_peft_model(model) else model

    def _inspect(self) -> list[InspectedImage]:
        model = self._get_model()
        found = [inspect_image(model, self.trainer.processing_class, image, layers=()) for image in self.images]
        # A stage is written down at its end: a VM head that learns in this run has begun to.
        learns = any(parameter.requires_grad for parameter in model.model.vm_head.parameters())
        return [replace(image, has_visual_words=image.has_visual_words or learns) for image in found]


@dataclass
class _Panel:
    """One square of a figure: an image, and on it words `[N]`, or values `[N]` as colours."""

    title: str
    inspected: InspectedImage
    words: list[str] | None = None
    values: torch.Tensor | None = None
    unit: str = ""
    is_of_vm_head: bool = False


_TITLE_STYLE = {"size": 9.5, "ha": "left", "va": "bottom", "margin": 0.06}


class NotebookFigure(Figure):
    """A figure that pyplot does not know, shows itself in a notebook, and is laid out by inches from its top left."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self)  # has a renderer that measures texts
        self._fitted: dict[tuple, tuple[str, float]] = {}

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()

    def place(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes of a place."""
        whole_width, whole_height = self.get_size_inches()
        bottom = (whole_height - top - height) / whole_height
        axes = self.add_axes((left / whole_width, bottom, width / whole_width, height / whole_height))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def write(
        self,
        axes: Axes,
        x: float,
        y: float,
        text: str,
        width: float,
        height: float,
        size: float = FONT_SIZE,
        margin: float = 0.0,
        **style: Any,
    ) -> Text:
        """
        Writes a text that stays in a box of `width` x `height`: its font shrinks, and where nobody could read it the
        text is shortened. No character of it is a command, and one that no font has is a square.

        Args:
            margin (`float`): Inches between the text and the edge `y` that it stands on.
            style: What else `Axes.text` takes.
        """
        families = _find_fonts(tuple(matplotlib.rcParams["font.family"]))
        style = {"ha": "center", "va": "center", "color": INK, **style}
        label = axes.text(x, y, _make_readable(text, families), fontsize=size, family=list(families), **style)
        label.set(parse_math=False, usetex=False)
        if margin:
            label.set_y(y + margin / (axes.get_position().height * self.get_size_inches()[1]))
        kind = (label.get_text(), size, round(width, 6), round(height, 6))
        if kind not in self._fitted:  # most words come more than once
            self._fit(label, width, height)
            self._fitted[kind] = label.get_text(), label.get_size()
        text, size = self._fitted[kind]
        label.set(text=text, fontsize=size)
        return label

    def _fit(self, label: Text, width: float, height: float) -> None:
        room = np.array([width, height]) * ROOM * self.dpi  # pixels
        size = label.get_size() * min(1, *(room / self._measure(label)))
        label.set_size(max(size, SMALLEST))
        if size >= SMALLEST:
            return
        text, low, high = label.get_text(), 0, len(label.get_text()) - 1
        while low < high:  # the longest beginning that has room
            middle = (low + high + 1) // 2
            label.set_text(f"{text[:middle]}…")
            low, high = (middle, high) if self._measure(label)[0] <= room[0] else (low, middle - 1)
        label.set_text(f"{text[:low]}…")

    def _measure(self, label: Text) -> np.ndarray:
        """Width and height of a text in pixels."""
        box = label.get_window_extent(self.canvas.get_renderer())
        return np.array([box.width, box.height])


def _make_figure(width: float, height: float, notes: list[tuple[str, str]]) -> tuple[NotebookFigure, float]:
    """A figure with lines of text on top, each with its colour, and where what follows begins."""
    head = len(notes) * TITLE
    figure = NotebookFigure(width, height + head + MARGIN)
    for index, (note, colour) in enumerate(notes):
        axes = figure.place(MARGIN, MARGIN + index * TITLE, width - 2 * MARGIN, TITLE)
        axes.patch.set_visible(False)
        figure.write(axes, 0, 0.5, note, width - 2 * MARGIN, TITLE, size=11, ha="left", color=colour)
    return figure, MARGIN + head


def _make_notes(title: str, panels: Sequence[_Panel]) -> list[tuple[str, str]]:
    is_untrained = any(panel.is_of_vm_head and not panel.inspected.has_visual_words for panel in panels)
    return [(title, INK)] * bool(title) + [(UNTRAINED, WARNING)] * is_untrained


def _make_panel(inspected: InspectedImage, name: str) -> _Panel:
    panel = _Panel(PANELS[name], inspected, is_of_vm_head=name in OF_VM_HEAD)
    if name in ("kl", "entropy"):
        panel.values, panel.unit = getattr(inspected, f"get_{name}")(), "nats"
    elif name != "image":
        found = {
            "visual_words": inspected.get_top_words,
            "nearest_tokens": inspected.get_nearest_tokens,
            "predictions": inspected.get_top_predictions,
        }[name]()
        panel.words = [inspected.get_text(token) for token in found.token_ids[:, 0].tolist()]
    return panel


def _draw_rows(rows: list[list[_Panel]], captions: Sequence[str] | None = None, title: str = "") -> Figure:
    """A figure of rows of panels, with a caption below each."""
    captions = captions or [""] * len(rows)
    has_words = any(panel.words is not None for row in rows for panel in row)
    sides = [_get_sides(row[0].inspected.grid, PATCH if has_words else 0) for row in rows]
    width = max(width for width, _ in sides)
    lefts = [MARGIN]
    for column in range(max(map(len, rows))):
        has_bar = any(panel.values is not None for row in rows for panel in row[column : column + 1])
        lefts.append(lefts[-1] + width + (BAR_SPACE if has_bar else GAP))
    whole = lefts[-1] - (0 if has_bar else GAP)
    texts = [caption.split("\n") if caption else [] for caption in captions]
    heights = [TITLE + height + len(text) * LINE for (_, height), text in zip(sides, texts, strict=True)]
    notes = _make_notes(title, [panel for row in rows for panel in row])
    figure, top = _make_figure(whole + MARGIN, sum(heights) + (len(rows) - 1) * MARGIN + MARGIN, notes)
    top -= MARGIN / 2
    for row, (own_width, height), text in zip(rows, sides, texts, strict=True):
        for left, panel in zip(lefts, row, strict=False):
            _draw_panel(figure, panel, left, top + TITLE, own_width, height)
        top += TITLE + height
        for line in text:
            axes = figure.place(MARGIN, top, whole - MARGIN, LINE)
            axes.patch.set_visible(False)
            figure.write(axes, 0, 0.3, line, whole - MARGIN, LINE, ha="left")
            top += LINE
        top += MARGIN
    return figure


def _draw_panel(figure: NotebookFigure, panel: _Panel, left: float, top: float, width: float, height: float) -> None:
    grid, keep_mask = panel.inspected.grid, panel.inspected.keep_mask
    axes = figure.place(left, top, width, height)
    figure.write(axes, 0, 1, panel.title, width, TITLE, **_TITLE_STYLE, transform=axes.transAxes)
    if panel.values is not None:
        values = np.ma.masked_invalid(panel.values.reshape(grid).numpy())
        picture = _show(axes, values, grid, cmap=COLOUR_MAP, vmin=0, vmax=values.max() or 1, interpolation="nearest")
        _cover(axes, grid, ~keep_mask, GREY)
        bar_axes = figure.place(left + width + BAR, top, BAR, height)
        bar = figure.colorbar(picture, cax=bar_axes, ticks=MaxNLocator(5), format=StrMethodFormatter("{x:g}"))
        bar.outline.set_visible(False)
        bar_axes.tick_params(labelsize=8, length=2, colors=INK)
        room = {"width": BAR_SPACE - BAR, "height": TITLE, "transform": bar_axes.transAxes}
        figure.write(bar_axes, 0, 1, panel.unit, **room, **{**_TITLE_STYLE, "size": 8})
        return
    _show(axes, panel.inspected.image, grid, light=0 if panel.words is None else LIGHT)
    if panel.words is None:
        return
    _cover(axes, grid, ~keep_mask, (1, 1, 1, DIMMED))
    rows, columns = grid
    axes.hlines(range(1, rows), 0, columns, colors="white", linewidths=0.5)
    axes.vlines(range(1, columns), 0, rows, colors="white", linewidths=0.5)
    room = {"width": width / columns, "height": height / rows}
    size = min(FONT_SIZE, 0.3 * 72 * room["height"])
    for patch, word in enumerate(panel.words):
        if word:
            y, x = divmod(patch, columns)
            figure.write(axes, x + 0.5, y + 0.5, word, **room, size=size)


def _draw_bars(
    figure: NotebookFigure, axes: Axes, inspected: InspectedImage, found: TopTokens, gutter: float, width: float
) -> None:
    """Bars of tokens `[k]`, with the tokens in a gutter to their left."""
    values = found.values.tolist()
    axes.barh(range(len(values)), values, height=0.7, color=matplotlib.colormaps[COLOUR_MAP](0.35))
    lowest, most = min(0, *values), max(0, *values) or 1
    room = 0.3 * (most - lowest)  # for the numbers
    axes.set(xlim=(lowest - room * (lowest < 0), most + room), ylim=(len(values) - 0.5, -0.5))
    height = axes.get_position().height * figure.get_size_inches()[1] / len(values)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.tick_params(axis="x", labelsize=8, length=2, colors=INK)
    axes.spines["left"].set(visible=lowest == 0, color="#909090")
    for index, (token, value) in enumerate(zip(found.token_ids.tolist(), values, strict=True)):
        if token == DROPPED:  # nothing is before the first patch of some prompts
            continue
        left = {"x": -0.04, "ha": "right", "transform": axes.get_yaxis_transform()}
        figure.write(axes, y=index, text=inspected.get_text(token), width=gutter, height=height, **left)
        end = value + 0.03 * (most - lowest)
        figure.write(axes, end, index, f"{value:.2g}", 0.3 / 1.3 * width, height, size=8, ha="left")


def _get_sides(grid: tuple[int, int], least_patch: float = 0) -> tuple[float, float]:
    """Width and height of a panel of patches, which are squares."""
    rows, columns = grid
    width = max(PANEL, columns * least_patch)
    return width, width * rows / columns


def _show(axes: Axes, image: Image.Image | np.ndarray, grid: tuple[int, int], light: float = 0, **style: Any) -> Any:
    """An image, with a share of white over it, in units of patches: `(0, 0)` is its top left corner."""
    rows, columns = grid
    if isinstance(image, Image.Image):
        image = Image.blend(image, Image.new("RGB", image.size, "white"), light)
    return axes.imshow(image, extent=(0, columns, rows, 0), aspect="auto", **style)


def _cover(axes: Axes, grid: tuple[int, int], mask: torch.Tensor, colour: Any) -> None:
    """Covers patches, hatched."""
    squares = [Rectangle((patch % grid[1], patch // grid[1]), 1, 1) for patch in mask.nonzero()[:, 0].tolist()]
    style = {"facecolor": colour, "edgecolor": "#b8b8b8", "linewidth": 0, "hatch": "////"}
    axes.add_collection(PatchCollection(squares, **style), autolim=False)


def _mark(axes: Axes, x: int, y: int, widths: tuple[float, float] = (3.5, 1.2)) -> None:
    """A frame around a patch, which is seen on any colour."""
    for colour, width in zip(("white", INK), widths, strict=True):
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linewidth=width, joinstyle="miter"))


def _open(image: InspectedImage | CodedImage) -> Image.Image:
    return Image.open(image.image).convert("RGB") if isinstance(image.image, str | Path) else image.image


def _check_has_codes(images: Sequence[InspectedImage | CodedImage]) -> None:
    if not images or any(image.codes is None for image in images):
        raise ValueError(
            f"Found {len(images)} images, of which {sum(image.codes is None for image in images)} have no codes; "
            "expected one image or more of a model with a visual tokenizer."
        )


@cache
def _find_fonts(families: tuple[str, ...]) -> tuple[str, ...]:
    """The reader's own fonts, and behind them those with letters that they may lack, as far as they are installed."""
    installed = set(fontManager.get_font_names())
    return (*families, *(name for name in FALLBACK_FONTS if name in installed))


@cache
def _find_characters(families: tuple[str, ...]) -> frozenset[int]:
    """What can be drawn."""
    fonts = [get_font(fontManager.findfont(FontProperties(family=[family]))) for family in families]
    return frozenset(character for font in fonts for character in font.get_charmap())


def _make_readable(text: str, families: tuple[str, ...]) -> str:
    """A text with a square for each character that no font has. matplotlib would warn of each."""
    known = _find_characters(families)
    readable = "".join(character if ord(character) in known else NO_GLYPH for character in text)
    if readable != text:
        logger.warning_once(
            f"Some tokens have characters that no font here has; {NO_GLYPH} stands for each. Fonts such as Noto Sans "
            "CJK and Noto Emoji, once installed, are used."
        )
    return readable
