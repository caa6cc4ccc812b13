"""
The main job: VW-LMM goes through its four training stages, then answers questions about images it has never seen.

    make demo

It writes a small world in LLaVA's format, trains stage after stage with the recipes of `examples/recipes/small_world`,
adds the paper's ablations "- visual modeling" and pseudo image features, and ends with three tables and a picture in
`runs/small_world`.

    .venv/bin/python examples/demo.py --choose

tries lines of the recipes on a validation split, which the tables of the demo are not about: the learning rate and
passes of stage III, and the weight of stage IV's visual loss.
"""

import argparse
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import train
from evaluate import answer_questions, get_interval, measure_answers, measure_patches, read_patches
from small_world import KINDS, read_held_out, write_llava_dataset

from modeling_vwlmm import VWLMMForConditionalGeneration
from modeling_vwlmm.inspection import inspect_image
from modeling_vwlmm.visualization import draw_visual_words
from processing_vwlmm import VWLMMProcessor


RECIPES = Path("examples/recipes/small_world")
RUNS = Path("runs/small_world")
NUM_CAPTIONS, NUM_CONVERSATIONS, NUM_QUESTIONS = 4000, 3200, 2400
STAGES = ("adapter", "decoder and adapter", "VM head")  # before stage IV, and what each trains
NO_VISUAL_MODELING, STAGE4, PSEUDO = "- visual modeling", "stage IV", "stage IV, pseudo image features"
# Of stage IV: name, folder, and what each has in place of the recipe's lines.
ARMS = {
    NO_VISUAL_MODELING: ("no_visual_modeling", ["--visual_loss_weight", "0"]),
    STAGE4: ("stage4", []),
    PSEUDO: ("pseudo_image_features", ["--use_pseudo_image_features", "true"]),
}
COMPARISONS = ((STAGE4, NO_VISUAL_MODELING), (STAGE4, "stage II"), (PSEUDO, STAGE4))

