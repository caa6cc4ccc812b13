# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The patch lens: one HTML file that shows what a model makes of each patch of some images.

    python -m modeling_vwlmm.lens runs/small_world/stage4 photo.png -o lens.html

The file holds all that it shows, loads nothing, and can be mailed. It has the first `--top_k` tokens of each list.
"""

import argparse
import base64
import json
import os
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from processing_vwlmm import VWLMMProcessor
from processing_vwlmm.images_vwlmm import convert_to_rgb, open_image

from .configuration_vwlmm import VWLMMConfig
from .inspection import DROPPED, InspectedImage, TopTokens, inspect_image
from .modeling_vwlmm import VWLMMForConditionalGeneration


TEMPLATE = Path(__file__).with_name("lens.html")


def make_lens(images: Iterable[tuple[str, InspectedImage]], title: str, num_layers: int, top_k: int = 5) -> str:
    """
    The page that shows inspected images, at least one, which are all of one model and have the same layers.

    Args:
        images (iterable of `tuple[str, InspectedImage]`): Names that the page shows, and what [`inspect_image`] has
            found. No two of them have to be in memory at once.
        title (`str`): What the page says of the model, such as its name.
        num_layers (`int`): Layers of the decoder.
        top_k (`int`, *optional*, defaults to 5): Tokens of each list, as many as each layer has.

    Returns:
        `str`, the HTML file. A token or a name in it is text, whatever it looks like.
    """
    table: dict[int, int] = {}  # token id to row: a token's text is in the file once
    described = []
    for name, found in images:
        described.append(_describe(name, found, top_k, table))
    content = {
        "images": described,
        "title": title,
        "num_layers": num_layers,
        "layers": found.layers,
        "top_k": top_k,
        "has_visual_words": found.has_visual_words,
        "token_ids": list(table),
        "tokens": [found.get_text(token) for token in table],
    }
    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # In a script element `</script>` and `<!--` mean something, whatever is around them.
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA</script>", data.replace("<", "\\u003c") + "</script>")


def _describe(name: str, found: InspectedImage, top_k: int, table: dict[int, int]) -> dict:
    """What the page has of one image. Adds its tokens to `table`."""

    def pack(top: TopTokens) -> dict[str, list]:
        """`[N, k]` as rows of `table`, -1 where there is no token, and values of three digits; both `[N * k]`."""
        token_ids = top.token_ids.flatten().tolist()
        tokens = [-1 if token == DROPPED else table.setdefault(token, len(table)) for token in token_ids]
        return {"tokens": tokens, "values": shorten(top.values.flatten().tolist())}

    def shorten(values: list[float]) -> list[float | None]:
        return [None if value != value else float(f"{value:.3g}") for value in values]  # NaN where it is dropped

    png = BytesIO()
    found.image.save(png, "PNG", optimize=True)
    by_layer = zip(found.layer_tokens.token_ids, found.layer_tokens.values, strict=True)
    return {
        "name": name,
        "source": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode(),
        "width": found.image.width,
        "rows": found.grid[0],
        "columns": found.grid[1],
        "words": pack(found.get_top_words(top_k)),
        "predictions": pack(found.get_top_predictions(top_k)),
        "nearest": pack(found.get_nearest_tokens(top_k)),
        "layers": [pack(TopTokens(tokens, values)) for tokens, values in by_layer],
        "kl": shorten(found.get_kl().tolist()),
        "entropy": shorten(found.get_entropy().tolist()),
        "kept": None if found.codes is None and found.keep_mask.all() else found.keep_mask.int().tolist(),
        "codes": None if found.codes is None else found.codes.tolist(),
    }


def name_images(sources: Sequence[str]) -> list[str]:
    """Names to show: those of the files, without their folders, and with a number where two are the same."""
    names: list[str] = []
    for number, source in enumerate(sources, start=1):
        name = os.path.basename(source)
        names.append(f"{name} ({number})" if name in names else name)
    return names


def read_image(source: str) -> Image.Image:
    """An image file, by the rules of the processor. Raises `ValueError` if it is none."""
    if not os.path.isfile(source):
        raise ValueError(f"There is no file {source}; expected an image.")
    return convert_to_rgb(open_image(source))


def load(checkpoint: str) -> tuple[VWLMMForConditionalGeneration, VWLMMProcessor]:
    """Model and processor. Raises `ValueError` or `OSError` if they are not there, or no VW-LMM's."""
    if checkpoint.startswith((".", "/")) and not os.path.isdir(checkpoint):
        raise ValueError(f"There is no folder {checkpoint}; expected a checkpoint.")
    try:
        model_type = VWLMMConfig.get_config_dict(checkpoint)[0].get("model_type")
    except OSError as error:
        raise ValueError(f"{checkpoint} is neither a checkpoint's folder nor its name on the Hub: {error}") from error
    if model_type != VWLMMConfig.model_type:
        raise ValueError(
            f"{checkpoint} has the model type {model_type!r}; expected {VWLMMConfig.model_type!r}. Pass the folder of "
            "a VW-LMM, a LaVIT or a VLSA, which may be what a training stage has saved."
        )
    model = VWLMMForConditionalGeneration.from_pretrained(checkpoint).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), VWLMMProcessor.from_pretrained(checkpoint)


def main(arguments: list[str] | None = None) -> None:
    """Writes the page of the checkpoint and the images that the command line, or `arguments` in its place, names."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_vwlmm.lens", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder of a checkpoint: VW-LMM, LaVIT or VLSA; or its name on the Hub")
    parser.add_argument("images", nargs="+", metavar="image", help="image files")
    parser.add_argument("-o", "--output", type=Path, default=Path("lens.html"), help="file to write (lens.html)")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="*",
        help="decoder layers, 0 for what the decoder reads; no number for none (up to 8, evenly spaced)",
    )
    parser.add_argument("--top_k", type=int, default=5, help="tokens to keep of each list (5)")
    args = parser.parse_args(arguments)
    if args.output.exists() and not args.output.is_file():
        parser.error(f"{args.output} is no file; expected the name of a file to write.")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"There is no folder {args.output.parent} to write {args.output.name} into. Make it first.")
    try:
        images = [read_image(source) for source in args.images]  # before a model is loaded
        model, processor = load(args.checkpoint)
        found = (inspect_image(model, processor, image, args.layers, args.top_k) for image in images)
        title = "/".join(Path(args.checkpoint).absolute().parts[-2:])  # without the folders of this machine
        named = zip(name_images(args.images), found, strict=True)
        page = make_lens(named, title, model.config.text_config.num_hidden_layers, args.top_k)
        # A name that is no UTF-8, as a file may have, is shown with question marks.
        args.output.write_text(page, encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.output}: images: {len(images)}, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
