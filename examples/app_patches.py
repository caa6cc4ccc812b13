"""
What the app shows of an image as HTML: a grid of buttons over the image, one a patch, and what is known of one patch.
Whatever comes from a vocabulary or a user is escaped. Nothing here refers to a file or to another host.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from html import escape

import torch
from app_models import Picture, encode_uri
from matplotlib import colormaps

from modeling_vwlmm.inspection import DROPPED, InspectedImage, TopTokens


VIEWS = {
    "visual words": "the most probable visual word of each patch",
    "nearest tokens": "the token nearest to each image feature, and its cosine",
    "predictions": "what the decoder predicted before it saw the patch",
    "KL": "KL divergence of visual words from the prediction, in nats",
    "image": "the image as the vision tower sees it",
}
COLOURS = colormaps["viridis"]  # which colour-blind people can read
LIGHT = 0.435  # share of them from which black stands out more than white
NUM_WORDS = 5  # of a patch that is tapped


def render_patches(
    inspected: InspectedImage, title: str, view: str, word: str = "", selected: int | None = None
) -> str:
    """
    The image under a title, with a button on each patch, in one of `VIEWS`; or, of a word, where it lives.

    Raises:
        ValueError: If no token of the vocabulary reads as the word, or every patch is dropped.
    """
    rows, columns = inspected.grid
    kept = inspected.keep_mask.tolist()
    note = ""
    if not inspected.has_visual_words and view in ("visual words", "KL"):
        view, note = "nearest tokens", " (the VM head of this checkpoint has not been trained)"
    words = [""] * rows * columns
    if word.strip():
        if not any(kept):
            raise ValueError(
                f"“{word.strip()}” is nowhere: of {len(kept)} patches the token selector has dropped all; expected "
                "one or more that the decoder reads. Try another image, or a visual tokenizer of a lower `threshold`."
            )
        values = inspected.find_word(word) if inspected.has_visual_words else inspected.find_near(word)
        shown = [_format(value) for value in values.tolist()]
        caption = _describe_word(inspected, word, values)
        tints, legend = _tint(values, 0.0 if inspected.has_visual_words else None)
    elif view == "KL":
        values = inspected.get_kl()
        shown = [_format(value) for value in values.tolist()]
        caption = VIEWS[view]
        tints, legend = _tint(values, 0.0)
    else:
        tops = {
            "visual words": inspected.get_top_words,
            "nearest tokens": inspected.get_nearest_tokens,
            "predictions": inspected.get_top_predictions,
        }
        caption, tints, legend = VIEWS[view] + note, [""] * rows * columns, ""
        shown = words
        if view in tops:
            top: TopTokens = tops[view]()
            words = shown = [inspected.get_text(token) for token in top.token_ids[:, 0].tolist()]
    if sum(kept) < len(kept):
        caption += f" · {sum(kept)} of {len(kept)} patches kept"
    buttons = [
        f'<button type="button" data-patch="{patch}" tabindex="{0 if patch == (selected or 0) else -1}" '
        f'aria-pressed="{"true" if patch == selected else "false"}" class="{"kept" if kept[patch] else "dropped"}" '
        f'aria-label="row {patch // columns + 1}, column {patch % columns + 1}: '
        f'{escape(shown[patch]) if kept[patch] else "dropped"}" style="--letters:{_count_letters(shown[patch])};'
        f'{tints[patch]}"><span>{escape(shown[patch])}</span></button>'
        for patch in range(rows * columns)
    ]
    label = f"{rows} rows and {columns} columns of patches. Arrow keys move, Enter shows a patch."
    style = f"--columns:{columns};aspect-ratio:{columns}/{rows};background-image:url({encode_uri(inspected.image)})"
    return (
        f'<p class="side-title">{escape(title)}</p>'
        f'<div class="patches" role="group" aria-label="{label}" '
        f'data-columns="{columns}" style="{style}">{"".join(buttons)}</div>'
        f'{legend}<p class="caption">{escape(caption)}</p>'
    )


def render_details(inspected: InspectedImage, patch: int | None) -> str:
    """All that is known of one patch. Without one, how to get there."""
    rows, columns = inspected.grid
    if patch is None or not 0 <= patch < rows * columns:
        return '<p class="hint">Tap a patch to see its words with their probabilities.</p>'
    title = f"Row {patch // columns + 1}, column {patch % columns + 1}"
    if inspected.codes is not None and inspected.codes[patch] >= 0:
        title += f" · code {inspected.codes[patch].item()}"
    if not inspected.keep_mask[patch]:
        return f"<h3>{title}</h3><p>The token selector dropped this patch: the decoder does not read it.</p>"
    # Of this patch alone: what all have is large.
    names = ("visual_words", "predictions", "cosines", "keep_mask")
    one = replace(inspected, **{name: getattr(inspected, name)[[patch]] for name in names})
    tables = []
    if one.has_visual_words:
        kl = one.get_kl().item()  # NaN where nothing is before the patch
        title += "" if math.isnan(kl) else f" · KL {kl:.2f} nats"
        tables.append(_render_top(one, "Visual words", one.get_top_words(NUM_WORDS)))
    tables.append(_render_top(one, "Predicted before it", one.get_top_predictions(NUM_WORDS)))
    tables.append(_render_top(one, "Nearest tokens", one.get_nearest_tokens(NUM_WORDS)))
    return f'<h3>{title}</h3><div class="tables">{"".join(tables)}</div>'


def render_message(text: str) -> str:
    """Something that went wrong, in words."""
    return f'<p class="notice" role="alert">{escape(text)}</p>'


def render_tray(pictures: Sequence[Picture], looked_at: int) -> str:
    """The images to choose from, a button each."""
    buttons = [
        f'<button type="button" data-picture="{index}" aria-pressed="{"true" if index == looked_at else "false"}" '
        f'aria-label="{escape(picture.name)}"><img src="{picture.thumbnail}" alt=""></button>'
        for index, picture in enumerate(pictures)
    ]
    return f'<div class="tray" role="group" aria-label="Images">{"".join(buttons)}</div>'


def render_thumbnails(pictures: Sequence[Picture]) -> str:
    """Images of a message."""
    images = [f'<img class="sent" src="{picture.thumbnail}" alt="{escape(picture.name)}">' for picture in pictures]
    return "".join(images)


def _describe_word(inspected: InspectedImage, word: str, values: torch.Tensor) -> str:
    best = int(values.nan_to_num(-math.inf).argmax())
    row, column = divmod(best, inspected.grid[1])
    measure = "probability" if inspected.has_visual_words else "cosine (its VM head has not been trained)"
    return f"“{word.strip()}”: highest {measure} {values[best]:.2f}, row {row + 1}, column {column + 1}"


def _count_letters(text: str) -> int:
    """How many letters wide a text is, at least 4: those of Chinese, for example, are twice as wide as others."""
    return max(sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text), 4)


def _format(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _tint(values: torch.Tensor, lowest: float | None) -> tuple[list[str], str]:
    """
    Colours of values `[N]`, from `lowest` or the lowest of them to the highest, as CSS; and the legend. Of none, where
    every patch is dropped, there is neither.
    """
    kept = values[~values.isnan()]
    if not len(kept):
        return [""] * len(values), ""
    low = float(kept.min()) if lowest is None else lowest
    high = max(float(kept.max()), low + 1e-6)
    tints = []
    for value in values.tolist():
        if math.isnan(value):
            tints.append("")
            continue
        share = (value - low) / (high - low)
        red, green, blue = (round(255 * channel) for channel in COLOURS(share)[:3])
        ink, halo = ("#000", "#fff") if share > LIGHT else ("#fff", "#000")
        tints.append(f"background:rgb({red} {green} {blue} / .8);color:{ink};--halo:{halo}")
    stops = ",".join("rgb({} {} {})".format(*(round(255 * c) for c in COLOURS(step / 8)[:3])) for step in range(9))
    legend = (
        f'<div class="legend"><span>{low:.2f}</span><i style="background:linear-gradient(90deg,{stops})"></i>'
        f"<span>{high:.2f}</span></div>"
    )
    return tints, legend


def _render_top(inspected: InspectedImage, title: str, top: TopTokens) -> str:
    rows = [
        f'<tr><th scope="row">{escape(inspected.get_text(token))}</th><td><i style="width:{max(value, 0):.0%}"></i>'
        f"</td><td>{value:.2f}</td></tr>"
        for token, value in zip(top.token_ids[0].tolist(), top.values[0].tolist(), strict=True)
        if token != DROPPED
    ]
    return f"<table><caption>{title}</caption>{''.join(rows)}</table>"
