# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Cognition alignment: which samples get a question, where it stands, what is right, and what reads such samples."""

import copy
import json
import logging
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from conftest import BY_HAND, GOLDEN, make_image, needs_diffusers
from datasets import Dataset, Image, IterableDataset, List
from torch.utils.data import DataLoader

from modeling_vwlmm import VWLMMTrainer, VWLMMTrainingArguments
from modeling_vwlmm.training import data_order
from modeling_vwlmm.training.collating import VWLMMDataCollator
from modeling_vwlmm.training.packing import count_tokens
from modeling_vwlmm.training.sampling import estimate_lengths
from processing_vwlmm import add_cognition_alignment, llava_dataset, load_llava_dataset, mix_datasets
from processing_vwlmm.cognition_alignment import (
    QUESTIONS,
    CognitionAlignment,
    format_indices,
    format_pixels,
    parse_indices,
    parse_pixels,
    sample_quarter,
)
from processing_vwlmm.images_vwlmm import convert_to_rgb
from processing_vwlmm.llava_dataset import FEATURES
from processing_vwlmm.transforms import PART_COLUMN
from processing_vwlmm.vq_indices import VQIndices, write_description


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import evaluate
import train
import vq_indices
from small_world import write_llava_dataset


PIXELS = {"pixel_share": 1.0, "index_share": 0.0}
COLLATE = {"max_length": 512, "assistant_only_loss": True}
CORNERS = re.compile(
    "([0-9]+)%? (?:of its width and|from the left and) ([0-9]+)|[(]([0-9]+), ([0-9]+)|x = ([0-9]+), y = ([0-9]+)"
)


def save(image: PIL.Image.Image, path: Path, **options) -> str:
    image.save(path, **options)
    return str(path)


