# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Forms of training data: each is read as it is meant, or refused by an error that names what was found."""

import copy
import io
import json
import tarfile

import pytest
from conftest import BY_HAND, make_image
from datasets import Dataset, Features, Image, List, Value, load_dataset

from modeling_vwlmm import VWLMMTrainer, VWLMMTrainingArguments


ORDERS = {"random": {}, "grouped": {"train_sampling_strategy": "group_by_length"}, "packed": {"packing": True}}
ANSWER = [{"role": "assistant", "content": [{"type": "text", "text": "A red dog."}]}]
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
IMAGES = [make_image(seed) for seed in range(4)]


@pytest.fixture
def train(model, processor, tmp_path):
    """Takes a step of stage IV that changes nothing, and returns what it logs."""

    def train(dataset, **options):
        args = VWLMMTrainingArguments(
            str(tmp_path / "run"),
            stage=4,
            **{
                "per_device_train_batch_size": 4,
                "global_batch_size": 4,
                "max_steps": 1,
                "max_length": 256,
                **BY_HAND,
                "learning_rate": 1e-12,
                **options,
            },
        )
        trainer = VWLMMTrainer(model, args, dataset, copy.deepcopy(processor))
        trainer.train()
        return trainer.state.log_history[0]

    return train


def make(images: str | None = "images", **columns) -> Dataset:
    """Four samples with the same columns, and an image each."""
    columns = {name: [value] * 4 for name, value in columns.items()}
    if images == "images":
        return Dataset.from_dict({**columns, images: [[image] for image in IMAGES]}).cast_column(images, List(Image()))
    if images == "image":
        return Dataset.from_dict({**columns, images: IMAGES}).cast_column(images, Image())
    return Dataset.from_dict(columns)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("images", ["images", "image"])
@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_forms_that_say_the_same(train, order, images, form):
    texts = {"messages": QUESTION + ANSWER} if form == "messages" else {"prompt": QUESTION, "completion": ANSWER}
    expected = train(make(messages=QUESTION + ANSWER))
    found = train(make(images, **texts), **ORDERS[order])
    names = ("loss", "language_loss", "visual_loss", "num_text_positions", "num_image_positions")
    if order == "packed":  # all four samples are one row, where a batch of four rows takes each of them again
        names = names[:3]
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_contents_that_are_strings(train):
    plain = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A red dog."}]
    assert train(make(messages=plain))["loss"] == pytest.approx(train(make(messages=QUESTION + ANSWER))["loss"])


@pytest.mark.parametrize("order", ["random", "grouped"])
def test_text_alone(train, order):
    plain = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A red dog."}]
    losses = [
        train(make(None, **texts), **ORDERS[order])["loss"]
        for texts in ({"messages": plain}, {"prompt": plain[:1], "completion": plain[1:]})
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_text_among_single_images(train):
    texts = [QUESTION + ANSWER] * 3 + [[{"role": "user", "content": [{"type": "text", "text": "Who?"}]}, *ANSWER]]
    lists = Dataset.from_dict({"messages": texts, "images": [*([image] for image in IMAGES[:3]), []]})
    single = Dataset.from_dict({"messages": texts, "image": [*IMAGES[:3], None]}).cast_column("image", Image())
    expected, found = train(lists.cast_column("images", List(Image()))), train(single)
    for name in ("loss", "num_text_positions", "num_image_positions"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_images_inside_messages_are_refused(train):
    part = {"type": Value("string"), "text": Value("string"), "image": Image()}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)})})
    content = [{"type": "image", "text": None, "image": IMAGES[0]}, {"type": "text", "text": "What?", "image": None}]
    answer = [{"type": "text", "text": "A dog.", "image": None}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    with pytest.raises(ValueError, match="has messages, and images inside of its messages.*column `images`"):
        train(Dataset.from_list([{"messages": messages}] * 4, features=features))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [{"text": "<image>What?"}, {"prompt": "<image>What?", "completion": "A dog."}])
def test_text_that_does_not_say_what_is_learned(train, columns, order):
    with pytest.raises(ValueError, match=f"has {', '.join(columns)}, images, and no conversation.*`messages`"):
        train(make(**columns), **ORDERS[order])


def test_a_prompt_with_answers_of_its_own(train):
    prompt = [*QUESTION, *ANSWER, {"role": "user", "content": [{"type": "text", "text": "And?"}]}]
    with pytest.raises(ValueError, match="`prompt` has answers of its own.*one column `messages`"):
        train(make(prompt=prompt, completion=ANSWER))


def test_packing_of_text_alone(train):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    with pytest.raises(ValueError, match="`packing` is set.*`images` column"):
        train(make(None, messages=messages), packing=True)


class TestStreams:
    """Shards that are read as they come, without a copy of them."""

    def test_parquet(self, train, tmp_path):
        whole = make(messages=QUESTION + ANSWER)
        for shard in range(2):
            whole.shard(2, shard, contiguous=True).to_parquet(tmp_path / f"shard-{shard}.parquet")
        stream = load_dataset("parquet", data_files=f"{tmp_path}/*.parquet", split="train", streaming=True)
        expected, found = train(whole), train(stream)
        for name in ("loss", "num_text_positions", "num_image_positions"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name

    def test_webdataset(self, train, tmp_path):
        whole = make(messages=QUESTION + ANSWER)
        with tarfile.open(tmp_path / "shard-0.tar", "w") as shard:
            for index, image in enumerate(IMAGES):
                file = io.BytesIO()
                image.save(file, "PNG")
                text = json.dumps({"messages": QUESTION + ANSWER}).encode()
                for name, content in ((f"{index}.png", file.getvalue()), (f"{index}.json", text)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))
        stream = load_dataset("webdataset", data_files=f"{tmp_path}/*.tar", split="train", streaming=True)
        stream = stream.map(
            lambda sample: {"messages": sample["json"]["messages"], "images": [sample["png"]]},
            remove_columns=["json", "png", "__key__", "__url__"],
        )
        expected, found = train(whole), train(stream)
        for name in ("loss", "num_text_positions", "num_image_positions"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name

    @pytest.mark.parametrize(
        ("options", "found"),
        [
            ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` is 'group_by_length'"),
            ({"length_column_name": "tokens"}, "`length_column_name` is 'tokens'"),
            ({"dataloader_num_workers": 2, "dataloader_in_order": False}, "`dataloader_in_order` is off"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_what_they_cannot_follow(self, train, options, found):
        with pytest.raises(ValueError, match=found):
            train(make(messages=QUESTION + ANSWER).to_iterable_dataset(), **options)
