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
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm import tqdm

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor


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
    records = json.loads(args.json_file.read_text())
    if not records:
        raise ValueError(f"{args.json_file} has no records; expected one at least.")
    unfinished = args.output.with_name(f"{args.output.name}.unfinished")
    with open(unfinished, "w") as file:
        # As they come: the labels of LLaVA's 665k records are more than the memory of most machines.
        for start in tqdm(range(0, len(records), BATCH_SIZE), desc="Labelling", unit="batch"):
            batch = label(model, processor, records[start : start + BATCH_SIZE], args.image_folder)
            file.write(",\n" if start else "[\n")
            file.write(",\n".join(json.dumps(record) for record in batch))
        file.write("\n]\n")
    unfinished.replace(args.output)


def label(
    model: VWLMMForConditionalGeneration, processor: VWLMMProcessor, records: list[dict], image_folder: Path
) -> list[dict]:
    """
    Some records, with `image_labels` where they have images.

    Raises:
        ValueError: If an image cannot be read.
    """
    records = [{**record, "image_labels": []} if get_images(record) else record for record in records]
    images = [(record, str(image_folder / name)) for record in records for name in get_images(record)]
    if not images:
        return records
    inputs = processor(images=[image for _, image in images], return_tensors="pt")
    ids = model.get_visual_words(**inputs.to(model.device)).token_ids[..., 0]  # [I, N]
    ids = ids.masked_fill(ids < 0, -100)  # dropped image tokens learn nothing
    for (record, _), labels in zip(images, ids.tolist(), strict=True):
        record["image_labels"].append(labels)
    return records


def get_images(record: dict) -> list[str]:
    """The paths of a record's images: none, one or several."""
    images = record.get("image") or []
    return [images] if isinstance(images, str) else images


if __name__ == "__main__":
    main()
