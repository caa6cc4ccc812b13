"""
Labels for the objective `token_labels`: the most probable visual words of a checkpoint, for every image of a file in
LLaVA's format.

    python examples/experiment/label_images.py runs/stage3 data/llava_v1_5_mix665k.json data output.json

The output has the records of the file; those with images get `image_labels`, one row of token ids an image. Until it
is whole, its name ends in `.unfinished`.
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm import tqdm

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor
from processing_vwlmm.llava_dataset import read_record, read_records


BATCH_SIZE = 100


def main(arguments: list[str] | None = None) -> None:
    """Writes the labels that the command line, or `arguments` in its place, asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("json_file", type=Path)
    parser.add_argument("image_folder", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = VWLMMForConditionalGeneration.from_pretrained(args.checkpoint).eval().to(device)
    processor = VWLMMProcessor.from_pretrained(args.checkpoint)
    if 3 not in model.config.trained_stages:
        raise ValueError(
            f"The VM head of {args.checkpoint} may be random: its `trained_stages` are {model.config.trained_stages}; "
            "expected 3 among them. Train stage III first."
        )
    unfinished = args.output.with_name(f"{args.output.name}.unfinished")
    with open(unfinished, "w") as file:
        # As they come: the labels of LLaVA's 665k records are more than the memory of most machines.
        records = enumerate(tqdm(read_records(args.json_file), desc="Labelling", unit=" records"))
        separator = "[\n"
        while batch := list(islice(records, BATCH_SIZE)):
            labelled = label(model, processor, batch, args.image_folder.resolve())
            file.write(separator + ",\n".join(map(json.dumps, labelled)))
            separator = ",\n"
        file.write("\n]\n")
    unfinished.replace(args.output)


def label(
    model: VWLMMForConditionalGeneration,
    processor: VWLMMProcessor,
    numbered: list[tuple[int, Any]],
    image_folder: Path,
) -> list[dict[str, Any]]:
    """
    Records, that come with their places in the file, with `image_labels` where they have images.

    Raises:
        ValueError: If `load_llava_dataset` would refuse a record, or an image cannot be read.
    """
    records, images = [], []
    for index, record in numbered:
        if isinstance(record, dict):
            record = {name: value for name, value in record.items() if name != "image_labels"}  # which it gets anew
        paths = [image["path"] for image in read_record(index, record, image_folder)["images"]]
        records.append(record | {"image_labels": []} if paths else record)
        images += [(records[-1], path) for path in paths]
    if not images:
        return records
    inputs = processor(images=[path for _, path in images], return_tensors="pt")
    ids = model.get_visual_words(**inputs.to(model.device)).token_ids[..., 0]  # [I, N]
    ids = ids.masked_fill(ids < 0, -100)  # dropped image tokens learn nothing
    for (record, _), labels in zip(images, ids.tolist(), strict=True):
        record["image_labels"].append(labels)
    return records


if __name__ == "__main__":
    main()
