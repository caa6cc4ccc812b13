"""
What a VW-LMM checkpoint knows of the small world: answers to held-out questions, nearest tokens and visual words.

    python examples/evaluate.py runs/small_world/stage4 runs/small_world/data

With `--cognition` it also asks for pixels of held-out images, and with `--indices` for their codebook indices, as
VLSA's cognition alignment does (see `add_cognition_alignment`).
"""

import argparse
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from prompt_length import check_length
from scipy import stats
from small_world import BACKGROUND_WORD, KINDS, read_held_out
from tqdm import tqdm

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor
from processing_vwlmm import cognition_alignment as cognition
from processing_vwlmm.cognition_alignment import parse_indices, parse_pixels
from processing_vwlmm.vq_indices import VQIndices


BATCH_SIZE = 50
MAX_NEW_TOKENS = 64


@torch.inference_mode()
def answer_questions(
    model: VWLMMForConditionalGeneration,
    processor: VWLMMProcessor,
    records: list[dict],
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Greedy answers to the held-out questions, in their order."""
    # Answers to questions of one kind are about equally long, so that a batch of them wastes few decoding steps.
    order = sorted(range(len(records)), key=lambda index: records[index]["kind"])
    answers = [""] * len(records)
    for start in tqdm(range(0, len(records), BATCH_SIZE), desc="Answering", unit="batch"):
        batch = order[start : start + BATCH_SIZE]
        texts = answer(model, processor, [[ask(records[i])] for i in batch], max_new_tokens)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
    return answers


def ask(record: dict) -> dict:
    """The message that asks about an image."""
    content = [{"type": "image", "image": record["image"]}, {"type": "text", "text": record["question"]}]
    return {"role": "user", "content": content}


def answer(
    model: VWLMMForConditionalGeneration,
    processor: VWLMMProcessor,
    conversations: list[list[dict]],
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Greedy answers to a batch of conversations that end with a question, which the model can read whole."""
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    check_length(model, inputs)
    output = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)  # [B, L + new]
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def measure_answers(answers: list[str], records: list[dict], kinds: Sequence[str] = KINDS) -> dict[str, float]:
    """Exact-match accuracy by kind, and over all questions under `"all"`."""
    asked, right = Counter(), Counter()
    for answer, record in zip(answers, records, strict=True):
        for kind in (record["kind"], "all"):
            asked[kind] += 1
            right[kind] += answer == record["answer"]
    return {kind: right[kind] / asked[kind] for kind in (*kinds, "all")}


def get_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences and half of the width of its 95 % interval, by Student's t."""
    number = len(differences)
    if number < 2:
        return float(np.mean(differences)), math.inf
    error = np.std(differences, ddof=1) / math.sqrt(number)
    return float(np.mean(differences)), float(stats.t.ppf(0.975, number - 1) * error)


def make_cognition_questions(
    records: list[dict], grid: int = 8, indices: VQIndices | None = None, seed: int = 0
) -> list[dict]:
    """
    Questions on pixels, and where there are `indices` on these, one of each kind for each record's image.

    Args:
        records (`list[dict]`): With `id` and `image`, a path.
        grid (`int`, *optional*, defaults to 8): Rows and columns of an answer.
        indices ([`VQIndices`], *optional*): Codebook indices of the images.
        seed (`int`, *optional*, defaults to 0): Of places and wordings.

    Returns:
        `list[dict]`, each with `kind` (`"pixel"` or `"index"`), `image`, `question` and `answer`.

    Raises:
        ValueError: If an image is not among those of `indices`.
    """
    alignment = cognition.CognitionAlignment(seed, 1, 0, grid, indices)
    questions = []
    for kind in cognition.KINDS if indices is not None else ("pixel",):
        for record in records:
            rng = random.Random(f"{seed}/{kind}/{record['id']}")
            corner = (rng.randint(0, cognition.LAST_CORNER), rng.randint(0, cognition.LAST_CORNER))
            question = cognition.ask(rng.choice(cognition.QUESTIONS[kind]), corner, grid)
            true = alignment.answer(kind, {"bytes": None, "path": record["image"]}, corner)
            questions.append({"kind": kind, "image": record["image"], "question": question, "answer": true})
    return questions


