# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Records and images that nobody would write, and that are found in the world. Each has one of two outcomes: a correct
sample, or a `ValueError` that names it.

`make fuzz` runs 200,000 cases in place of 2,000, and prints how they ended. `VWLMM_FUZZ_CASES` and `VWLMM_FUZZ_SEED`
choose others.
"""

import io
import json
import os
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import PIL.Image
import pytest
import torch
from conftest import make_image
from datasets import Image as ImageFeature
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_vwlmm.training.collating import VWLMMDataCollator
from processing_vwlmm import llava_dataset, load_llava_dataset
from processing_vwlmm.images_vwlmm import find_problem


CASES = int(os.environ.get("VWLMM_FUZZ_CASES", "2000"))
SEED = int(os.environ.get("VWLMM_FUZZ_SEED", "0"))
PATCHES = 16  # of one image
OUTCOMES = Counter()


def fuzz(share: float):
    """A share of the cases: the same ones every time."""
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    return lambda test: seed(SEED)(settings(max_examples=int(CASES * share), **options)(test))


@pytest.fixture(scope="module", autouse=True)
def figures():
    OUTCOMES.clear()
    yield
    print(f"\nfuzzed {sum(OUTCOMES.values())} cases with seed {SEED}:")
    for outcome, number in OUTCOMES.most_common():
        print(f"{number:8d}  {outcome}")


@pytest.fixture(scope="module")
def collate(processor):
    return VWLMMDataCollator(processor, assistant_only_loss=True)


def kind_of(error: ValueError) -> str:
    """What an error is about, without what is different each time."""
    if "is no readable image: " in str(error):
        reason = re.sub(r"[0-9.]+", "#", str(error).split("is no readable image: ")[1])
        return f"image, {' '.join(reason.split()[:5])}"
    return re.sub(r".*'([a-z_]+)[^']*' is .*", r"field \1", str(error).split("\n")[0])[:60].split(" (id")[0]


def check_sample(processor, batch: dict, num_images: int, num_answers: int) -> None:
    """What a correct sample is: whole images, one BOS, and one EOS for each answer."""
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert (ids == processor.image_token_id).sum() == PATCHES * num_images
    assert ids[0] == processor.tokenizer.bos_token_id
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1
    assert (ids == processor.tokenizer.eos_token_id).sum() == num_answers
    assert (labels == processor.tokenizer.eos_token_id).sum() == num_answers
    assert not (labels == processor.image_token_id).any()
    if num_images:
        assert batch["pixel_values"].shape == (num_images, 3, 28, 28)
        assert torch.isfinite(batch["pixel_values"]).all()


# Records.

PIECES = [
    *("<image>", "<image>\n", "\n<image>", "</s>", "<s>", "<unk>", "[INST]", "<|im_end|>", "<im", "age>", "</", "s>"),
    *("\0", "\x07", "\x1b[0m", "\r\n", "\t", "\u202e", "\ufdd0", "\ufdd1", "\ufeff", "\uffff"),
    *("🙂", "é", "e\u0301", "漢字", "A:", "USER:", " ASSISTANT:", "{{ x }}", "{% endfor %}", "%s", '"', " "),
    *("What is it?", "a red circle", "word " * 500),
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=4).map("".join)
HALVES = ["\ud800", "a\udfffb", "\udc00\ud800"]  # of surrogate pairs
questions = st.sampled_from(["What?", "Is <image> a tag?", "\ufdd0<s>", " "]) | texts
files = st.sampled_from(
    [
        *("a.png", "b.jpg", "sub/c.png", "sub/../a.png", "16.png", "cmyk.jpg", "turned.jpg", "long.png", "inside.png"),
        *("missing.png", "truncated.png", "empty.png", "sub", "text.png", "nan.tiff", ".", "", "a\0", "\ud800.png"),
        *("../secret.png", "/etc/passwd", "outside.png", "https://example.org/a.png", "file:///etc/passwd", "x" * 300),
        *("data:image/png;base64,AAAA", "~/a.png", "C:\\a.png", "a.png/b", "//a.png", " a.png"),
    ]
)
good_files = st.sampled_from(["a.png", "b.jpg", "sub/c.png", "16.png", "cmyk.jpg", "turned.jpg", "palette.png"])
junk = st.sampled_from(
    [None, True, 0, -1, 1.5, 10**30, float("nan"), "", "x", "gpt", "human", [], {}, [[]], [None], {"from": "gpt"}, [7]]
)
roles = st.sampled_from(["human", "gpt", "system", "user", "assistant", "tool", "Human", "", None, 7])


@st.composite
def records(draw) -> object:
    """A record of LLaVA's form, with what may be wrong with it."""
    images = draw(st.lists(good_files, max_size=2))
    questions_ = [draw(questions).replace("<image>", "") for _ in range(draw(st.integers(1, 3)))]
    place = draw(st.integers(0, 3))
    marked = "<image>" * len(images) if place == 3 else "".join(f"<image>{'n' * place}\n" for _ in images)
    number = draw(st.integers(0, len(questions_) - 1))
    questions_[number] = questions_[number] + marked if place == 1 else marked + questions_[number]
    turns = []
    for question in questions_:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": draw(texts)}]
    if draw(st.booleans()):
        turns.insert(0, {"from": draw(st.sampled_from(["system", "gpt"])), "value": draw(texts)})
    record = {"id": draw(st.sampled_from(["a", 7, "\0", "é"])), "image": images, "conversations": turns}
    if not images or (len(images) == 1 and draw(st.booleans())):
        record["image"] = images[0] if images else None
    match draw(st.sampled_from(range(24))):
        case 0:
            record["image"] = draw(files)
        case 1:
            record["image"] = [draw(files), draw(files)]
        case 2:
            record[draw(st.sampled_from(["id", "image", "conversations", "image_labels", "extra"]))] = draw(junk)
        case 3:
            del record[draw(st.sampled_from([*record]))]
        case 4:
            draw(st.sampled_from(turns))[draw(st.sampled_from(["from", "value"]))] = draw(junk)
        case 5:
            draw(st.sampled_from(turns))["from"] = draw(roles)
        case 6:
            turns.insert(draw(st.integers(0, len(turns))), draw(st.sampled_from(turns) | junk))
        case 7:
            turns.pop(draw(st.integers(0, len(turns) - 1)))
        case 8:
            draw(st.sampled_from(turns))["value"] = draw(texts | st.sampled_from(HALVES))
        case 9:
            record["image_labels"] = [
                draw(st.lists(st.sampled_from([5, -100, "red"]) | junk, max_size=2)) for _ in images
            ]
        case 10:
            return draw(junk)
    return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    images = folder / "images"
    (images / "sub").mkdir(parents=True)
    noise = make_image(0)
    for name in ("a.png", "b.jpg", "sub/c.png", "../secret.png"):
        noise.save(images / name)
    exif = Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    noise.save(images / "turned.jpg", exif=exif)
    noise.convert("CMYK").save(images / "cmyk.jpg")
    noise.convert("P").save(images / "palette.png", transparency=3)
    noise.convert("L").convert("I").point(lambda level: level * 257).convert("I;16").save(images / "16.png")
    Image.new("RGB", (2000, 1)).save(images / "long.png")
    Image.new("F", (4, 4), float("nan")).save(images / "nan.tiff")
    (images / "truncated.png").write_bytes((images / "a.png").read_bytes()[:-200])
    (images / "empty.png").touch()
    (images / "text.png").write_text("no image")
    (images / "outside.png").symlink_to(folder / "secret.png")
    (images / "inside.png").symlink_to(images / "a.png")
    return folder


