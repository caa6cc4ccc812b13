"""
One data set, many supervisions: which targets at image positions help a decoder, and which harm it?

    python examples/experiment/run.py --size quick

`plan.yaml` says what is trained, asked and measured. Results of every arm of every replicate go to `results.json` in
the output folder, as soon as they are there: a run that was stopped goes on, and `full` goes on from `quick`.
`report.py` makes tables and a figure of them.
"""

import argparse
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
import numpy as np
import torch
import train
from data import get_world, write_questions, write_training_data
from evaluate import get_interval
from filelock import FileLock, Timeout
from measure import measure_arm, measure_words
from plan import (
    PLAN,
    check_phases,
    check_plan,
    fingerprint,
    get_first_stages,
    read_plan,
    write_recipe,
    write_tokenizer_recipe,
)

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMVisualTokenizer
from processing_vwlmm import VWLMMProcessor


def main(arguments: list[str] | None = None) -> None:
    """Runs what of a size of the plan has no results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--size", default="quick", help="of the plan")
    parser.add_argument("--output", type=Path, default=Path("runs/experiment"))
    number = 1 if torch.cuda.is_available() else os.cpu_count()  # several would share one GPU
    parser.add_argument("--processes", type=int, default=number, help="of one thread each")
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


def run_size(plan: dict[str, Any], size: str, output: Path, num_processes: int) -> None:
    """Runs what of a size has no results yet."""
    results = open_results(output / "results.json", plan)
    write_results(output / "results.json", results)  # its comparisons may have changed where nothing is left to run
    for world in {get_world(plan, phase["setting"]) for phase in plan["sizes"][size]}:
        folder = get_question_folder(output, world)
        numbers = plan["questions"]
        write_questions(folder, numbers["main"], numbers["others"], plan["held_out_looks"], world)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, torch.set_num_threads, (1,)) as pool:
        for phase in plan["sizes"][size]:
            experiment = Phase(plan, phase["setting"], phase["arms"], output, results)
            if "until" not in phase:
                replicates = phase["replicates"]
                experiment.run(pool, num_processes, range(replicates) if isinstance(replicates, int) else replicates)
                continue
            until = phase["until"]
            number = until["at_least"]
            experiment.run(pool, num_processes, range(number))
            while number < until["at_most"] and experiment.get_half_width(number) > until["half_width"]:
                number = min(number + until["step"], until["at_most"])
                experiment.run(pool, num_processes, range(number))


def get_question_folder(output: Path, world: str) -> Path:
    """Folder of the questions on scenes of a world."""
    return output / ("questions" if world == "small" else f"questions_{world}")


def open_results(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """
    The results that are there, or none yet.

    Raises:
        ValueError: If they are of another plan, or if this one has changed and does not say so.
    """
    if not path.exists():
        return {"plan": plan, "settings": {}}
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); expected the results of a run. Put a copy of it back, or delete it "
            "to begin anew."
        ) from error
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

    def run(self, pool: ProcessPoolExecutor, num_processes: int, replicates: Iterable[int]) -> None:
        """Runs what is missing of some replicates. Arms come before the start of a next replicate."""
        if any("visual_tokenizer" in self.plan["arms"][arm] for arm in self.arms):
            pool.submit(make_tokenizer, self.plan, self.output).result()
        todo = [(replicate, None) for replicate in replicates if self.find_missing(replicate)]
        running, failed = {}, None
        while todo or running:
            while todo and len(running) < num_processes:
                replicate, arm = todo.pop(0)
                work = run_start if arm is None else run_arm
                job = pool.submit(work, self.plan, self.setting, replicate, self.output, *([arm] if arm else []))
                running[job] = replicate, arm
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                replicate, arm = running.pop(job)
                try:
                    self.store(replicate, arm, job.result())
                except Exception as error:  # what others are at is still to be stored
                    print(f"{self.setting}, replicate {replicate}, {arm or 'start'}: failed, {error}", flush=True)
                    failed, todo = failed or error, []
                else:
                    if arm is None and failed is None:
                        todo[:0] = [(replicate, missing) for missing in self.find_missing(replicate)]
        if failed is not None:
            raise failed

    def find_missing(self, replicate: int) -> list[str]:
        """The arms that a replicate has no results of."""
        done = self.replicates.get(str(replicate), {}).get("arms", {})
        return [arm for arm in self.arms if arm not in done]

    def store(self, replicate: int, arm: str | None, measured: dict[str, Any]) -> None:
        """
        Adds results, and writes all of them.

        Raises:
            ValueError: If a start is not the one that arms of its replicate have started from.
        """
        record = self.replicates.setdefault(str(replicate), {"arms": {}})
        if arm is None:
            if record["arms"]:
                self.check_start(replicate, record["stage3"], measured)
            else:
                record["stage3"] = measured
        else:
            record["arms"][arm] = measured
            print(f"{self.setting}, replicate {replicate}, {arm}: {measured['main']['all']:.1%}", flush=True)
        write_results(self.output / "results.json", self.results)

    def check_start(self, replicate: int, known: dict[str, Any], measured: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: If two stages III do not measure the same. Digits may differ, by the device that measures.
        """
        for name, row in known.items():
            for kind, value in row.items():
                if not np.isclose(measured[name][kind], value, rtol=1e-3, atol=1e-3, equal_nan=True):
                    raise ValueError(
                        f"Stage III of {self.setting}, replicate {replicate}, measures {name} ({kind}) "
                        f"{measured[name][kind]}; expected {value}, as of the one from which arms in the results "
                        "started, for arms of one replicate are compared. Trained again on another processor, or with "
                        "another version of torch, it ends elsewhere: go on where the first was trained, or name new "
                        "`replicates` in the plan."
                    )

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
            sizes = plan["settings"][setting]["data"]
            write_training_data(folder / "data", sizes, plan["held_out_looks"], replicate, world)
            start = None
            for stage in get_first_stages(plan, setting):
                shutil.rmtree(folder / f"stage{stage}", ignore_errors=True)
                train.main(write_recipe(plan, setting, stage, folder, f"stage{stage}", start, replicate, {}))
                start = folder / f"stage{stage}"
            (folder / "done").write_text(fingerprint(plan, setting))
        measured = measure_words(folder / "stage3", get_question_folder(output, world))
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
                files = [f"{data}.json", str(folder / "data" / "images"), f"{data}.{arm}.json"]
                label_images.main([str(start), *files])
        if "visual_tokenizer" in lines:
            language_model = plan["recipes"]["stage1"]["language_model"]
            start = add_tokenizer(output / "tokenizer", folder / "stage3", language_model, folder / f"{arm}.start")
        train.main(write_recipe(plan, setting, 4, folder, arm, start, replicate, lines))
        middle = time.process_time()
        measured = measure_arm(trained, get_question_folder(output, get_world(plan, setting)))
        shutil.rmtree(trained)
        if start != folder / "stage3":
            shutil.rmtree(start)
        print(f"\n{middle - begun:.0f} + {time.process_time() - middle:.0f} seconds of processor time")
        return measured


def make_tokenizer(plan: dict[str, Any], output: Path) -> None:
    """Trains the visual tokenizer whose codes an arm learns, if it is not there."""
    folder = output / "tokenizer"
    if is_done(folder, plan):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tokenizer.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        sizes = plan["visual_tokenizer"]["data"]
        write_training_data(folder / "data", sizes, plan["held_out_looks"], "tokenizer")
        train.main(write_tokenizer_recipe(plan, folder))
        (folder / "done").write_text(fingerprint(plan))


def add_tokenizer(tokenizer: Path, checkpoint: Path, text: str, folder: Path) -> Path:
    """
    Saves a checkpoint with a visual tokenizer and rows for its codes in embeddings and heads of the LLM `text`, and
    returns its folder.
    The rows that a checkpoint has stay as they are.
    """
    torch.manual_seed(0)  # draws the new rows
    old = VWLMMForConditionalGeneration.from_pretrained(checkpoint)
    config = VWLMMVisualTokenizer.from_pretrained(tokenizer).config
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
