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
