"""
VLSA on the small world: scenes of twice the resolution, with patterns that no snapshot shows. What do high resolution
in a fixed number of tokens (a), reconstruction (b) and pixels as text (c) add, each and together? The paper's table 3
in miniature, with VW-LMM's visual words besides.

    make demo-vlsa

It starts from stage II of `make demo`, which it trains if it is not there, then trains all arms with the recipe
`examples/recipes/small_world_vlsa/stage3.yaml`, two at once, and ends with a table and a picture in
`runs/small_world_vlsa`.
"""

import argparse
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import demo
import reconstruct
import torch
import train
from demo import log_to, make_pool, markdown_table
from evaluate import (
    answer_questions,
    count_answer_tokens,
    make_cognition_questions,
    measure_answers,
    measure_cognition,
)
from small_world import DETAIL_KINDS, read_held_out, write_detailed_dataset, write_llava_dataset
from transformers import AddedToken

from modeling_vwlmm import VWLMMForConditionalGeneration
from processing_vwlmm import VWLMMProcessor
from processing_vwlmm import cognition_alignment as cognition


RECIPES = Path("examples/recipes/small_world_vlsa")
RUNS = Path("runs/small_world_vlsa")
STAGE2 = demo.RUNS / "stage2"
NUM_CONVERSATIONS = 120 * 16
GRID = 2  # rows and columns of an answer about pixels
NUM_PIXEL_QUESTIONS = 60
MAX_PATCHES = 4

NO_RECONSTRUCTION = ["--visual_objective", "{}"]
PIXELS = ["--cognition_alignment", json.dumps({"pixel_share": 0.5, "index_share": 0, "grid": GRID})]


@dataclass(frozen=True)
class Arm:
    """
    One line of the table.

    Args:
        name (`str`): What it adds.
        folder (`str`): Of its checkpoint.
        reads_patches (`bool`): Whether it has the SA-Perceiver, and reads images in high resolution.
        options (`list[str]`, *optional*): What it has in place of the recipe's; without, it does not train.
        trains_vm_head (`bool`, *optional*, defaults to `False`): Whether the VM head learns before.
    """

    name: str
    folder: str
    reads_patches: bool
    options: list[str] | None
    trains_vm_head: bool = False


ARMS = (
    Arm("start: stage II, snapshot", "start_low", False, None),
    Arm("low resolution", "low", False, NO_RECONSTRUCTION),
    Arm("+ (a)", "a", True, NO_RECONSTRUCTION),
    Arm("+ (a)(b)", "ab", True, []),
    Arm("+ (c)", "c", False, [*NO_RECONSTRUCTION, *PIXELS]),
    Arm("+ (a)(b)(c)", "abc", True, PIXELS),
    Arm("+ (a), visual words", "a_visual_words", True, ["--visual_objective", '{"visual_words": 1.0}'], True),
)


def main() -> None:
    """Writes the data, makes what all arms start from, trains them, and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=42, help="of weights, order and noise; the data are the same")
    parser.add_argument("--output", type=Path, default=RUNS, help="folder of checkpoints, table and picture")
    parser.add_argument(
        "--arms", nargs="*", default=[arm.folder for arm in ARMS], help="by the folders of their names"
    )
    args = parser.parse_args()
    start = time.monotonic()
    print("\n=== Writing the grey world")
    write_detailed_dataset(RUNS / "data", NUM_CONVERSATIONS)
    make_starts(args.output, args.seed)

    arms = [arm for arm in ARMS if arm.folder in args.arms]
    print(f"\n=== Training and measuring {len(arms)} arms, two at once; they log to {args.output}/*.log", flush=True)
    # Those that take longest come first.
    order = sorted(arms, key=lambda arm: (arm.trains_vm_head, arm.options is not None and len(arm.options)))[::-1]
    with make_pool() as pool:
        futures = {arm.folder: pool.submit(run_arm, arm, args.output, args.seed) for arm in order}
        measured = {arm.name: futures[arm.folder].result() for arm in arms}
    table = make_table(measured)
    (args.output / "results.md").write_text(table)
    print(f"\n{table}")

    picture = args.output / "reconstructions.png"
    trained = next((arm for arm in arms if arm.folder == "ab"), None)
    if trained is not None:
        images = [record["image"] for record in read_held_out(RUNS / "data")]
        shown = [*images[:3], *images[len(images) // 3 :][:3]]  # of detail, and of twins
        reconstruct.main([str(args.output / trained.folder), *shown, "-o", str(picture)])
    print(f"All of it took {(time.monotonic() - start) / 60:.1f} minutes.")


def make_starts(output: Path, seed: int) -> None:
    """What arms start from: the small world's stage II as it is, and with a new SA-Perceiver, which adds nothing."""
    if not (STAGE2 / "config.json").exists():
        print("\n=== The small world's stages I and II")
        write_llava_dataset(demo.RUNS / "data", demo.NUM_CAPTIONS, demo.NUM_CONVERSATIONS, demo.NUM_QUESTIONS)
        for stage in (1, 2):
            train.main(["--config", str(demo.RECIPES / f"stage{stage}.yaml")])
    torch.manual_seed(seed)
    for folder, options, max_patches in (
        ("start_low", {}, None),
        ("start_high", {"adapter": "sa_perceiver", "adapter_config": {"max_patches": MAX_PATCHES}}, MAX_PATCHES),
    ):
        model = VWLMMForConditionalGeneration.from_pretrained(STAGE2, **options)
        processor = VWLMMProcessor.from_pretrained(STAGE2, max_patches=max_patches)
        add_words(model, processor)
        model.save_pretrained(output / folder)
        processor.save_pretrained(output / folder)


