"""
One data set, many supervisions: which targets at image positions help a decoder, and which harm it?

    python examples/experiment/run.py --size quick

`plan.yaml` says what is trained, asked and measured. Results of every arm of every replicate go to `results.json` in
the output folder, as soon as they are there: a run that was stopped goes on, and `full` goes on from `quick`.
`report.py` makes tables and a figure of them.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, in this process and in those it starts
sys.path.insert(0, str(Path(__file__).parents[1]))

import label_images
import objectives  # noqa: F401  makes the controls known
import torch
import train
import yaml
from data import get_world, write_questions, write_training_data
from evaluate import get_interval
from filelock import FileLock, Timeout
from measure import measure_arm, measure_words

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMVisualTokenizer
from processing_vwlmm import VWLMMProcessor


PLAN = Path(__file__).with_name("plan.yaml")


def main(arguments: list[str] | None = None) -> None:
    """Runs what of a size of the plan has no results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--size", default="quick", help="of the plan")
    parser.add_argument("--output", type=Path, default=Path("runs/experiment"))
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each")
    args = parser.parse_args(arguments)
    plan = read_plan(args.plan)
    if args.size not in plan["sizes"]:
        parser.error(f"--size is {args.size!r}; expected one of {', '.join(plan['sizes'])}")
    check_phases(plan, args.size)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(args.output / "results.lock", blocking=False):
            run_size(plan, args.size, args.output, args.processes)
    except Timeout:
        parser.error(f"another run writes to {args.output}; wait for its end, or choose another --output")


def check_phases(plan: dict[str, Any], size: str) -> None:
    """
    Raises:
        ValueError: If a phase of a size cannot be run to its end.
    """
    unknown = [arm for pair in plan["primary"] + plan["comparisons"] for arm in pair if arm not in plan["arms"]]
    if unknown:
        raise ValueError(f"The plan compares {', '.join(unknown)}; expected arms of {', '.join(plan['arms'])}.")
    for phase in plan["sizes"][size]:
        setting, arms = phase["setting"], phase["arms"]
        unknown = [name for name in arms if name not in plan["arms"]]
        if setting not in plan["settings"] or unknown:
            raise ValueError(
                f"A phase of {size} has {', '.join(unknown) or setting}, which the plan does not describe; expected "
                f"settings of {', '.join(plan['settings'])}, and arms of {', '.join(plan['arms'])}."
            )
        if "until" in phase and not any(set(pair) <= set(arms) for pair in plan["primary"]):
            raise ValueError(
                f"A phase of {size} in {setting} stops by the width of primary comparisons, and has the arms of none; "
                "expected those of one at least. Add them, or give it a number of `replicates`."
            )
        labels = {arm: plan["arms"][arm].get("image_labels", "true") for arm in arms}
        if wrong := {arm: name for arm, name in labels.items() if name not in ("true", True, "argmax")}:
            raise ValueError(f"`image_labels` of arms is {wrong}; expected `true`, those of the data, or `argmax`.")
        with_codes = [arm for arm in arms if "visual_tokenizer" in plan["arms"][arm]]
        if with_codes and get_world(plan, setting) != "small":
            raise ValueError(
                f"A phase of {size} has {', '.join(with_codes)} in {setting}; expected a setting of the small world, "
                "on which the visual tokenizer is trained."
            )


def run_size(plan: dict[str, Any], size: str, output: Path, num_processes: int) -> None:
    """Runs what of a size has no results yet."""
    results = open_results(output / "results.json", plan)
    write_results(output / "results.json", results)  # its comparisons may have changed where nothing is left to run
    for world in {get_world(plan, phase["setting"]) for phase in plan["sizes"][size]}:
        folder = get_questions(output, world)
        numbers = plan["questions"]
        write_questions(folder, numbers["main"], numbers["others"], plan["held_out_looks"], world)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, torch.set_num_threads, (1,)) as pool:
        for phase in plan["sizes"][size]:
            experiment = Phase(plan, phase["setting"], phase["arms"], output, results)
            if "until" not in phase:
                experiment.run(pool, num_processes, phase["replicates"])
                continue
            until = phase["until"]
            number = until["at_least"]
            experiment.run(pool, num_processes, number)
            while number < until["at_most"] and experiment.get_half_width(number) > until["half_width"]:
                number = min(number + until["step"], until["at_most"])
                experiment.run(pool, num_processes, number)