@pytest.fixture(scope="module")
def cache(folder):
    kept, llava_dataset.HF_DATASETS_CACHE = llava_dataset.HF_DATASETS_CACHE, folder / "cache"
    yield folder / "cache"
    llava_dataset.HF_DATASETS_CACHE = kept


@fuzz(0.4)
@given(data=st.lists(records(), min_size=1, max_size=2), on_bad_image=st.sampled_from(["raise", "skip"]))
def test_records(processor, collate, folder, cache, data, on_bad_image):
    shutil.rmtree(cache, ignore_errors=True)
    (folder / "data.json").write_text(json.dumps(data))
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            dataset = load_llava_dataset(folder / "data.json", folder / "images", on_bad_image, num_threads=1)
    except ValueError as error:
        # It says which record or sample, or that nothing is left.
        assert any(name in str(error) for name in ("record ", "sample '", "No sample is left")), error
        OUTCOMES[f"record rejected: {kind_of(error)}"] += 1
        return
    skipped = len(data) - len(dataset)
    assert bool(skipped) == any(f"left out {skipped} of {len(data)} samples" in str(one.message) for one in said)
    OUTCOMES["records with one left out for its image" if skipped else "records that became samples"] += 1
    for row in dataset:
        num_answers = sum(message["role"] == "assistant" for message in row["messages"])
        check_sample(processor, collate([row]), len(row["images"]), num_answers)


