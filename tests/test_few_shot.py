# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Answers in context: which examples stand in front of a question, how many, and in which order."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import few_shot
import test_lavit_training as lavit


SHADES = (0, 60, 120, 180, 240)


@pytest.fixture
def world(tmp_path) -> tuple[list[dict], list[dict]]:
    """A question about the brightest of five images, and an example of each of them."""
    examples = []
    for shade in SHADES:
        image = str(tmp_path / f"{shade}.png")
        Image.new("RGB", (28, 28), (shade, 255 - shade, 128)).save(image)
        examples.append({"image": image, "question": f"how bright is {shade}", "answer": str(shade)})
    return [examples[-1] | {"question": "and this"}], examples


@pytest.mark.parametrize("shots", [0, 2, 5])
def test_the_most_alike_stand_nearest_to_the_question(model, processor, world, monkeypatch, shots):
    records, examples = world
    asked = []
    monkeypatch.setattr(
        few_shot, "answer", lambda model, processor, conversations: asked.extend(conversations) or [""]
    )
    few_shot.answer_with_examples(model, processor, records, examples, shots)
    (conversation,) = asked
    contents = [message["content"] for message in conversation]
    questions = [content[1]["text"] for content in contents[::2]]
    images = [content[0]["image"] for content in contents[::2]]
    assert questions[-1] == "and this"
    assert len(questions) == shots + 1
    assert contents[1::2] == [image.split("/")[-1].removesuffix(".png") for image in images[:-1]]
    # By the features of the tower, which are asked here one image at a time.
    features = {}
    for example in examples:
        pixel_values = processor.image_processor([Image.open(example["image"])], return_tensors="pt")["pixel_values"]
        mean = model.get_image_features(pixel_values).patch_features.mean(dim=1)[0]
        features[example["image"]] = mean / mean.norm()
    own = features[records[0]["image"]]
    nearest_first = sorted(features, key=lambda image: -float(own @ features[image]))
    assert images[:-1] == nearest_first[:shots][::-1]
    assert not shots or images[-2] == records[0]["image"]


@pytest.mark.parametrize("drops", [False, True], ids=["all_tokens", "kept_tokens"])
def test_eight_examples_fit_or_are_refused(model, processor, world, monkeypatch, drops):
    """Of an image the tokens that are kept take room, and no others."""
    records, examples = world[0], world[1] * 2
    if drops:
        tokenizer = lavit.make_tokenizer(selection="threshold", threshold=1.0, min_tokens=2)
        model, processor = lavit.make_model(tokenizer).eval(), lavit.make_processor(tokenizer)
    lengths = []
    hook = model.model.language_model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(int(kwargs["position_embeddings"][0].shape[1])), with_kwargs=True
    )
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 10_000)
    few_shot.answer_with_examples(model, processor, records, examples, 8)
    hook.remove()
    # Slots, those of 14 of the 16 tokens of each of nine images left out where they are dropped.
    longest = lengths[0] - (9 * 14 if drops else 0)
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", longest)
    few_shot.answer_with_examples(model, processor, records, examples, 8)
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", longest - 1)
    with pytest.raises(ValueError, match=f"{longest} tokens, and the model reads {longest - 1} at most"):
        few_shot.answer_with_examples(model, processor, records, examples, 8)
    few_shot.answer_with_examples(model, processor, records, examples, 7)


def test_an_example_is_the_first_question_of_an_image(tmp_path):
    turns = [("human", "<image>\nwhat"), ("gpt", "red"), ("human", "where"), ("gpt", "left")]
    conversations = [{"from": speaker, "value": value} for speaker, value in turns]
    records = [
        {"id": str(n), "conversations": conversations} | ({"image": f"{n}.png"} if n != 1 else {}) for n in range(4)
    ]
    (tmp_path / "instructions.json").write_text(json.dumps(records))
    examples = few_shot.read_examples(tmp_path, num_examples=2)
    assert [Path(example["image"]).name for example in examples] == ["0.png", "2.png"]
    assert {(example["question"], example["answer"]) for example in examples} == {("what", "red")}
