# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What examples/patch_shares.py hands to LatentLens, and reads from it, is of the right patches and tokens."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import set_seed


latentlens = pytest.importorskip("latentlens")  # the Makefile installs it, for the pinned versions alone
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import patch_shares  # noqa: E402
from evaluate import measure_patches, read_patches  # noqa: E402
from small_world import COLOURS, PLACES, SHAPES, SIZES, read_held_out, write_llava_dataset  # noqa: E402


WORDS = [
    *COLOURS,
    *SHAPES,
    *SIZES,
    *{word for place in PLACES for word in place.split()},
    "dark",
    "at",
    "the",
    "a",
    ",",
]


@pytest.fixture(scope="module")
def small_world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small_world")
    write_llava_dataset(folder, 6, 4, num_held_out=3)
    return folder


@pytest.fixture(scope="module")
def parts(make_model_of_words):
    """A random model that sees 8 x 8 patches, and its processor."""
    return make_model_of_words(WORDS, image_size=64, patch_size=8)


def test_hidden_states_are_those_of_each_patch_in_order(parts, small_world):
    model, processor = parts
    records = read_held_out(small_world)
    states = []
    for record in records:
        message = {"role": "user", "content": [{"type": "image", "image": record["image"]}]}
        inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")
        hidden_states = model(**inputs, output_hidden_states=True).hidden_states
        states.append(hidden_states[1][0, inputs["input_ids"][0] == model.config.image_token_id].detach())
    embeddings = torch.nn.functional.normalize(torch.cat(states), dim=-1)  # [I * N, D]
    metadata = [{"token_str": f" {image}/{patch}"} for image in range(3) for patch in range(64)]
    index = latentlens.ContextualIndex({1: {"embeddings": embeddings, "metadata": metadata}})
    words = patch_shares.read_latents(model, processor, records, index)
    assert words.shape == (3, 3, 64)
    assert words[1].tolist() == [[f"{image}/{patch}" for patch in range(64)] for image in range(3)]


def test_index_knows_the_place_of_each_token(parts, small_world):
    model, processor = parts
    corpus = patch_shares.read_corpus(small_world, 8)
    assert len(corpus) == 8 and not any("<image>" in text for text in corpus)
    index = patch_shares.make_index(model, processor, corpus)
    set_seed(0)
    for near in index.search(torch.randn(20, index.hidden_dim), top_k=5):
        for neighbor in near:
            assert processor.tokenizer(neighbor.caption).input_ids[neighbor.position] == neighbor.token_id


def test_prints_shares_of_all_readings(parts, small_world, tmp_path, capsys):
    model, processor = parts
    for part in parts:
        part.save_pretrained(tmp_path)
    patch_shares.main([str(tmp_path), str(small_world), "--images", "2", "--texts", "8"])
    printed = capsys.readouterr().out
    records = read_held_out(small_world)[:2]
    nearest, visual = read_patches(model, processor, records)
    for name, words in (("visual word", visual), ("nearest token", nearest)):
        row = next(line for line in printed.splitlines() if name in line)
        shares = measure_patches(words, records)
        assert [cell.strip() for cell in row.split("|")[2:-1]] == [f"{share:.1%}" for share in shares.values()]
    assert all(f"LatentLens, layer {layer}" in printed for layer in range(3))
    num_object_patches = sum(len(true) == 3 for record in records for true in record["patch_words"])
    assert f"2 images, {num_object_patches} object patches" in printed