# Images.

FORMATS = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK", "YCbCr"],
    "GIF": ["1", "L", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"],
    "WEBP": ["RGB", "RGBA"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
}
CAN_BE_SAVED = [(form, mode) for form, modes in FORMATS.items() for mode in modes]
NOISE = Image.effect_noise((64, 64), 90)
SIZES = [(1, 1), (1, 30), (30, 1), (2, 3), (17, 9), (40, 40), (64, 20), (600, 2), (3, 300)]


def make_file(
    form: str, mode: str, size: tuple[int, int], orientation: int | None, scale: float, frames: int
) -> bytes:
    grey = NOISE.resize(size)
    if mode in ("I", "F"):
        image = grey.convert("F").point(lambda level: level * scale + 0).convert(mode)
    elif mode == "I;16":
        image = grey.convert("I").point(lambda level: level * 257).convert("I;16")
    elif mode == "YCbCr" and form == "TIFF":
        image = grey.convert("RGB").convert("YCbCr")
    else:
        image = grey.convert("L" if mode == "1" else "RGB").convert(mode)
    options = {}
    if orientation is not None and form in ("PNG", "JPEG", "TIFF", "WEBP"):
        options["exif"] = Image.Exif()
        options["exif"][PIL.Image.ExifTags.Base.Orientation] = orientation
    if mode == "P" and form in ("PNG", "GIF"):
        options["transparency"] = 5
    if frames > 1 and form in ("GIF", "WEBP", "TIFF", "PNG") and mode in ("L", "RGB", "P"):
        options |= {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@st.composite
def image_files(draw) -> bytes:
    form, mode = draw(st.sampled_from(CAN_BE_SAVED))
    size, orientation = draw(st.sampled_from(SIZES)), draw(st.sampled_from([None, None, 0, 1, 2, 3, 6, 8, 9, 65535]))
    frames, scale = 1 + draw(st.booleans()), 1.0
    if mode == "F":
        scale = draw(st.sampled_from([1.0, 1 / 255, 257.0, 1e9, -1.0, float("nan"), float("inf")]))
    elif mode == "I":
        scale = draw(st.sampled_from([1.0, 257.0, 1000.0, -1.0]))
    data = bytearray(make_file(form, mode, size, orientation, scale, frames))
    for _ in range(draw(st.sampled_from([1, 0, 0, 1, 2, 5]))):
        # Headers are where most of what can go wrong is.
        limit = draw(st.sampled_from([len(data), 200, len(data)]))
        data[draw(st.integers(0, min(limit, len(data)) - 1))] = draw(st.integers(0, 255))
    if draw(st.integers(0, 9)) == 7:
        del data[draw(st.integers(0, len(data))) :]
    if draw(st.integers(0, 19)) == 7:
        data += b"\0trailing"
    return bytes(data)


@pytest.fixture(scope="module")
def small_limit():
    kept, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, 8_000
    yield
    PIL.Image.MAX_IMAGE_PIXELS = kept


@fuzz(0.6)
@given(data=image_files())
@pytest.mark.filterwarnings("ignore")
def test_image_files(processor, collate, small_limit, data):
    problem = find_problem(io.BytesIO(data))
    question = [{"role": "user", "content": [{"type": "image", "image": data}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    try:
        asked = processor.apply_chat_template(question, **options)["pixel_values"]
    except ValueError as error:
        assert "is no readable image: " in str(error), error
        assert problem, error  # what the dataset takes, inference takes
        OUTCOMES[f"image rejected: {kind_of(error)}"] += 1
        return
    assert asked.shape == (1, 3, 28, 28) and torch.isfinite(asked).all()
    if problem:  # a draft of a JPEG reads what is broken otherwise
        OUTCOMES["image rejected by the dataset alone"] += 1
        return
    row = {
        "id": "a",
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        ],
        "images": [ImageFeature().decode_example({"bytes": data, "path": None})],
    }
    batch = collate([row])
    check_sample(processor, batch, 1, 1)
    assert torch.equal(batch["pixel_values"], asked)
    OUTCOMES["image that became a sample"] += 1


@pytest.mark.parametrize(
    "text", ["a red circle </s> <image> " * 40_330, "x" * 100_000, "\n" * 100_000], ids=["words", "x", "lines"]
)
def test_long_text(processor, collate, text):
    """A megabyte once, as it takes a while."""
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "Red."}]})
    check_sample(processor, collate([{"id": "a", "messages": messages, "images": []}]), 0, 1)
