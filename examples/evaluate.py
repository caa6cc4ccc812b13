"""
What a VW-LMM checkpoint knows of the small world: answers to held-out questions, nearest tokens and visual words.

    python examples/evaluate.py runs/small_world/stage4 runs/small_world/data
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from small_world import BACKGROUND_WORD, KINDS, PATCH_SIZE, PATCHES_PER_SIDE, read_held_out
from tqdm import tqdm

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor


matplotlib.use("Agg")
import matplotlib.pyplot as plt


BATCH_SIZE = 50


@torch.inference_mode()
def answer_questions(
    model: VWLMMForConditionalGeneration, processor: VWLMMProcessor, records: list[dict]
) -> list[str]:
    """Greedy answers to the held-out questions, in their order."""
    # Answers to questions of one kind are about equally long, so that a batch of them wastes few decoding steps.
    order = sorted(range(len(records)), key=lambda index: records[index]["kind"])
    answers = [""] * len(records)
    for start in tqdm(range(0, len(records), BATCH_SIZE), desc="Answering", unit="batch"):
        batch = order[start : start + BATCH_SIZE]
        for index, text in zip(batch, answer(model, processor, [[ask(records[i])] for i in batch]), strict=True):
            answers[index] = text
    return answers


def ask(record: dict) -> dict:
    """The message that asks about an image."""
    content = [{"type": "image", "image": record["image"]}, {"type": "text", "text": record["question"]}]
    return {"role": "user", "content": content}


def answer(
    model: VWLMMForConditionalGeneration, processor: VWLMMProcessor, conversations: list[list[dict]]
) -> list[str]:
    """Greedy answers to a batch of conversations that end with a question."""
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)  # [B, L + new]
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def measure_answers(answers: list[str], records: list[dict]) -> dict[str, float]:
    """Exact-match accuracy by kind, and over all questions under `"all"`."""
    asked, right = Counter(), Counter()
    for answer, record in zip(answers, records, strict=True):
        for kind in (record["kind"], "all"):
            asked[kind] += 1
            right[kind] += answer == record["answer"]
    return {kind: right[kind] / asked[kind] for kind in (*KINDS, "all")}


@torch.inference_mode()
def read_patches(
    model: VWLMMForConditionalGeneration, processor: VWLMMProcessor, records: list[dict]
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest token and most probable visual word of every patch of every held-out image, `[I, N]` words each."""
    nearest, visual = [], []
    for start in tqdm(range(0, len(records), BATCH_SIZE), desc="Reading patches", unit="batch"):
        images = [Image.open(record["image"]) for record in records[start : start + BATCH_SIZE]]
        inputs = processor(images=images, return_tensors="pt")  # without and with high-resolution patches
        nearest.append(model.get_nearest_tokens(**inputs))  # [I, N]
        visual.append(model.get_visual_words(**inputs).token_ids[..., 0])  # [I, N]
    vocabulary = np.array(
        [
            token.removeprefix("▁")
            for token in processor.tokenizer.convert_ids_to_tokens(range(model.config.text_config.vocab_size))
        ]
    )
    return vocabulary[torch.cat(nearest)], vocabulary[torch.cat(visual)]


def measure_patches(words: np.ndarray, records: list[dict]) -> dict[str, float]:
    """
    Shares of patches whose word is right.

    Args:
        words (`np.ndarray` of shape `[I, N]`): One word a patch.
        records (`list[dict]`): The held-out records, whose `patch_words` are the true words of each patch.

    Returns:
        `dict[str, float]`, with `attribute`: of the object patches, the share whose word is an attribute of their
        object; `shuffled`: the same with every image's words compared with the next image; `background`: of the
        background patches, the share whose word is the background's; `separated`: of both, the share of object patches
        with any other word and background patches with this one.
    """

    def pairs(words: np.ndarray) -> Iterator[tuple[str, list[str]]]:
        for image_words, record in zip(words, records, strict=True):
            yield from zip(image_words, record["patch_words"], strict=True)

    def attribute_share(words: np.ndarray) -> float:
        return np.mean([word in true for word, true in pairs(words) if len(true) > 1])

    on_background = [word == BACKGROUND_WORD for word, true in pairs(words) if true == [BACKGROUND_WORD]]
    on_object = [word != BACKGROUND_WORD for word, true in pairs(words) if len(true) > 1]
    return {
        "attribute": attribute_share(words),
        "shuffled": attribute_share(np.roll(words, 1, axis=0)),
        "background": np.mean(on_background),
        "separated": np.mean(on_background + on_object),
    }


def draw(path: Path, records: list[dict], nearest: np.ndarray, visual: np.ndarray, answers: list[str]) -> None:
    """
    Writes a picture: each image beside its nearest tokens and its visual words, with one answered question below.

    Args:
        path (`Path`): File to write.
        records (`list[dict]`): The records of the `I` images to draw.
        nearest (`np.ndarray` of shape `[I, N]`): Nearest token of each patch.
        visual (`np.ndarray` of shape `[I, N]`): Most probable visual word of each patch.
        answers (`list[str]`): The model's answer to each record's question.
    """
    figure = plt.figure(figsize=(12, 4.4 * len(records)), layout="constrained")
    titles = ("held-out image", "nearest tokens", "most probable visual words")
    rows = figure.subfigures(len(records), 1, squeeze=False)[:, 0]
    for row, record, nearest_words, visual_words, answer in zip(rows, records, nearest, visual, answers, strict=True):
        image = Image.open(record["image"])
        for axis, title, words in zip(row.subplots(1, 3), titles, ((), nearest_words, visual_words), strict=True):
            axis.set_title(title)
            axis.axis("off")
            axis.imshow(image, alpha=0.35 if len(words) else 1, interpolation="nearest")
            for patch, word in enumerate(words):
                y, x = divmod(patch, PATCHES_PER_SIDE)
                axis.text((x + 0.5) * PATCH_SIZE, (y + 0.5) * PATCH_SIZE, word, ha="center", va="center", fontsize=6)
        verdict = "right" if answer == record["answer"] else f"wrong, it is: {record['answer']}"
        row.supxlabel(f"{record['question']}\n{answer}\n({verdict})", fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Prints what is measured of the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a VW-LMM checkpoint")
    parser.add_argument("data", help="folder that small_world.py wrote")
    args = parser.parse_args()
    model = VWLMMForConditionalGeneration.from_pretrained(args.checkpoint)
    processor = VWLMMProcessor.from_pretrained(args.checkpoint)
    records = read_held_out(args.data)
    print(measure_answers(answer_questions(model, processor, records), records))
    for name, words in zip(("nearest tokens", "visual words"), read_patches(model, processor, records), strict=True):
        print(name, measure_patches(words, records))


if __name__ == "__main__":
    main()