# What `--choose` tries: learning rates and passes of stage III, and weights in stage IV.
CHOICES = (("1e-3", "1"), ("5e-3", "1"), ("2e-3", "2"), ("5e-3", "2"))
WEIGHTS = (0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Reading:
    """
    What a checkpoint says of the held-out images.

    Args:
        answers (`list[str]`): To their questions; empty if it was not asked.
        nearest_tokens (`np.ndarray` of shape `[I, N]`): One word a patch.
        visual_words (`np.ndarray` of shape `[I, N]`): The most probable ones.
    """

    answers: list[str]
    nearest_tokens: np.ndarray
    visual_words: np.ndarray


def main() -> None:
    """Writes the data, trains all stages, and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="try lines of recipes on a validation split, see above")
    is_choosing = parser.parse_args().choose
    start = time.monotonic()
    print("\n=== Writing the small world")
    write_llava_dataset(RUNS / "data", NUM_CAPTIONS, NUM_CONVERSATIONS, NUM_QUESTIONS)
    for stage, name in enumerate(STAGES[:2] if is_choosing else STAGES, start=1):
        print(f"\n=== Stage {stage}: {name}")
        train.main(["--config", str(RECIPES / f"stage{stage}.yaml")])
    if is_choosing:
        choose()
        return

    print(f"\n=== Stage 4, {', '.join(ARMS)}, and measuring: two at once, which log to {RUNS}/*.log", flush=True)
    records = read_held_out(RUNS / "data")
    with make_pool() as pool:
        training = {name: pool.submit(train_stage4, folder, options) for name, (folder, options) in ARMS.items()}
        jobs = {"stage I": pool.submit(read, "stage1", asks=False), "stage II": pool.submit(read, "stage2")}
        for name, job in training.items():
            job.result()
            jobs[name] = pool.submit(read, ARMS[name][0])
        readings = {name: job.result() for name, job in jobs.items()}
    draw_samples(records, readings[STAGE4].answers)
    asked = {name: reading.answers for name, reading in readings.items() if reading.answers}
    nearest = {name: measure_patches(reading.nearest_tokens, records) for name, reading in readings.items()}
    del nearest[PSEUDO]  # its adapter is that of the others
    tables = "\n".join(
        (
            answer_table({name: measure_answers(answers, records) for name, answers in asked.items()}, records),
            difference_table(asked, records),
            patch_table(nearest, measure_patches(readings[STAGE4].visual_words, records)),
        )
    )
    (RUNS / "results.md").write_text(tables)
    print(
        f"\n{tables}\n"
        f"Picture:    {RUNS / 'picture.png'}\n"
        f"Checkpoint: {RUNS / 'stage4'}, loaded by\n\n"
        "    from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f'    model = AutoModelForImageTextToText.from_pretrained("{RUNS / "stage4"}", trust_remote_code=True)\n'
        f'    processor = AutoProcessor.from_pretrained("{RUNS / "stage4"}", trust_remote_code=True)\n\n'
        f"All of it took {(time.monotonic() - start) / 60:.1f} minutes."
    )


def make_pool() -> ProcessPoolExecutor:
    """Two processes with a half of the cores each."""
    num_threads = max((os.cpu_count() or 1) // 2, 1)
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), torch.set_num_threads, (num_threads,))


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Writes to a file what is printed meanwhile."""
    with open(path, "w") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def train_stage4(folder: str, options: list[str]) -> None:
    """Trains stage IV with some lines in place of the recipe's."""
    with log_to(RUNS / f"{folder}.log"):
        train.main(["--config", str(RECIPES / "stage4.yaml"), *options, "--output_dir", str(RUNS / folder)])


def read(folder: str, data: str = "data", asks: bool = True) -> Reading:
    """What a checkpoint says of the held-out images of `data`."""
    with log_to(RUNS / f"{folder}.reading.log"):
        model = VWLMMForConditionalGeneration.from_pretrained(RUNS / folder).eval()
        processor = VWLMMProcessor.from_pretrained(RUNS / folder)
        records = read_held_out(RUNS / data)
        answers = answer_questions(model, processor, records) if asks else []
        return Reading(answers, *read_patches(model, processor, records))


def choose() -> None:
    """Prints what stages III make of visual words, and stages IV of answers, on a validation split."""
    write_llava_dataset(RUNS / "validation", 0, 0, NUM_QUESTIONS, seed=1)
    records = read_held_out(RUNS / "validation")
    runs = find_choices()
    with make_pool() as pool:
        list(pool.map(choose_stage3, *zip(*CHOICES, strict=True)))
        folders = [f"stage4_{start}_{weight}" for start, weight in runs]
        list(pool.map(train_stage4, folders, runs.values()))
        readings = dict(zip(runs, pool.map(read, folders, ["validation"] * len(folders)), strict=True))
    right = {run: measure_answers(reading.answers, records)["all"] for run, reading in readings.items()}
    rows = []
    for rate, passes in CHOICES:
        start = name_stage3(rate, passes)
        words = measure_patches(readings[start, WEIGHTS[0]].visual_words, records)["attribute"]
        rows.append([rate, passes, f"{words:.1%}", *(f"{right[start, weight]:.1%}" for weight in WEIGHTS)])
    header = ["stage III", "passes", "a true attribute", *(f"exact match, weight {weight}" for weight in WEIGHTS)]
    print(f"\n{NUM_QUESTIONS} validation questions; without visual loss {right['stage2', 0]:.1%}\n")
    print(markdown_table(header, rows))


def find_choices() -> dict[tuple[str, float], list[str]]:
    """The stages IV that `--choose` tries: what each starts from, how its visual loss weighs, and its options."""
    starts = [("stage2", 0)]  # without a visual loss nothing reads the VM head
    starts += [(name_stage3(rate, passes), weight) for rate, passes in CHOICES for weight in WEIGHTS]
    return {
        (start, weight): ["--visual_loss_weight", str(weight), "--model_name_or_path", str(RUNS / start)]
        for start, weight in starts
    }


def name_stage3(rate: str, passes: str) -> str:
    """The folder of a stage III of `CHOICES`."""
    return f"stage3_{rate}_{passes}"


def choose_stage3(rate: str, passes: str) -> None:
    """Trains a stage III of `CHOICES`."""
    folder = RUNS / name_stage3(rate, passes)
    with log_to(folder.with_name(f"{folder.name}.log")):
        options = ["--learning_rate", rate, "--num_train_epochs", passes, "--output_dir", str(folder)]
        train.main(["--config", str(RECIPES / "stage3.yaml"), *options])


def draw_samples(records: list[dict], answers: list[str]) -> None:
    """
    Draws what stage IV says of one held-out image for each of four kinds of question: the first of its kind, answered
    rightly or wrongly.
    """
    model = VWLMMForConditionalGeneration.from_pretrained(RUNS / "stage4").eval()
    processor = VWLMMProcessor.from_pretrained(RUNS / "stage4")
    images, captions = [], []
    for kind in ("describe", "where", "count", "colour"):
        record, answer = next(pair for pair in zip(records, answers, strict=True) if pair[0]["kind"] == kind)
        images.append(inspect_image(model, processor, record["image"]))
        verdict = "right" if answer == record["answer"] else f"wrong, it is: {record['answer']}"
        captions.append(f"{record['question']}\n{answer} ({verdict})")
    figure = draw_visual_words(images, ("image", "nearest_tokens", "visual_words"), captions)
    figure.savefig(RUNS / "picture.png", dpi=90)


def answer_table(accuracies: dict[str, dict[str, float]], records: list[dict]) -> str:
    """A table in Markdown of what `measure_answers` returns for each model."""
    asked = Counter(record["kind"] for record in records) | {"all": len(records)}
    rows = [
        [kind, str(asked[kind]), *(f"{accuracy[kind]:.1%}" for accuracy in accuracies.values())]
        for kind in (*KINDS, "all")
    ]
    return markdown_table(["exact match", "questions", *accuracies], rows)


def difference_table(answers: dict[str, list[str]], records: list[dict]) -> str:
    """A table in Markdown of `COMPARISONS`: points of exact match, paired by question, with a 95 % interval."""
    right = {
        name: np.array([answer == record["answer"] for answer, record in zip(given, records, strict=True)])
        for name, given in answers.items()
    }
    rows = []
    for first, second in COMPARISONS:
        mean, half_width = get_interval(100.0 * right[first] - 100.0 * right[second])
        interval = f"{mean - half_width:+.1f} to {mean + half_width:+.1f}"
        rows.append([f'"{first}" minus "{second}"', str(len(records)), f"{mean:+.1f}", interval])
    return markdown_table(["points of exact match", "questions", "difference", "95 % interval"], rows)


def patch_table(nearest: dict[str, dict[str, float]], visual: dict[str, float]) -> str:
    """A table in Markdown of what `measure_patches` returns: of nearest tokens for each model, and of visual words."""
    measures = {
        "attribute": "object patches: a true attribute of the object",
        "shuffled": "the same with the images shuffled",
        "background": 'background patches: "dark"',
        "separated": "object told from background",
    }
    rows = [
        [text, *(f"{shares[measure]:.1%}" for shares in (*nearest.values(), visual))]
        for measure, text in measures.items()
    ]
    return markdown_table(["patches", *(f"nearest token, {name}" for name in nearest), "visual word"], rows)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


if __name__ == "__main__":
    main()