def count_answer_tokens(processor: VWLMMProcessor, questions: list[dict]) -> int:
    """Tokens of the longest right answer, its end included."""
    answers = [question["answer"] for question in questions]
    return max(map(len, processor.tokenizer(answers, add_special_tokens=False).input_ids)) + 1


def measure_cognition(answers: list[str], questions: list[dict], grid: int = 8) -> dict[str, dict[str, float]]:
    """
    How near answers on pixels and on codebook indices come: they cannot be guessed, so that exact match says nothing.

    Args:
        answers (`list[str]`): The model's.
        questions (`list[dict]`): As [`make_cognition_questions`] makes them.
        grid (`int`, *optional*, defaults to 8): Rows and columns of an answer.

    Returns:
        `dict[str, dict[str, float]]`, by kind with `questions` and `unreadable`, answers that are no such table. For
        `pixel` also `mean_absolute_error`, of 255, over the readable ones (NaN if there are none), and
        `mean_colour_error`, what the true mean colour in place of each readable answer would have. For `index` also
        `accuracy`, over all: in an unreadable one no index is right.
    """
    measured = {}
    for kind, parse in (("pixel", parse_pixels), ("index", parse_indices)):
        pairs = [
            (parse(answer, grid), parse(question["answer"], grid))
            for answer, question in zip(answers, questions, strict=True)
            if question["kind"] == kind
        ]
        if not pairs:
            continue
        readable = [(found, true) for found, true in pairs if found is not None]
        measured[kind] = {"questions": len(pairs), "unreadable": len(pairs) - len(readable)}
        if kind == "index":
            right = sum((found == true).sum() for found, true in readable)
            measured[kind]["accuracy"] = float(right / (len(pairs) * grid**2))
        else:
            errors = [np.abs(found - true).mean() for found, true in readable]
            constant = [np.abs(true - true.mean(axis=(0, 1))).mean() for _, true in readable]
            measured[kind]["mean_absolute_error"] = float(np.mean(errors)) if errors else float("nan")
            measured[kind]["mean_colour_error"] = float(np.mean(constant)) if errors else float("nan")
    return measured


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


def main(arguments: list[str] | None = None) -> None:
    """Prints what is measured of the checkpoint that the command line, or `arguments` in its place, names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a VW-LMM checkpoint")
    parser.add_argument("data", help="folder that small_world.py wrote")
    parser.add_argument("--cognition", type=int, default=0, help="held-out images whose pixels are asked for")
    parser.add_argument("--grid", type=int, default=8, help="with --cognition: rows and columns of an answer")
    parser.add_argument("--indices", help="with --cognition: codebook indices of the images, a .npy file")
    args = parser.parse_args(arguments)
    if args.cognition < 0 or args.grid < 1 or (args.indices and not args.cognition):
        parser.error("--cognition is a number of images, --grid is positive, and --indices needs --cognition")
    records = read_held_out(args.data)
    indices = VQIndices(args.indices) if args.indices else None
    asked = make_cognition_questions(records[: args.cognition], args.grid, indices)  # before a model is loaded
    model = VWLMMForConditionalGeneration.from_pretrained(args.checkpoint)
    processor = VWLMMProcessor.from_pretrained(args.checkpoint)
    print(measure_answers(answer_questions(model, processor, records), records))
    for name, words in zip(("nearest tokens", "visual words"), read_patches(model, processor, records), strict=True):
        print(name, measure_patches(words, records))
    if asked:
        answers = answer_questions(model, processor, asked, count_answer_tokens(processor, asked))
        for kind, measures in measure_cognition(answers, asked, args.grid).items():
            print(f"{kind} questions", measures)


if __name__ == "__main__":
    main()
