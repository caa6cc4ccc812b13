"""
Few-shot answers in context: each question comes behind examples whose images are most like its own (RICES, retrieval
by the vision tower's features), images interleaved with text in one prompt.

    python examples/few_shot.py runs/small_world_lavit/stage2 runs/small_world_lavit/data --shots 0 2 4 8
"""

import argparse
import json
from pathlib import Path

import torch
from evaluate import answer, ask
from PIL import Image
from small_world import read_held_out
from tqdm import tqdm

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor


BATCH_SIZE = 20
NUM_EXAMPLES = 1000


def read_examples(data: str | Path, num_examples: int = NUM_EXAMPLES) -> list[dict]:
    """Images with the first question and answer of their conversation, from the training data."""
    examples = []
    for record in json.loads(Path(data, "instructions.json").read_text()):
        if "image" in record and len(examples) < num_examples:
            question, answer = (turn["value"].replace("<image>", "").strip() for turn in record["conversations"][:2])
            image = str(Path(data, "images", record["image"]))
            examples.append({"image": image, "question": question, "answer": answer})
    return examples


@torch.inference_mode()
def find_nearest(
    model: VWLMMForConditionalGeneration, processor: VWLMMProcessor, records: list[dict], examples: list[dict]
) -> torch.Tensor:
    """For each record the examples by the cosine of their images' mean patch features, best first: `[I, examples]`."""
    features = []
    for some in (records, examples):
        rows = []
        for start in range(0, len(some), 50):
            images = [Image.open(record["image"]) for record in some[start : start + 50]]
            pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]  # [I, 3, H, W]
            rows.append(model.get_image_features(pixel_values).patch_features.mean(dim=1))  # [I, W]
        features.append(torch.nn.functional.normalize(torch.cat(rows), dim=-1))
    return (features[0] @ features[1].T).argsort(dim=1, descending=True)


@torch.inference_mode()
def answer_with_examples(
    model: VWLMMForConditionalGeneration,
    processor: VWLMMProcessor,
    records: list[dict],
    examples: list[dict],
    shots: int,
) -> list[str]:
    """Greedy answers, each behind so many examples; of these the most alike comes last."""
    nearest = find_nearest(model, processor, records, examples)[:, :shots].flip(1).tolist()
    conversations = []
    for record, chosen in zip(records, nearest, strict=True):
        messages = []
        for example in (examples[index] for index in chosen):
            messages += [ask(example), {"role": "assistant", "content": example["answer"]}]
        conversations.append([*messages, ask(record)])
    answers = []
    for start in tqdm(range(0, len(records), BATCH_SIZE), desc=f"{shots} examples", unit="batch"):
        answers += answer(model, processor, conversations[start : start + BATCH_SIZE])
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a model")
    parser.add_argument("data", help="folder of the small world")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 2, 4, 8], help="examples in context")
    args = parser.parse_args()
    model = VWLMMForConditionalGeneration.from_pretrained(args.checkpoint)
    processor = VWLMMProcessor.from_pretrained(args.checkpoint)
    records, examples = read_held_out(args.data), read_examples(args.data)
    for shots in args.shots:
        answers = answer_with_examples(model, processor, records, examples, shots)
        right = sum(found == record["answer"] for found, record in zip(answers, records, strict=True))
        print(f"{shots} examples: {right / len(records):.1%} of {len(records)} questions")


if __name__ == "__main__":
    main()