def read_plan(path: Path) -> dict[str, Any]:
    """A plan with the recipes that it builds on, which are a part of what is planned."""
    plan = yaml.safe_load(path.read_text())
    recipes = {f"stage{stage}": Path(plan["recipes"]) / f"stage{stage}.yaml" for stage in (1, 2, 3, 4)}
    recipes["visual_tokenizer"] = Path(plan["visual_tokenizer"]["recipe"])
    read = {name: yaml.safe_load(recipe.read_text()) for name, recipe in recipes.items()}
    read["stage4"].pop("visual_loss_weight", None)  # the demo's; arms say theirs
    return plan | {"recipes": read}


def get_questions(output: Path, world: str) -> Path:
    """Folder of the questions on scenes of a world."""
    return output / ("questions" if world == "small" else f"questions_{world}")


def fingerprint(plan: dict[str, Any], setting: str | None = None, arms: Iterable[str] = ()) -> str:
    """
    Of what decides the numbers of a replicate, and of some arms: not how many there are of either, nor what is
    compared.
    """
    names = ("recipes", "every_stage", "held_out_looks", "visual_tokenizer", "questions")
    decides = {name: plan[name] for name in names} | {"setting": plan["settings"].get(setting)}
    decides |= {"arms": {arm: plan["arms"].get(arm) for arm in arms}}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def open_results(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """
    The results that are there, or none yet.

    Raises:
        ValueError: If they are of another plan, or if this one has changed and does not say so.
    """
    if not path.exists():
        return {"plan": plan, "settings": {}}
    results = json.loads(path.read_text())
    for setting, done in results["settings"].items():
        arms = sorted({arm for record in done.values() for arm in record["arms"]})
        check_plan(path, fingerprint(results["plan"], setting, arms), plan, setting, arms)
    said, changed = results["plan"]["changes"], [name for name in plan if plan[name] != results["plan"].get(name)]
    if changed and (plan["changes"][: len(said)] != said or len(plan["changes"]) == len(said)):
        raise ValueError(
            f"The plan has changed in {', '.join(changed)} since {path} was written, and its `changes` do not say so; "
            "expected one more of them, with its time and its reason."
        )
    return results | {"plan": plan}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    path.with_suffix(".tmp").replace(path)


def check_plan(
    path: Path, found: str, plan: dict[str, Any], setting: str | None = None, arms: Iterable[str] = ()
) -> None:
    """
    Raises:
        ValueError: If what is at `path` has another fingerprint than the plan.
    """
    if found != (expected := fingerprint(plan, setting, arms)):
        raise ValueError(
            f"{path} has results of the plan {found}, and this is plan {expected}; expected the same. Replicates of "
            "two plans are not to be mixed: choose another folder with --output."
        )


def is_done(folder: Path, plan: dict[str, Any], setting: str | None = None) -> bool:
    """
    Whether a folder has been trained to its end.

    Raises:
        ValueError: If by another plan.
    """
    done = folder / "done"
    if done.exists():
        check_plan(folder, done.read_text(), plan, setting)
    return done.exists()


class Phase:
    """
    Some arms of a plan in one of its settings.

    Args:
        plan (`dict`): The plan.
        setting (`str`): Name of the setting.
        arms (`list[str]`): Names of the arms.
        output (`Path`): Folder of results, data and checkpoints.
        results (`dict`): Those that are there. New ones are added.
    """

    def __init__(
        self, plan: dict[str, Any], setting: str, arms: list[str], output: Path, results: dict[str, Any]
    ) -> None:
        self.plan, self.setting, self.arms, self.output, self.results = plan, setting, arms, output, results
        self.replicates = results["settings"].setdefault(setting, {})

    def run(self, pool: ProcessPoolExecutor, num_processes: int, num_replicates: int) -> None:
        """Runs what is missing of the first so many replicates. Arms come before the start of a next replicate."""
        if any("visual_tokenizer" in self.plan["arms"][arm] for arm in self.arms):
            pool.submit(make_tokenizer, self.plan, self.output).result()
        todo = [(replicate, None) for replicate in range(num_replicates) if self.find_missing(replicate)]
        running = {}
        while todo or running:
            while todo and len(running) < num_processes:
                replicate, arm = todo.pop(0)
                work = run_start if arm is None else run_arm
                job = pool.submit(work, self.plan, self.setting, replicate, self.output, *([arm] if arm else []))
                running[job] = replicate, arm
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                replicate, arm = running.pop(job)
                self.store(replicate, arm, job.result())
                if arm is None:
                    todo[:0] = [(replicate, missing) for missing in self.find_missing(replicate)]

    def find_missing(self, replicate: int) -> list[str]:
        """The arms that a replicate has no results of."""
        done = self.replicates.get(str(replicate), {}).get("arms", {})
        return [arm for arm in self.arms if arm not in done]

    def store(self, replicate: int, arm: str | None, measured: dict[str, Any]) -> None:
        """Adds results, and writes all of them."""
        record = self.replicates.setdefault(str(replicate), {"arms": {}})
        if arm is None:
            record["stage3"] = measured
        else:
            record["arms"][arm] = measured
            print(f"{self.setting}, replicate {replicate}, {arm}: {measured['main']['all']:.1%}", flush=True)
        write_results(self.output / "results.json", self.results)

    def get_half_width(self, num_replicates: int) -> float:
        """The widest of the primary comparisons of these arms, in points."""
        records = [self.replicates[str(replicate)]["arms"] for replicate in range(num_replicates)]
        exact = [{arm: measured["main"]["all"] for arm, measured in record.items()} for record in records]
        pairs = [pair for pair in self.plan["primary"] if set(pair) <= set(self.arms)]
        return max(get_interval([100 * (shares[a] - shares[b]) for shares in exact])[1] for a, b in pairs)


def run_start(plan: dict[str, Any], setting: str, replicate: int, output: Path) -> dict[str, Any]:
    """Writes a replicate's data, trains its stages up to III, unless that was done, and measures its visual words."""
    folder, begun, world = output / setting / f"{replicate:02d}", time.process_time(), get_world(plan, setting)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "start.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        if not is_done(folder, plan, setting):
            lines = plan["settings"][setting]
            write_training_data(folder / "data", lines["data"], plan["held_out_looks"], replicate, world)
            start = None
            for stage in [stage for stage in (1, 2, 3) if f"stage{stage}" in lines]:
                shutil.rmtree(folder / f"stage{stage}", ignore_errors=True)
                train.main(write_recipe(plan, setting, stage, folder, f"stage{stage}", start, replicate, {}))
                start = folder / f"stage{stage}"
            (folder / "done").write_text(fingerprint(plan, setting))
        measured = measure_words(folder / "stage3", get_questions(output, world))
        print(f"\n{time.process_time() - begun:.0f} seconds of processor time")
        return measured


def run_arm(plan: dict[str, Any], setting: str, replicate: int, output: Path, arm: str) -> dict[str, Any]:
    """Trains an arm from its replicate's stage III, and measures it. The checkpoint is deleted."""
    folder, lines, begun = output / setting / f"{replicate:02d}", plan["arms"][arm], time.process_time()
    with open(folder / f"{arm}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        start, trained = folder / "stage3", folder / arm
        shutil.rmtree(trained, ignore_errors=True)
        if lines.get("image_labels") == "argmax":
            stage4 = plan["settings"][setting]["stage4"]
            for data in [folder / "data" / entry["json_file"] for entry in stage4.get("datasets", [stage4])]:
                files = [f"{data}.json", str(folder / "data" / "images"), f"{data}.argmax.json"]
                label_images.main([str(start), *files])
        if "visual_tokenizer" in lines:
            start = add_tokenizer(output / "tokenizer", folder / "stage3", folder / f"{arm}_start")
        train.main(write_recipe(plan, setting, 4, folder, arm, start, replicate, lines))
        middle = time.process_time()
        measured = measure_arm(trained, get_questions(output, get_world(plan, setting)))
        shutil.rmtree(trained)
        print(f"\n{middle - begun:.0f} + {time.process_time() - middle:.0f} seconds of processor time")
        return measured


def write_recipe(
    plan: dict[str, Any],
    setting: str,
    stage: int,
    folder: Path,
    name: str,
    start: Path | None,
    seed: int,
    changes: dict[str, Any],
) -> list[str]:
    """
    Writes the recipe of a stage as the plan has it, with an arm's `changes`, and returns the arguments that name it.
    It trains `start` to `folder / name`, on data in `folder / "data"`.
    """
    recipe = dict(plan["recipes"][f"stage{stage}"])
    recipe |= plan["every_stage"] | plan["settings"][setting][f"stage{stage}"] | changes
    labels = recipe.pop("image_labels", "true")
    suffix = ".argmax.json" if labels == "argmax" else ".json"
    data = {"image_folder": str(folder / "data" / "images")}
    entries = recipe.pop("datasets", None) or [{"json_file": recipe["json_file"]}]
    entries = [{**entry, **data, "json_file": str(folder / "data" / entry["json_file"]) + suffix} for entry in entries]
    for key in ("json_file", "image_folder", "visual_tokenizer"):
        recipe.pop(key, None)
    recipe |= {"datasets": entries, "output_dir": str(folder / name), "seed": seed}
    if start is not None:
        recipe["model_name_or_path"] = str(start)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return ["--config", str(path)]


def make_tokenizer(plan: dict[str, Any], output: Path) -> None:
    """Trains the visual tokenizer whose codes an arm learns, if it is not there."""
    folder, lines = output / "tokenizer", plan["visual_tokenizer"]
    if is_done(folder, plan):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tokenizer.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        write_training_data(folder / "data", lines["data"], plan["held_out_looks"], "tokenizer")
        data = ["--json_file", str(folder / "data/captions.json"), "--image_folder", str(folder / "data/images")]
        parts = ["--language_model", "examples/small_world/llm", "--output_dir", str(folder)]
        options = [["--" + key, json.dumps(value)] for key, value in (plan["every_stage"] | lines["changes"]).items()]
        recipe = folder / "tokenizer.yaml"
        recipe.write_text(yaml.safe_dump(plan["recipes"]["visual_tokenizer"], sort_keys=False))
        train.main(["--config", str(recipe), *data, *parts, *sum(options, [])])
        (folder / "done").write_text(fingerprint(plan))


def add_tokenizer(tokenizer: Path, checkpoint: Path, folder: Path) -> Path:
    """
    Saves a checkpoint with a visual tokenizer and rows for its codes in embeddings and heads, and returns its folder.
    The rows that a checkpoint has stay as they are.
    """
    torch.manual_seed(0)  # draws the new rows
    old = VWLMMForConditionalGeneration.from_pretrained(checkpoint)
    config = VWLMMVisualTokenizer.from_pretrained(tokenizer).config
    text = "examples/small_world/llm"
    model = VWLMMForConditionalGeneration.from_visual_tokenizer(str(tokenizer), text, adapter="mlp", dtype=old.dtype)
    weights = model.state_dict()
    for name, weight in old.state_dict().items():
        if weights[name].shape == weight.shape:
            weights[name].copy_(weight)
        else:
            weights[name][: len(weight)] = weight
    model.config.trained_stages = old.config.trained_stages
    model.save_pretrained(folder)
    images = VWLMMProcessor.from_pretrained(checkpoint).image_processor
    processor = VWLMMProcessor.from_visual_tokenizer(config, text, images, chat_template="vicuna_v1")
    processor.image_start_token = processor.image_end_token = ""  # prompts are those of the other arms
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
