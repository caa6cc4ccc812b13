"""
The main job: VW-LMM goes through its four training stages, then answers questions about images it has never seen.

    make demo

It writes a small world in LLaVA's format, trains stage after stage with the recipes of `examples/recipes/small_world`,
adds the ablation "- visual modeling", and ends with two tables and a picture in `runs/small_world`.
"""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import train
from evaluate import answer_questions, draw, measure_answers, measure_patches, read_patches
from small_world import KINDS, read_held_out, write_llava_dataset

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor


RECIPES = Path("examples/recipes/small_world")
RUNS = Path("runs/small_world")
NUM_CAPTIONS, NUM_CONVERSATIONS = 4800, 3800


def main() -> None:
    """Writes the data, trains all stages, and measures."""
    start = time.monotonic()
    print("\n=== Writing the small world")
    write_llava_dataset(RUNS / "data", NUM_CAPTIONS, NUM_CONVERSATIONS)
    for stage, name in enumerate(("adapter", "decoder and adapter", "VM head", "decoder with visual words"), start=1):
        print(f"\n=== Stage {stage}: {name}")
        train.main(["--config", str(RECIPES / f"stage{stage}.yaml")])
    print("\n=== Stage 4 without its visual loss, for comparison")
    ablation = RUNS / "no_visual_modeling"
    train.main(["--config", str(RECIPES / "stage4.yaml"), "--visual_loss_weight", "0", "--output_dir", str(ablation)])

    print("\n=== Measuring on held-out images")
    records = read_held_out(RUNS / "data")
    processor = VWLMMProcessor.from_pretrained(RUNS / "stage4")
    accuracies, nearest = {}, {}
    for name, folder, asks in (
        ("stage I", RUNS / "stage1", False),
        ("stage II", RUNS / "stage2", True),
        ("- visual modeling", ablation, True),
        ("stage IV", RUNS / "stage4", True),
    ):
        model = VWLMMForConditionalGeneration.from_pretrained(folder)
        if asks:
            answers = answer_questions(model, processor, records)
            accuracies[name] = measure_answers(answers, records)
        nearest_tokens, visual_words = read_patches(model, processor, records)
        nearest[name] = measure_patches(nearest_tokens, records)
    draw_samples(records, nearest_tokens, visual_words, answers)

    model.config.use_pseudo_image_features = True
    accuracies["stage IV, pseudo image features"] = measure_answers(
        answer_questions(model, processor, records), records
    )

    tables = answer_table(accuracies, records) + "\n" + patch_table(nearest, measure_patches(visual_words, records))
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


def draw_samples(
    records: list[dict], nearest_tokens: np.ndarray, visual_words: np.ndarray, answers: list[str]
) -> None:
    """Draws one held-out image for each of four kinds of question: the first of its kind, right or wrong."""
    shown = [
        next(i for i, r in enumerate(records) if r["kind"] == k) for k in ("describe", "where", "count", "colour")
    ]
    draw(
        RUNS / "picture.png",
        [records[i] for i in shown],
        nearest_tokens[shown],
        visual_words[shown],
        [answers[i] for i in shown],
    )


def answer_table(accuracies: dict[str, dict[str, float]], records: list[dict]) -> str:
    """A table in Markdown of what `measure_answers` returns for each model."""
    asked = Counter(record["kind"] for record in records) | {"all": len(records)}
    rows = [
        [kind, str(asked[kind]), *(f"{accuracy[kind]:.1%}" for accuracy in accuracies.values())]
        for kind in (*KINDS, "all")
    ]
    return markdown_table(["exact match", "questions", *accuracies], rows)


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