def add_words(model: VWLMMForConditionalGeneration, processor: VWLMMProcessor) -> None:
    """
    Adds a token for each word of the questions about pixels, which the small world's tokenizer spells letter by
    letter: that was half of their length.
    """
    texts = re.sub(r"{\w+}", "", " ".join(cognition.QUESTIONS["pixel"]))
    words = {word for word in re.findall(r"[A-Za-z]{2,}", texts) if len(processor.tokenizer.tokenize(word)) > 1}
    processor.tokenizer.add_tokens([AddedToken(word, lstrip=True, single_word=True) for word in sorted(words)])
    model.resize_token_embeddings(len(processor.tokenizer))


def run_arm(arm: Arm, output: Path, seed: int) -> dict[str, dict[str, float]]:
    """Trains an arm, and returns what `measure` does."""
    with log_to(output / f"{arm.folder}.log"):
        train_arm(arm, output, ["--seed", str(seed)])
        return measure(output / arm.folder)


def train_arm(arm: Arm, output: Path, options: list[str]) -> None:
    """Trains an arm, on its own settings and on `options` for all."""
    if arm.options is None:
        return
    begin = str(output / ("start_high" if arm.reads_patches else "start_low"))
    if arm.trains_vm_head:
        folder = str(output / f"{arm.folder}_vm_head")
        recipe = ["--config", str(RECIPES / "vm_head.yaml"), "--model_name_or_path", begin, "--output_dir", folder]
        train.main([*recipe, *options])
        begin = folder
    recipe = ["--config", str(RECIPES / "stage3.yaml"), "--model_name_or_path", begin]
    train.main([*recipe, "--output_dir", str(output / arm.folder), *arm.options, *options])


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Exact match by kind under `"answers"`, and of the answers about pixels what `measure_cognition` returns."""
    model = VWLMMForConditionalGeneration.from_pretrained(folder).eval()
    processor = VWLMMProcessor.from_pretrained(folder)
    records = read_held_out(RUNS / "data")
    answers = measure_answers(answer_questions(model, processor, records), records, DETAIL_KINDS)
    asked = make_cognition_questions(records[:NUM_PIXEL_QUESTIONS], GRID)
    tokens = count_answer_tokens(processor, asked)
    pixels = measure_cognition(answer_questions(model, processor, asked, tokens), asked, GRID)["pixel"]
    return {"answers": answers, "pixel": pixels}


def make_table(measured: dict[str, dict[str, dict[str, float]]]) -> str:
    """What `measure` returns for each arm, as a table in Markdown."""
    records = read_held_out(RUNS / "data")
    asked = {kind: sum(record["kind"] == kind for record in records) for kind in DETAIL_KINDS}
    header = [f"exact match, {asked['detail']} questions each", *DETAIL_KINDS]
    header += [f"pixel error of 255, {NUM_PIXEL_QUESTIONS} questions", "unreadable"]
    rows = []
    for name, measures in measured.items():
        pixel = measures["pixel"]
        is_readable = pixel["unreadable"] < pixel["questions"]
        rows.append(
            [
                name,
                *(f"{measures['answers'][kind]:.1%}" for kind in DETAIL_KINDS),
                f"{pixel['mean_absolute_error']:.1f} (mean colour {pixel['mean_colour_error']:.1f})"
                if is_readable
                else "",
                str(pixel["unreadable"]),
            ]
        )
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
