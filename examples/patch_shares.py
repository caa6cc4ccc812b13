# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
How many patches of the small world's held-out images can be read: by their visual words, and by LatentLens.

    pip install latentlens
    python examples/patch_shares.py runs/small_world/stage4 runs/small_world/data

LatentLens (arXiv 2602.00462) looks up whose hidden state is nearest to that of a patch, among tokens of a text corpus,
each in its context, in several layers. The corpus are texts that the small world trains with: captions, conversations.
"""

import argparse
import json
import random
from pathlib import Path

import latentlens
import numpy as np
import torch
from demo import markdown_table
from evaluate import BATCH_SIZE, measure_patches, read_patches
from small_world import read_held_out
from tqdm import tqdm

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor


MEASURES = {
    "attribute": "object patches: a true attribute",
    "shuffled": "the same with the images shuffled",
    "background": 'background patches: "dark"',
    "separated": "object told from background",
}


def read_corpus(data: Path, num_texts: int) -> list[str]:
    """A random choice of the texts that the small world trains with."""
    records = [
        *json.loads((data / "captions.json").read_text()),
        *json.loads((data / "instructions.json").read_text()),
    ]
    texts = {turn["value"].removeprefix("<image>").strip() for record in records for turn in record["conversations"]}
    texts = sorted(texts - {""})
    return random.Random(0).sample(texts, min(num_texts, len(texts)))


def make_index(
    model: VWLMMForConditionalGeneration, processor: VWLMMProcessor, corpus: list[str]
) -> latentlens.ContextualIndex:
    """LatentLens's index of a corpus, by its own defaults: layers, and 50 contexts of each token."""
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "right"  # it takes position 0 for the first token of a text
    return latentlens.build_index(model.name_or_path, corpus, model=model, tokenizer=tokenizer)


@torch.inference_mode()
def read_latents(
    model: VWLMMForConditionalGeneration,
    processor: VWLMMProcessor,
    records: list[dict],
    index: latentlens.ContextualIndex,
) -> np.ndarray:
    """The nearest token in its context of each patch, of each layer's hidden states: words `[layers + 1, I, N]`."""
    words = []
    for start in tqdm(range(0, len(records), BATCH_SIZE), desc="Reading hidden states", unit="batch"):
        batch = [
            [{"role": "user", "content": [{"type": "image", "image": record["image"]}]}]
            for record in records[start : start + BATCH_SIZE]
        ]
        inputs = processor.apply_chat_template(batch, tokenize=True, return_dict=True, return_tensors="pt")
        hidden_states = latentlens.get_hidden_states(model, **inputs)  # layers + 1 of [B, L, D]
        is_image = inputs["input_ids"] == model.config.image_token_id  # [B, L]
        found = [index.search(hidden[is_image], top_k=1) for hidden in hidden_states]  # of [B * N]
        words.append([[nearest[0].token_str.strip() for nearest in layer] for layer in found])  # [layers + 1, B * N]
    words = np.concatenate(words, axis=1)
    return words.reshape(len(words), len(records), -1)


def main(arguments: list[str] | None = None) -> None:
    """Prints shares of patches, of the checkpoint that the command line, or `arguments` in its place, names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a VW-LMM checkpoint of the small world")
    parser.add_argument("data", type=Path, help="folder that small_world.py wrote")
    parser.add_argument("--images", type=int, default=300, help="held-out images to read, the first ones (300)")
    parser.add_argument("--texts", type=int, default=1000, help="texts of LatentLens's corpus (1000)")
    args = parser.parse_args(arguments)
    records = read_held_out(args.data)[: args.images]
    model = VWLMMForConditionalGeneration.from_pretrained(args.checkpoint).eval()
    processor = VWLMMProcessor.from_pretrained(args.checkpoint)
    nearest, visual = read_patches(model, processor, records)
    readings = {"visual word": visual, "nearest token": nearest}
    corpus = read_corpus(args.data, args.texts)
    index = make_index(model, processor, corpus)
    for layer, words in enumerate(read_latents(model, processor, records, index)):
        readings[f"LatentLens, layer {layer}"] = words
    shares = {name: measure_patches(words, records) for name, words in readings.items()}
    rows = [[name, *(f"{measured[measure]:.1%}" for measure in MEASURES)] for name, measured in shares.items()]
    true = [words for record in records for words in record["patch_words"]]
    print(
        f"\n{markdown_table(['first word of a patch', *MEASURES.values()], rows)}\n"
        f"{len(records)} images, {sum(len(words) > 1 for words in true)} object patches, "
        f"{sum(len(words) == 1 for words in true)} background patches. Index: {len(index)} hidden states of layers "
        f"{index.available_layers}, of {len(corpus)} texts."
    )


if __name__ == "__main__":
    main()
