# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The patch lens's file holds what `inspect_image` says, is small, and harmless. `tests/app` opens it in a browser."""

import base64
import io
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch
from conftest import GOLDEN, make_image
from PIL import Image

from modeling_vwlmm import VWLMMForConditionalGeneration, convert_lavit_checkpoint
from modeling_vwlmm.inspection import TopTokens, inspect_image
from modeling_vwlmm.lens import TEMPLATE, main, make_lens
from processing_vwlmm import VWLMMProcessor


def read_data(page: str) -> dict:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(data)


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> str:
    """A photo that lies on its side, as phones save them."""
    path = str(tmp_path_factory.mktemp("photos") / "photo.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(3).save(path, exif=exif, quality=95)
    return path


def test_file_has_what_was_inspected(vicuna, photo, tmp_path, capsys):
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        make_image(seed).save(folder / "x.png")
    output = tmp_path / "lens.html"
    output.write_text("an earlier one")
    paths = [photo, *(str(folder / "x.png") for folder in folders)]
    main([vicuna, *paths, "-o", str(output), "--layers", "0", "3", "--top_k", "4"])
    assert f"{output}: images: 3" in capsys.readouterr().out
    data = read_data(output.read_text())
    assert [image["name"] for image in data["images"]] == ["photo.jpg", "x.png", "x.png (3)"]
    assert data["layers"] == [0, 3] and data["num_layers"] == 3 and data["top_k"] == 4
    assert data["has_visual_words"] and data["title"] == "/".join(Path(vicuna).parts[-2:])
    model, processor = VWLMMForConditionalGeneration.from_pretrained(vicuna), VWLMMProcessor.from_pretrained(vicuna)
    found = inspect_image(model, processor, photo, layers=[0, 3], top_k=4)
    image = data["images"][0]
    layers = [TopTokens(*pair) for pair in zip(found.layer_tokens.token_ids, found.layer_tokens.values, strict=True)]
    lists = (image["words"], image["predictions"], image["nearest"], *image["layers"])
    tops = (found.get_top_words(4), found.get_top_predictions(4), found.get_nearest_tokens(4), *layers)
    for packed, top in zip(lists, tops, strict=True):
        token_ids = [data["token_ids"][row] for row in packed["tokens"]]
        assert token_ids == top.token_ids.flatten().tolist()
        assert [data["tokens"][row] for row in packed["tokens"]] == [found.get_text(token) for token in token_ids]
        torch.testing.assert_close(torch.tensor(packed["values"]), top.values.flatten(), rtol=6e-3, atol=0)
    torch.testing.assert_close(torch.tensor(image["kl"]), found.get_kl(), rtol=6e-3, atol=0)
    torch.testing.assert_close(torch.tensor(image["entropy"]), found.get_entropy(), rtol=6e-3, atol=0)
    shown = Image.open(io.BytesIO(base64.b64decode(image["source"].removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(shown), np.asarray(found.image))
    assert (image["rows"], image["columns"]) == found.grid and image["kept"] is image["codes"] is None


def test_lavit_says_what_is_kept_and_its_codes(tmp_path):
    convert_lavit_checkpoint(GOLDEN / "lavit" / "checkpoint", tmp_path / "lavit")
    make_image(5).save(tmp_path / "x.png")
    main([str(tmp_path / "lavit"), str(tmp_path / "x.png"), "-o", str(tmp_path / "lens.html")])
    data = read_data((tmp_path / "lens.html").read_text())
    image, k = data["images"][0], data["top_k"]
    dropped = [patch for patch, kept in enumerate(image["kept"]) if not kept]
    assert 0 < len(dropped) < len(image["kept"]) == image["rows"] * image["columns"]
    for patch in range(len(image["kept"])):
        is_dropped = patch in dropped
        assert (image["codes"][patch] < 0) == (image["kl"][patch] is None) == is_dropped
        for packed in (image["words"], image["nearest"], *image["layers"]):
            assert (set(packed["tokens"][k * patch : k * patch + k]) == {-1}) == is_dropped


def test_vlsa_shows_its_snapshot(perceiving, tmp_path):
    make_image(3).resize((56, 56)).save(tmp_path / "x.png")
    main([perceiving, str(tmp_path / "x.png"), "-o", str(tmp_path / "lens.html")])
    assert read_data((tmp_path / "lens.html").read_text())["images"][0]["width"] == 28


def test_layers_can_be_left_out(vicuna, photo, tmp_path):
    """Those of some decoders cannot be read."""
    main([vicuna, photo, "-o", str(tmp_path / "lens.html"), "--layers"])
    data = read_data((tmp_path / "lens.html").read_text())
    assert data["layers"] == data["images"][0]["layers"] == [] and data["images"][0]["predictions"]["tokens"]


def test_an_image_of_576_patches_and_8_layers_is_small(make_model_of_words):
    """Even if hardly any token repeats, and the image is noise, which PNG does not make smaller."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzéüß中文日本語кий"
    texts = dict.fromkeys("".join(rng.choices(letters, k=rng.randint(4, 14))) for _ in range(33_000))
    model, processor = make_model_of_words([*texts][:32_000], num_layers=8, image_size=336, patch_size=14)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8))
    found = inspect_image(model, processor, image)
    found.layer_tokens.token_ids = torch.randint(32_000, found.layer_tokens.token_ids.shape)
    page = make_lens([("noise.png", found)], "random", 8)
    data = read_data(page)
    assert found.grid == (24, 24) and len(data["layers"]) == 8 and len(data["tokens"]) > 15_000
    assert 1_000_000 < len(page.encode()) < 3_000_000


def test_tokens_and_names_that_look_like_html_are_text(make_model_of_words):
    tokens = [
        "</script><script>alert(1)</script>",
        "<!--",
        "<b>bold</b>",
        "&amp;",
        '"',
        "\u2028",
        *"abcdefgh",
    ]
    model, processor = make_model_of_words(tokens)
    page = make_lens([("</script>.png", inspect_image(model, processor, make_image(1)))], "<!--<script>", 2)
    data = read_data(page)
    assert set(data["tokens"]) > {"</script><script>alert(1)</script>", "<!--", "<b>bold</b>"}
    assert data["images"][0]["name"] == "</script>.png" and data["title"] == "<!--<script>"
    template = TEMPLATE.read_text()
    for mark in ("<script", "</script", "<!--"):
        assert page.count(mark) == template.count(mark)
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:"):
        assert unsafe not in template


def test_a_wheel_has_the_template():
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert TEMPLATE.name in settings["package-data"]["modeling_vwlmm"]


def test_refusals(vicuna, tmp_path, photo, capsys):
    (tmp_path / "notes.txt").write_text("no image")
    output = ["-o", str(tmp_path / "lens.html")]

    def refuse(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        assert end.value.code == 2
        assert not (tmp_path / "lens.html").exists()
        return " ".join(capsys.readouterr().err.split())

    assert "arguments are required: image" in refuse(vicuna, *output)
    assert "There is no file nowhere.png; expected an image" in refuse(vicuna, "nowhere.png", *output)
    assert "There is no file" in refuse(vicuna, str(tmp_path), *output)
    assert "notes.txt is no readable image" in refuse(vicuna, str(tmp_path / "notes.txt"), *output)
    assert "There is no folder /nowhere; expected a checkpoint" in refuse("/nowhere", photo, *output)
    assert "runs/nowhere is neither a checkpoint's folder nor its name on the Hub" in refuse(
        "runs/nowhere", photo, *output
    )
    tower = str(GOLDEN / "vicuna" / "clip-vision-tower")
    assert "has the model type 'clip_vision_model'; expected 'vwlmm'" in refuse(tower, photo, *output)
    assert "is no file; expected the name of a file" in refuse(vicuna, photo, "-o", str(tmp_path))
    assert "Make it first" in refuse(vicuna, photo, "-o", str(tmp_path / "no" / "lens.html"))
    assert "`layers` has [9]" in refuse(vicuna, photo, *output, "--layers", "9")
    assert "`top_k` is 0; expected a number from 1 to 480" in refuse(vicuna, photo, *output, "--top_k", "0")