def make_dataset(folder: Path, num_samples: int = 40) -> Dataset:
    """Conversations of one to three pairs: every fifth without an image, every seventh with two in different turns."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_samples):
        num_images = 0 if number % 5 == 4 else 2 if number % 7 == 6 else 1
        paths = [save(make_image(10 * number + i), folder / f"{number}-{i}.png") for i in range(num_images)]
        messages = []
        for turn in range(max(num_images, 1 + number % 3)):
            marker = [{"type": "image", "text": None}] if turn < num_images else []
            content = [*marker, {"type": "text", "text": f"Question {turn} of {number}?"}]
            messages += [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": f"Answer {turn}."}]},
            ]
        images = [{"bytes": None, "path": path} for path in paths]
        rows.append({"id": f"id-{number}", "messages": messages, "images": images})
    return Dataset.from_list(rows, features=FEATURES)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("cognition") / "images")


@pytest.fixture(scope="module")
def aligned(plain) -> Dataset:
    return add_cognition_alignment(plain, 3, grid=4, **PIXELS)


def texts(sample: dict) -> list[tuple[str, str]]:
    """Who says what, images included."""
    return [
        (message["role"], "".join("<image>" if p["type"] == "image" else p["text"] for p in message["content"]))
        for message in sample["messages"]
    ]


def find_added(before: dict, after: dict) -> tuple[int, str, str]:
    """Place, question and answer of the one pair that a sample has more."""
    before, after = texts(before), texts(after)
    places = [p for p in range(0, len(after) - 1) if after[:p] + after[p + 2 :] == before]
    assert len(places) == 1, after
    return places[0], after[places[0]][1], after[places[0] + 1][1]


def read_corner(question: str) -> tuple[int, int]:
    return tuple(int(number) for number in CORNERS.search(question).groups() if number is not None)


def by_id(dataset) -> dict[str, list[tuple[str, str]]]:
    return {sample["id"]: texts(sample) for sample in dataset}


class TestWhatIsDrawn:
    def test_seed(self, plain):
        """The same seed gives the same bytes, another one others."""
        first, same, other = (
            json.dumps([texts(sample) for sample in add_cognition_alignment(plain, seed, grid=2, **PIXELS)])
            for seed in (0, 0, 1)
        )
        assert first == same != other

    def test_neither_order_nor_number_of_samples_matters(self, plain, aligned):
        expected = by_id(aligned)
        chosen = [17, 3, 30, 8]
        assert by_id(add_cognition_alignment(plain.select(chosen), 3, grid=4, **PIXELS)) == {
            f"id-{number}": expected[f"id-{number}"] for number in chosen
        }
        assert by_id(aligned.shuffle(seed=1)) == expected
        assert [texts(sample) for sample in aligned.iter(1) for sample in [{k: v[0] for k, v in sample.items()}]] == [
            *expected.values()
        ]

    def test_samples_without_images_stay(self, plain, aligned):
        without = [number for number in range(len(plain)) if not plain[number]["images"]]
        assert len(without) == 8
        for number in without:
            assert pickle.dumps(aligned[number]) == pickle.dumps(plain[number])

    def test_images_without_text_stay(self, plain):
        """No pair can stand behind an answer, and none is counted."""
        samples = plain.with_format("arrow")[:].to_pylist()
        alone = [{**sample, "messages": sample["messages"][:1]} for sample in samples]
        alone = Dataset.from_list(alone, features=FEATURES)
        asked = add_cognition_alignment(alone, 3, grid=4, **PIXELS)
        assert by_id(asked) == by_id(alone)
        assert (estimate_lengths(asked, 16)[0] == estimate_lengths(alone, 16)[0]).all()

    def test_place(self, plain, aligned):
        """Between pairs or at the end, behind the turn with the image that it is about; at all such places."""
        places = Counter()
        for before, after in zip(plain, aligned, strict=True):
            if not before["images"]:
                continue
            place, question, _ = find_added(before, after)
            number = re.search("image ([12])", question)
            assert (number is not None) == (len(before["images"]) == 2)
            first = 2 * (int(number[1]) if number else 1)
            assert place % 2 == 0 and first <= place <= len(before["messages"])
            assert texts(after)[0] == texts(before)[0] and texts(after)[0][1].startswith("<image>")
            if len(before["messages"]) == 6:
                places[place] += 1
        assert places.keys() == {2, 4, 6}

    def test_place_of_a_later_image(self, plain):
        """A question on the second image stands nowhere in front of it."""
        sample, ids = plain[6], [str(number) for number in range(60)]
        assert [text.startswith("<image>") for _, text in texts(sample)[::2]] == [True, True]
        batch = {"id": ids, "messages": [sample["messages"]] * 60, "images": [sample["images"]] * 60}
        places = {"1": set(), "2": set()}
        for messages in CognitionAlignment(0, 1, 0, 1).add(batch)["messages"]:
            place, question, _ = find_added(sample, {"messages": messages})
            places[re.search("image ([12])", question)[1]].add(place)
        assert places == {"1": {2, 4}, "2": {4}}

    def test_system_turns_and_strings(self, plain):
        rows = [
            {
                "id": str(number),
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "What?"},
                    {"role": "assistant", "content": "A dog."},
                    {"role": "user", "content": "Where?"},
                    {"role": "assistant", "content": "Here."},
                ],
                "images": [make_image(number)],
            }
            for number in range(8)
        ]
        dataset = Dataset.from_list(rows).cast_column("images", List(Image()))
        places = set()
        for sample in add_cognition_alignment(dataset, 0, grid=1, **PIXELS):
            contents = [message["content"] for message in sample["messages"]]
            assert len(contents) == 7 and all(isinstance(content, str) for content in contents)
            places.add(next(place for place, content in enumerate(contents) if "image" in content))
        assert places == {3, 5}

    def test_shares(self):
        """Of 2,000 samples, within four standard deviations of a binomial distribution; no two kinds at once."""
        alignment = CognitionAlignment(0, 0.3, 0.1, 8)
        counts = Counter(alignment.draw_kind(f"{number:012d}") for number in range(2000))
        for kind, share in (("pixel", 0.3), ("index", 0.1), (None, 0.6)):
            assert abs(counts[kind] - 2000 * share) < 4 * math.sqrt(2000 * share * (1 - share)), kind

    def test_wordings(self):
        drawn = {kind: set() for kind in QUESTIONS}
        assert all(len(set(wordings)) == len(wordings) > 3 for wordings in QUESTIONS.values())
        for kind, wordings in QUESTIONS.items():
            for wording in wordings:
                question = wording.format(image="the image", x=12, y=34, grid=8)
                assert read_corner(question) == (12, 34) and question.count("8") >= 1
                drawn[kind].add(question)
        assert not drawn["pixel"] & drawn["index"]


class TestPixels:
    def test_every_number_is_that_of_pillow(self, plain, aligned):
        corners = set()
        for before, after in zip(plain, aligned, strict=True):
            if not before["images"]:
                continue
            _, question, answer = find_added(before, after)
            number = re.search("image ([12])", question)
            with PIL.Image.open(before["images"][int(number[1]) - 1 if number else 0].filename) as image:
                x, y = read_corner(question)
                corners.add((x, y))
                assert 0 <= x <= 50 and 0 <= y <= 50
                table = [
                    [tuple(map(int, pixel.split(","))) for pixel in line.split(" ")] for line in answer.split("\n")
                ]
                assert [len(row) for row in table] == [4] * 4
                for row in range(4):
                    for column in range(4):
                        # In floating point and away from the border of two pixels, where rounding may decide.
                        place = [
                            side * (start / 100 + (cell + 0.5) / 8)
                            for side, start, cell in ((image.width, x, column), (image.height, y, row))
                        ]
                        near = [{int(p - 1e-9), int(p + 1e-9)} for p in place]
                        assert table[row][column] in {image.getpixel((i, j)) for i in near[0] for j in near[1]}
        assert len(corners) > 20

    def test_quarter_fits(self):
        """The last cell of the last quarter is the last one of the image, the first of the first its first."""
        values = np.arange(32 * 64).reshape(32, 64)
        assert sample_quarter(values, (50, 50), 16)[-1, -1] == values[-1, -1]
        assert sample_quarter(values, (0, 0), 32)[0, 0] == values[0, 0]
        np.testing.assert_array_equal(sample_quarter(values, (0, 0), 16), values[:16, :32][:, 1::2])
        np.testing.assert_array_equal(sample_quarter(values, (50, 0), 16), values[:16, 32:][:, 1::2])
        np.testing.assert_array_equal(sample_quarter(values, (0, 50), 16), values[16:, :32][:, 1::2])

    @pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2)])
    def test_fewer_pixels_than_cells(self, tmp_path, size):
        image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        for corner in ((0, 0), (50, 50), (17, 33)):
            found = sample_quarter(np.asarray(image), corner, 8)
            assert found.shape == (8, 8, 3)
            if size == (1, 1):
                assert (found == np.asarray(image)[0, 0]).all()

    @pytest.mark.parametrize("kind", ["exif", "palette", "animated", "16 bits", "transparent"])
    def test_images_as_the_processor_reads_them(self, tmp_path, kind):
        noise = make_image(5)
        path = tmp_path / ("image.gif" if kind == "animated" else "image.png")
        if kind == "exif":
            exif = PIL.Image.Exif()
            exif[PIL.Image.ExifTags.Base.Orientation] = 6
            save(noise, path, exif=exif)
            expected = noise.transpose(PIL.Image.Transpose.ROTATE_270)
        elif kind == "palette":
            save(noise.quantize(7), path)
            expected = noise.quantize(7).convert("RGB")
        elif kind == "animated":
            frames = [make_image(5).quantize(200), make_image(22).resize(noise.size).quantize(200)]
            save(frames[0], path, save_all=True, append_images=frames[1:])
            expected = frames[0].convert("RGB")
        elif kind == "16 bits":
            values = np.random.default_rng(0).integers(0, 2**16, (20, 30), dtype=np.uint16)
            save(PIL.Image.fromarray(values), path)
            eight = np.round(values / 257).astype(np.uint8)
            expected = PIL.Image.fromarray(eight).convert("RGB")
        else:
            save(noise.convert("RGBA").copy(), path)
            transparent = PIL.Image.new("RGBA", noise.size, (1, 2, 3, 0))
            save(transparent, path)
            expected = PIL.Image.new("RGB", noise.size, "white")
        row = {
            "id": "a",
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
            ],
            "images": [{"bytes": None, "path": str(path)}],
        }
        sample = add_cognition_alignment(Dataset.from_list([row], features=FEATURES), 0, grid=8, **PIXELS)[0]
        question, answer = (message["content"][0]["text"] for message in sample["messages"][2:])
        found = parse_pixels(answer, 8)
        np.testing.assert_array_equal(found, sample_quarter(np.asarray(expected), read_corner(question), 8))
        # And it is what the processor is given.
        pixels = np.asarray(convert_to_rgb(sample["images"][0]))
        np.testing.assert_array_equal(found, sample_quarter(pixels, read_corner(question), 8))


class TestAnswers:
    def test_round_trip(self):
        rng = np.random.default_rng(0)
        pixels, indices = rng.integers(0, 256, (8, 8, 3)), rng.integers(0, 4096, (8, 8))
        np.testing.assert_array_equal(parse_pixels(format_pixels(pixels), 8), pixels)
        np.testing.assert_array_equal(parse_indices(format_indices(indices), 8), indices)
        assert format_pixels(pixels[:1, :2]) == "{},{},{} {},{},{}".format(*pixels[0, 0], *pixels[0, 1])

    @pytest.mark.parametrize(
        "text", ["", "A dog.", "1,2,3 4,5,6", "1,2,3 4,5,6\n7,8,9", "1,2 3,4\n5,6 7,8", "1,2,3 4,5,6\n7,8,9 0,0,256"]
    )
    def test_what_is_no_table_of_pixels(self, text):
        assert parse_pixels(text, 2) is None

    @pytest.mark.parametrize("text", ["", "1 2", "1 2\n3", "1 2\n3 x", "1 2\n3 -4", "1 2\n3 4\n5 6", "1 2\n3 ²"])
    def test_what_is_no_table_of_indices(self, text):
        assert parse_indices(text, 2) is None


class TestLaziness:
    def test_no_image_is_opened(self, tmp_path, monkeypatch):
        dataset = make_dataset(tmp_path, 10)
        opened = []
        real = PIL.Image.open
        monkeypatch.setattr(PIL.Image, "open", lambda file, *args, **kwargs: opened.append(file) or real(file, *args))
        aligned = mix_datasets([add_cognition_alignment(dataset, 0, grid=2, **PIXELS), dataset], [1, 0.5])
        estimate_lengths(aligned, 16)
        assert not opened
        aligned[0]
        assert len(opened) == 1

    def test_time_of_665k_samples(self, tmp_path):
        """None of them is looked at, so that it takes a fraction of a second beyond what reading takes."""
        number = 665_000
        numbers = pa.array(np.arange(number)).cast(pa.string())
        paths = pa.compute.binary_join_element_wise(pa.scalar("/data/images/coco/"), numbers, pa.scalar(".jpg"), "")
        one = make_dataset(tmp_path, 1).data.table
        table = pa.Table.from_batches([one.to_batches()[0].slice(0, 1)]).take(
            pa.array(np.zeros(number, dtype=np.int64))
        )
        files = pa.StructArray.from_arrays([pa.nulls(number, pa.binary()), paths], ["bytes", "path"])
        images = pa.ListArray.from_arrays(pa.array(np.arange(number + 1, dtype=np.int32)), files)
        table = table.set_column(0, "id", numbers).set_column(2, "images", images)
        dataset = Dataset(table.replace_schema_metadata(FEATURES.arrow_schema.metadata))
        begun = time.process_time()
        add_cognition_alignment(dataset, 0, index_share=0)
        assert time.process_time() - begun < 1

    def test_what_was_set_on_a_dataset_stays(self, plain):
        dataset = copy.deepcopy(plain)
        dataset.num_skipped_samples = 5
        assert add_cognition_alignment(dataset, 0, **PIXELS).num_skipped_samples == 5

    def test_fingerprint(self, plain):
        settings = [(0, 0.25, 0, 8), (1, 0.25, 0, 8), (0, 0.5, 0, 8), (0, 0.25, 0, 4)]
        prints = [add_cognition_alignment(plain, *setting)._fingerprint for setting in settings]
        assert len({plain._fingerprint, *prints}) == 5
        assert add_cognition_alignment(plain, *settings[0])._fingerprint == prints[0]


class TestMixtures:
    def test_behind_and_before(self, plain):
        """Mixed samples get the questions that they get alone."""
        first, second = plain.select(range(20)), plain.select(range(20, 40))
        options = {"seed": 1, "grid": 2, **PIXELS}
        behind = add_cognition_alignment(mix_datasets([first, second], [1, 0.5]), **options)
        before = mix_datasets([add_cognition_alignment(part, **options) for part in (first, second)], [1, 0.5])
        assert [texts(sample) for sample in behind] == [texts(sample) for sample in before]
        assert any(len(a["messages"]) > len(b["messages"]) for a, b in zip(behind, first, strict=False))
        assert PART_COLUMN not in before.column_names

    def test_one_of_two(self, plain):
        """And what was aligned stays so, and the other as it was, whose images are decoded all the same."""
        aligned = add_cognition_alignment(plain, 1, grid=2, **PIXELS)
        mixed = mix_datasets([plain, aligned], [1, 2])
        assert "mixture_part" not in mixed[0]
        expected = [texts(sample) for dataset in (plain, aligned, aligned) for sample in dataset]
        assert [texts(sample) for sample in mixed] == expected
        whole = mixed[35:45]  # of both in one batch
        assert [len(messages) for messages in whole["messages"]] == [len(one) for one in expected[35:45]]
        for index in (0, 41):
            assert isinstance(mixed[index]["images"][0], PIL.Image.Image)
        lengths, alone = estimate_lengths(mixed, 16)[0], estimate_lengths(plain, 16)[0]
        np.testing.assert_array_equal(lengths[:40], alone)
        np.testing.assert_array_equal(lengths[40:80], estimate_lengths(aligned, 16)[0])

    def test_a_transform_of_ones_own(self, plain):
        def shout(batch):
            return {**batch, "id": [name.upper() for name in batch["id"]]}

        mixed = mix_datasets([plain.with_transform(shout), add_cognition_alignment(plain, 1, **PIXELS)], [1, 1])
        assert (mixed[0]["id"], mixed[40]["id"]) == ("ID-0", "id-0")
        assert isinstance(mixed[0]["images"][0], PIL.Image.Image)

    def test_samples_that_lack_a_column(self, plain, aligned):
        with pytest.raises(ValueError, match="read as messages alone.*Keep these columns"):
            aligned.select_columns("messages")[0]
        mixed = mix_datasets([plain, aligned], [1, 1])
        with pytest.raises(ValueError, match="without their column `mixture_part`"):
            mixed.remove_columns(PART_COLUMN)[0]
        with pytest.raises(ValueError, match="Mix all of them in one call"):
            mix_datasets([mixed, mixed.with_format(None)], [1, 1])


class TestStreams:
    def test_same_samples(self, plain, aligned):
        stream = add_cognition_alignment(plain.to_iterable_dataset(4), 3, grid=4, **PIXELS)
        assert by_id(stream) == by_id(aligned)
        sample = next(iter(stream))
        np.testing.assert_array_equal(sample["images"][0], plain[0]["images"][0])
        assert stream.features == plain.features
        assert next(iter(stream.decode(False)))["images"][0].keys() == {"bytes", "path"}

    def test_workers(self, plain, aligned):
        """Samples of a map-style dataset and of a stream, in processes of their own."""
        loader = DataLoader(aligned, batch_size=4, num_workers=2, collate_fn=lambda samples: [*map(texts, samples)])
        assert [sample for batch in loader for sample in batch] == [*by_id(aligned).values()]
        stream = add_cognition_alignment(plain.to_iterable_dataset(2), 3, grid=4, **PIXELS)
        ordered = data_order.GlobalStream(stream, 5, 8, 4)
        loader = DataLoader(ordered, batch_size=4, num_workers=2, collate_fn=lambda samples: [*map(texts, samples)])
        assert [sample for batch in loader for sample in batch] == [*by_id(aligned).values()]

    def test_generator(self, plain):
        def generate():
            yield from plain

        stream = add_cognition_alignment(IterableDataset.from_generator(generate), 3, grid=4, **PIXELS)
        assert len(texts(next(iter(stream)))) == len(plain[0]["messages"]) + 2


class TestTraining:
    @pytest.mark.parametrize("order", ["random", "group_by_length", "packing", "stream", "mixed"])
    def test_step(self, model, processor, plain, tmp_path, order):
        """A step runs, and learns as many more tokens as the added answers have."""
        losses = {}
        for name, dataset in (("plain", plain), ("aligned", add_cognition_alignment(plain, 3, grid=1, **PIXELS))):
            if order == "mixed" and name == "aligned":
                dataset = mix_datasets([plain.select([0, 1]), dataset.select([2, 3])], [1, 1])
            dataset = dataset.select(range(4))
            if order == "stream":
                dataset = plain.select(range(4)).to_iterable_dataset()
                if name == "aligned":
                    dataset = add_cognition_alignment(dataset, 3, grid=1, **PIXELS)
            options = {
                "group_by_length": {"train_sampling_strategy": "group_by_length"},
                "packing": {"packing": True},
            }.get(order, {})
            args = VWLMMTrainingArguments(
                str(tmp_path / name),
                stage=4,
                **{
                    "per_device_train_batch_size": 1 if order == "packing" else 4,
                    "gradient_accumulation_steps": 1,
                    "max_steps": 1,
                    "max_length": 2048,
                    **BY_HAND,
                    "learning_rate": 1e-12,
                    **options,
                },
            )
            trainer = VWLMMTrainer(model, args, dataset, copy.deepcopy(processor))
            trainer.train()
            losses[name] = trainer.state.log_history[0]
        collator = VWLMMDataCollator(processor, **COLLATE)
        aligned = add_cognition_alignment(plain, 3, grid=1, **PIXELS)
        labels = {
            number: [int((collator([dataset[number]])["labels"] != -100).sum()) for dataset in (plain, aligned)]
            for number in range(4)
        }
        assert all(after > before for before, after in labels.values())
        expected = sum(
            after - before for number, (before, after) in labels.items() if order != "mixed" or number in (2, 3)
        )
        assert losses["aligned"]["num_text_positions"] - losses["plain"]["num_text_positions"] == expected
        assert math.isfinite(losses["aligned"]["loss"])

    def test_lengths(self, plain, aligned, processor):
        """`group_by_length` sees the added turns, of samples with images alone; `packing` counts them exactly."""
        more = estimate_lengths(aligned, 16)[0] - estimate_lengths(plain, 16)[0]
        has_images = np.array([bool(sample["images"]) for sample in plain])
        assert (more[has_images] > 16).all() and not more[~has_images].any()
        part = plain.select(range(7, 31))  # rows in the middle of a table
        more = estimate_lengths(part.with_transform(aligned.format["format_kwargs"]["transform"]), 16)[0]
        assert ((more > estimate_lengths(part, 16)[0]) == has_images[7:31]).all()
        collator = VWLMMDataCollator(processor, image_seq_length=16, **{**COLLATE, "max_length": None})
        collator.chat_template = processor.get_chat_template("vicuna_v1")
        for dataset in (aligned, mix_datasets([plain, aligned], [1, 1])):
            counted = count_tokens(dataset, collator)
            assert counted.tolist() == [int(collator([sample])["attention_mask"].sum()) for sample in dataset]


@pytest.fixture(scope="module")
def index_file(plain, tmp_path_factory) -> Path:
    """Indices of all images of `plain`, 5 x 7 each, that say where they are."""
    path = tmp_path_factory.mktemp("indices") / "indices.npy"
    write_indices(path, plain)
    return path


def write_indices(path: Path, dataset: Dataset, model: str = "a", codebook_size: int = 4096) -> None:
    files = sorted(
        {image["path"] for images in dataset.with_format("arrow")[:]["images"].to_pylist() for image in images}
    )
    images = {Path(file).name: vq_indices.compute_digest(Path(file).read_bytes()) for file in files}
    indices = np.random.default_rng(len(model)).integers(0, codebook_size, (len(images), 5, 7)).astype(np.uint16)
    np.save(path, indices)
    fields = {
        "model": model,
        "model_digest": model * 2,
        "codebook_size": codebook_size,
        "grid": [5, 7],
        "image_size": 64,
    }
    write_description(path, images, indices, fields)


class TestIndices:
    def test_answers(self, plain, index_file):
        aligned = add_cognition_alignment(plain, 0, 0, 1, grid=6, indices=index_file)
        indices, names = np.load(index_file), [*json.loads(index_file.with_suffix(".json").read_text())["images"]]
        found = 0
        for before, after in zip(plain, aligned, strict=True):
            if not before["images"]:
                continue
            _, question, answer = find_added(before, after)
            number = re.search("image ([12])", question)
            name = Path(before["images"][int(number[1]) - 1 if number else 0].filename).name
            expected = sample_quarter(indices[names.index(name)], read_corner(question), 6)
            np.testing.assert_array_equal(parse_indices(answer, 6), expected)
            found += 1
        assert found == 32

    def test_images_in_the_table_and_streams(self, plain, index_file, tmp_path):
        """Found by content: of images that lie in the table there is no path."""
        rows = [
            {**row, "images": [{"bytes": Path(image["path"]).read_bytes(), "path": None} for image in row["images"]]}
            for row in plain.with_format("arrow")[:].to_pylist()
        ]
        packed = Dataset.from_list(rows, features=FEATURES)
        expected = by_id(add_cognition_alignment(plain, 0, 0.4, 0.6, grid=2, indices=index_file))
        assert by_id(add_cognition_alignment(packed, 0, 0.4, 0.6, grid=2, indices=index_file)) == expected
        streamed = add_cognition_alignment(packed.to_iterable_dataset(2), 0, 0.4, 0.6, grid=2, indices=index_file)
        assert by_id(streamed) == expected

    def test_another_process(self, index_file):
        """Workers get where the file is, and not what it holds."""
        alignment = CognitionAlignment(0, 0.5, 0.5, 8, VQIndices(index_file))
        dumped = pickle.dumps(alignment)
        assert len(dumped) < 1000 and pickle.loads(dumped) == alignment

    def test_none_given(self, plain, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        aligned = add_cognition_alignment(plain, 0)
        assert "`index_share` is 0.25, and there are no `indices`" in caplog.text
        assert aligned[:] == add_cognition_alignment(plain, 0, index_share=0)[:]

    @pytest.mark.parametrize("missing", ["indices.npy", "indices.json"])
    def test_missing_file(self, plain, index_file, tmp_path, missing):
        for file in (index_file, index_file.with_suffix(".json")):
            if file.name != missing:
                (tmp_path / file.name).write_bytes(file.read_bytes())
        with pytest.raises(ValueError, match=f"There is no .*{missing}.*vq_indices.py"):
            add_cognition_alignment(plain, 0, indices=tmp_path / "indices.npy")

    def test_another_data_set(self, plain, index_file, tmp_path):
        """An image that it lacks, and one of the same name with other content: before any sample is read."""
        write_indices(tmp_path / "less.npy", plain.select(range(30)))
        with pytest.raises(ValueError, match="no codebook indices of .*-0.png, one of [0-9]+ such.*another data set"):
            add_cognition_alignment(plain, 0, indices=tmp_path / "less.npy")
        other = make_dataset(tmp_path / "images").select([0])
        make_image(99).save(other[0]["images"][0].filename)
        with pytest.raises(ValueError, match="no codebook indices of .*0-0.png.*another data set, or the image has"):
            add_cognition_alignment(other, 0, indices=index_file)

    def test_read_from_two_folders(self, plain, index_file, tmp_path):
        """The same images elsewhere are found by name and content."""
        elsewhere = make_dataset(tmp_path / "elsewhere" / "deep")
        mixed = mix_datasets([plain, elsewhere], [1, 1])
        aligned = by_id(add_cognition_alignment(mixed, 0, 0, 1, grid=2, indices=index_file))
        assert aligned == by_id(add_cognition_alignment(plain, 0, 0, 1, grid=2, indices=index_file))

    def test_another_vq_model(self, plain, index_file, tmp_path):
        """Indices beside the description of others, and two models in one mixture."""
        write_indices(tmp_path / "other.npy", plain, "another model")
        swapped = tmp_path / "swapped.npy"
        swapped.write_bytes((tmp_path / "other.npy").read_bytes())
        swapped.with_suffix(".json").write_bytes(index_file.with_suffix(".json").read_bytes())
        with pytest.raises(
            ValueError, match="does not hold the indices that swapped.json describes.*another VQ model"
        ):
            add_cognition_alignment(plain, 0, indices=swapped)
        parts = [add_cognition_alignment(plain, 0, indices=file) for file in (index_file, tmp_path / "other.npy")]
        with pytest.raises(ValueError, match="different VQ models, .*'a' and .*'another model'.*one model"):
            mix_datasets(parts, [1, 1])
        assert parts[0]._fingerprint != parts[1]._fingerprint  # a run does not go on with the other

    def test_stream_of_other_images(self, plain, tmp_path):
        write_indices(tmp_path / "less.npy", plain.select([0]))
        stream = add_cognition_alignment(plain.to_iterable_dataset(), 0, 0, 1, grid=2, indices=tmp_path / "less.npy")
        with pytest.raises(ValueError, match="Sample 'id-1': .*no codebook indices of .*1-0.png"):
            list(stream)


class TestSettings:
    @pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "0.5", True, None])
    def test_share(self, plain, share):
        for name in ("pixel_share", "index_share"):
            with pytest.raises(ValueError, match=f"`{name}` is .*, expected a number from 0 to 1"):
                add_cognition_alignment(plain, 0, **{"pixel_share": 0, "index_share": 0, name: share})

    def test_sum(self, plain, index_file):
        with pytest.raises(ValueError, match="is 0.7 and `index_share` 0.5, 1.2 together.*one question or none"):
            add_cognition_alignment(plain, 0, 0.7, 0.5, indices=index_file)

    @pytest.mark.parametrize(
        "name, value", [("grid", 0), ("grid", 2.0), ("grid", True), ("seed", "0"), ("seed", None)]
    )
    def test_integers(self, plain, name, value):
        with pytest.raises(ValueError, match=f"`{name}` is {value!r}, expected an? .*integer"):
            add_cognition_alignment(plain, **{"seed": 0, "grid": 8, **PIXELS, name: value})

    def test_columns(self, plain):
        with pytest.raises(ValueError, match="columns messages, images, and no `id`"):
            add_cognition_alignment(plain.remove_columns("id"), 0, **PIXELS)
        with pytest.raises(ValueError, match="has a transform already"):
            add_cognition_alignment(add_cognition_alignment(plain, 0, **PIXELS), 0, **PIXELS)
        text = plain.remove_columns("images")
        assert add_cognition_alignment(text, 0, **PIXELS) is text
        strings = text.add_column("images", [["a.png"]] * len(text))
        with pytest.raises(ValueError, match="column `images` is .*Make images of it"):
            add_cognition_alignment(strings, 0, **PIXELS)

    def test_addresses_are_not_fetched(self, plain):
        row = {
            **plain.with_format("arrow")[:1].to_pylist()[0],
            "images": [{"bytes": None, "path": "https://a.b/c.png"}],
        }
        dataset = Dataset.from_list([row], features=FEATURES)
        with pytest.raises(ValueError, match="An image is the address 'https://a.b/c.png', which is not fetched"):
            add_cognition_alignment(dataset, 0, grid=2, **PIXELS)[0]


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    monkeypatch.setattr(llava_dataset, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_llava_dataset(tmp_path, 4, 12, num_held_out=6)
    return tmp_path


@pytest.fixture(scope="module")
def vq():
    """A tiny random VQModel: 16 x 16 pixels to 4 x 4 indices of 20."""
    import diffusers  # an optional dependency

    torch.manual_seed(0)
    model = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        num_vq_embeddings=20,
        norm_num_groups=2,
        layers_per_block=1,
        vq_embed_dim=4,
    ).eval()
    model.quantize.embedding.weight.data.normal_(0, 0.5)  # as far apart as the latents are
    return model


@needs_diffusers
class TestIndexFile:
    def run(self, out, images, vq, batch_size=3):
        return vq_indices.compute_file(out, images, vq, "tiny", image_size=16, batch_size=batch_size)

    @pytest.fixture
    def images(self, tmp_path) -> dict[str, str]:
        return {f"{number}.png": save(make_image(number), tmp_path / f"{number}.png") for number in range(10)}

    def test_golden(self):
        """Nearest entries, in raster order; one image after the other."""
        from diffusers.models.autoencoders import vae as quantizers  # an optional dependency

        golden = np.load(GOLDEN / "vlsa" / "vlsa.npz")
        codebook = torch.from_numpy(golden["vq.codebook"])
        quantizer = quantizers.VectorQuantizer(
            *codebook.shape, beta=0.25, sane_index_shape=False, legacy=False
        ).double()
        quantizer.embedding.weight.data = codebook
        latents = torch.from_numpy(golden["vq.latents"])
        found = vq_indices.quantize(quantizer, torch.stack([latents, latents.flip(-1)]))
        assert found.shape == (2, *latents.shape[1:])
        assert found[0].flatten().tolist() == golden["vq.indices"].tolist()
        torch.testing.assert_close(found[1], found[0].flip(-1))

    def test_one_by_one(self, vq, images, tmp_path):
        """Each map is its own image's: squares from -1 to 1, and the nearest entry by hand."""
        indices = self.run(tmp_path / "out.npy", images, vq)
        assert (indices.grid, indices.codebook_size, len(indices)) == ((4, 4), 20, 10)
        assert np.load(tmp_path / "out.npy").dtype == np.uint16
        distinct = set()
        for path in images.values():
            with PIL.Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB").resize((16, 16), PIL.Image.Resampling.BICUBIC))
            pixels = torch.from_numpy(pixels / 127.5 - 1).float().permute(2, 0, 1)[None]
            with torch.no_grad():
                latents = vq.encode(pixels).latents[0].flatten(1).T  # [16, 4]
            expected = torch.cdist(latents, vq.quantize.embedding.weight).argmin(dim=1).reshape(4, 4)
            found = indices.get(Path(path).read_bytes(), path)
            assert (found == expected.numpy()).mean() > 0.9  # a tie may go another way in a batch
            distinct.add(found.tobytes())
        assert len(distinct) == 10

    def test_data_of_the_same_name_are_left_alone(self, vq, images, tmp_path, capsys):
        """`data.npy` and its description `data.json`, where `data.json` is the data set."""
        data = tmp_path / "data.json"
        data.write_text("[]")
        with pytest.raises(ValueError, match="is there already, and no data.npy beside it: it may be your data"):
            self.run(tmp_path / "data.npy", images, vq)
        with pytest.raises(SystemExit):
            vq_indices.main([str(data), str(tmp_path), str(tmp_path / "data.npy")])
        assert "your data; choose another name" in capsys.readouterr().err
        assert data.read_text() == "[]"
        with pytest.raises(ValueError, match="there is no folder .*missing. Make it first"):
            self.run(tmp_path / "missing" / "out.npy", images, vq)

    @pytest.mark.parametrize("num_batches", [0, 1, 3])
    def test_killed(self, vq, images, tmp_path, monkeypatch, num_batches):
        """A run that was killed goes on, and computes no image twice, but those of the batch it was killed in."""
        whole, out = tmp_path / "whole.npy", tmp_path / "out.npy"
        self.run(whole, images, vq)
        encode, sizes = vq_indices.encode, []

        def until(vq, pixels):
            sizes.append(len(pixels))
            if len(sizes) == num_batches + 2:  # the first finds the grid
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(vq, pixels)

        monkeypatch.setattr(vq_indices, "encode", until)
        process = multiprocessing.get_context("fork").Process(target=self.run, args=(out, images, vq))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not out.exists()
        with open(out.with_suffix(".npy.progress"), "a") as journal:
            journal.write('["cut o')  # mid-way through a line
        monkeypatch.setattr(vq_indices, "encode", lambda vq, pixels: sizes.append(len(pixels)) or encode(vq, pixels))
        sizes.clear()
        self.run(out, images, vq)
        assert sum(sizes[1:]) == 10 - 3 * num_batches
        assert out.read_bytes() == whole.read_bytes()
        assert out.with_suffix(".json").read_bytes() == whole.with_suffix(".json").read_bytes()
        assert {path.name for path in tmp_path.glob("out.*")} == {"out.npy", "out.json"}
        sizes.clear()
        self.run(out, images, vq)  # it is there
        assert sizes == [1]

    def test_killed_at_the_end(self, vq, images, tmp_path, monkeypatch):
        out = tmp_path / "out.npy"
        monkeypatch.setattr(vq_indices.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            self.run(out, images, vq)
        monkeypatch.undo()
        whole = self.run(tmp_path / "whole.npy", images, vq)
        assert self.run(out, images, vq) == whole

    def test_others(self, vq, images, tmp_path):
        """Another model or data set, over a file that is there and over one that is begun."""
        out = tmp_path / "out.npy"
        self.run(out, images, vq)
        other = copy.deepcopy(vq)
        other.quantize.embedding.weight.data[0] += 1
        few = dict([*images.items()][:5])
        with pytest.raises(ValueError, match="there already, with `model_digest`.*another VQ model"):
            self.run(out, images, other)
        with pytest.raises(ValueError, match="there already, with 10 images of another data set than these 5"):
            self.run(out, few, vq)
        (tmp_path / "broken.png").write_bytes(b"none")
        begun = tmp_path / "begun.npy"
        with pytest.raises(ValueError, match="broken.png: .*no readable image"):
            self.run(begun, {**images, "broken.png": str(tmp_path / "broken.png")}, vq)
        with pytest.raises(ValueError, match="begun.npy.progress is of a run with `model_digest`.*delete it"):
            self.run(begun, images, other)
        with pytest.raises(ValueError, match="begun.npy.progress is of a run with `images`.*delete it"):
            self.run(begun, few, vq)

    def test_command_line(self, vq, small_world, capsys):
        """Of a folder's model, for all images of a data set, each once; and training data take the file."""
        vq.save_pretrained(small_world / "model" / "vqvae")
        records = json.loads((small_world / "instructions.json").read_text())
        (small_world / "twice.json").write_text(json.dumps(records + records[:5]))
        out = small_world / "out.npy"
        command = [small_world / "twice.json", small_world / "images", out, "--model", small_world / "model"]
        vq_indices.main([*map(str, command), "--image-size", "16", "--num-workers", "0", "--device", "cpu"])
        names = {record["image"] for record in records if "image" in record}
        assert f"4 x 4 indices of {len(names)} images, a codebook of 20 entries" in capsys.readouterr().out
        assert json.loads(out.with_suffix(".json").read_text())["images"].keys() == names
        dataset = load_llava_dataset(small_world / "instructions.json", small_world / "images")
        aligned = add_cognition_alignment(dataset, 0, 0, 1, grid=2, indices=out)
        assert [len(a["messages"]) - len(b["messages"]) for a, b in zip(aligned, dataset, strict=True)] == [
            2 if "image" in record else 0 for record in records
        ]

    def test_no_such_model(self, vq, tmp_path):
        with pytest.raises(
            ValueError, match=r"no VQ model to be loaded from .*nowhere, subfolder vqvae(.|\n)*local folder"
        ):
            vq_indices.load_vq_model(str(tmp_path / "nowhere"))

    def test_without_diffusers(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "diffusers", None)
        with pytest.raises(ImportError, match='cannot be imported.*pip install "diffusers>=0.42"'):
            vq_indices.load_vq_model("a")

    def test_size_that_the_model_does_not_take(self, vq, images, tmp_path):
        with pytest.raises(ValueError, match="tiny does not encode images of 1 x 1 pixels"):
            vq_indices.compute_file(tmp_path / "out.npy", images, vq, "tiny", image_size=1)


class TestRecipe:
    def load(self, data, *options):
        parser = train.TrlParser((train.ScriptArguments,))
        command = ["--json_file", data / "instructions.json", "--image_folder", data / "images", *options]
        return train.load_data(parser.parse_args_and_config([*map(str, command)])[0], seed=5)

    def test_yaml_and_command_line(self, small_world):
        (small_world / "recipe.yaml").write_text("cognition_alignment: {pixel_share: 0.5, index_share: 0, grid: 2}\n")
        from_yaml = self.load(small_world, "--config", small_world / "recipe.yaml")
        setting = json.dumps({"pixel_share": 0.5, "index_share": 0, "grid": 2})
        from_line = self.load(small_world, "--cognition_alignment", setting)
        expected = add_cognition_alignment(self.load(small_world), 5, 0.5, 0, 2)
        assert from_yaml._fingerprint == from_line._fingerprint == expected._fingerprint
        assert by_id(from_yaml) == by_id(expected) != by_id(self.load(small_world))

    @pytest.mark.parametrize(
        "setting, error",
        [
            ('{"pixel": 1}', "is {'pixel': 1}, expected a mapping with some of grid, index_share"),
            ("yes", "is 'yes', expected a mapping"),
        ],
    )
    def test_refused(self, small_world, setting, error):
        with pytest.raises(ValueError, match=error):
            self.load(small_world, "--cognition_alignment", setting)

    @pytest.mark.parametrize("mixed", [False, True])
    def test_dry_run(self, small_world, monkeypatch, capsys, mixed):
        """Prints how long added answers are, and their share of what is learned."""
        monkeypatch.setattr(VWLMMTrainer, "train", lambda *_, **__: pytest.fail("trains"))
        monkeypatch.chdir(Path(__file__).parents[1])
        dataset = load_llava_dataset(small_world / "instructions.json", small_world / "images")
        write_indices(small_world / "indices.npy", dataset)
        setting = {"pixel_share": 0.5, "index_share": 0.5, "grid": 2, "indices": str(small_world / "indices.npy")}
        options = []
        if mixed:
            read = train._load_mixture

            def mix(*args):
                dataset = read(*args)
                return mix_datasets([add_cognition_alignment(dataset, 42, **setting), dataset], [1, 1])

            monkeypatch.setattr(train, "load_data", mix)
        else:
            options = ["--cognition_alignment", json.dumps(setting)]
        command = ["--config", "examples/recipes/small_world/stage2.yaml", "--check", "--use_cpu", "--bf16", "false"]
        command += ["--model_name_or_path", "", "--json_file", str(small_world / "instructions.json")]
        command += ["--image_folder", str(small_world / "images"), "--output_dir", str(small_world)]
        command += [
            "--vision_tower",
            "examples/small_world/vision_tower",
            "--language_model",
            "examples/small_world/llm",
        ]
        parser = train.TrlParser((train.ScriptArguments, VWLMMTrainingArguments, train.ModelConfig))
        script_args, training_args, model_args = parser.parse_args_and_config([*command, *options])
        model_args.model_name_or_path = None
        assert train._check(script_args, training_args, model_args) == 0
        printed = capsys.readouterr().out

        aligned = add_cognition_alignment(dataset, 42, **setting)
        processor = train.VWLMMProcessor.from_vision_text_pretrained(
            "examples/small_world/vision_tower", "examples/small_world/llm", chat_template="vicuna_v1"
        )
        collator = VWLMMDataCollator(processor, **COLLATE)
        learned = sum(int((collator([sample])["labels"] != -100).sum()) for sample in aligned)
        if mixed:
            learned += sum(int((collator([sample])["labels"] != -100).sum()) for sample in dataset)
        for kind, parse in (("pixel", parse_pixels), ("index", parse_indices)):
            answers = [text for sample in aligned for role, text in texts(sample) if parse(text, 2) is not None]
            lengths = [len(processor.tokenizer(text, add_special_tokens=False).input_ids) for text in answers]
            assert lengths
            expected = f"{kind} questions added: {len(lengths)}, {np.mean(lengths):.1f} tokens an answer, "
            assert expected + f"{sum(lengths) / learned:.1%} of the supervised tokens" in printed


class TestEvaluation:
    @pytest.fixture
    def questions(self, small_world):
        dataset = load_llava_dataset(small_world / "instructions.json", small_world / "images")
        write_indices(small_world / "indices.npy", dataset)
        files = [sample["images"][0].filename for sample in dataset if sample["images"]][:4]
        records = [{"id": str(number), "image": file} for number, file in enumerate(files)]
        return evaluate.make_cognition_questions(records, 2, VQIndices(small_world / "indices.npy"))

    def test_questions(self, questions):
        assert Counter(question["kind"] for question in questions) == {"pixel": 4, "index": 4}
        for question in questions[:4]:
            with PIL.Image.open(question["image"]) as image:
                expected = sample_quarter(np.asarray(image.convert("RGB")), read_corner(question["question"]), 2)
            assert question["answer"] == format_pixels(expected)

    def test_right_answers(self, questions):
        measured = evaluate.measure_cognition([question["answer"] for question in questions], questions, 2)
        assert measured["index"] == {"questions": 4, "unreadable": 0, "accuracy": 1.0}
        assert measured["pixel"]["mean_absolute_error"] == 0
        constant = []
        for question in questions[:4]:
            true = parse_pixels(question["answer"], 2)
            constant.append(np.abs(true - true.mean(axis=(0, 1))).mean())
        assert measured["pixel"]["mean_colour_error"] == pytest.approx(np.mean(constant))

    def test_wrong_and_unreadable_answers(self, questions):
        """One of four tables is none, and in another of each kind one value is wrong."""
        answers = [question["answer"] for question in questions]
        pixels, indices = parse_pixels(answers[0], 2), parse_indices(answers[4], 2)
        pixels[1, 0, 2] += 12 if pixels[1, 0, 2] < 128 else -12
        indices[0, 1] += 1
        answers[0], answers[4] = format_pixels(pixels), format_indices(indices)
        answers[1] = answers[5] = "A red circle."
        measured = evaluate.measure_cognition(answers, questions, 2)
        assert measured["pixel"]["unreadable"] == measured["index"]["unreadable"] == 1
        assert measured["pixel"]["mean_absolute_error"] == pytest.approx(12 / 12 / 3)
        assert measured["index"]["accuracy"] == (4 * 4 - 4 - 1) / 16
        none = evaluate.measure_cognition(["?"] * 8, questions, 2)
        assert math.isnan(none["pixel"]["mean_absolute_error"]) and none["index"]["accuracy"] == 0

    def test_command_line(self, small_world, vicuna, monkeypatch, capsys):
        """The model is asked, and what it says is measured, whatever it says."""
        monkeypatch.setattr(evaluate, "measure_answers", lambda *_: {})
        monkeypatch.setattr(evaluate, "read_patches", lambda *_: ([], []))
        monkeypatch.setattr(evaluate, "measure_patches", lambda *_: {})
        evaluate.main([vicuna, str(small_world), "--cognition", "3", "--grid", "1"])
        printed = capsys.readouterr().out
        assert re.search(r"pixel questions \{'questions': 3, 'unreadable': [0-3], 'mean_absolute_error': ", printed)
        assert "index questions" not in printed
