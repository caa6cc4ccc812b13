# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The experiment: that every arm of the plan is a recipe that can run, that controls teach what they say, that a run
gives the same results again and after it was stopped, and that the report's intervals are Student's.
"""

import importlib
import json
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_image

from modeling_vwlmm import VWLMMForConditionalGeneration
from modeling_vwlmm.objectives_vwlmm import OBJECTIVES, find_supervised_positions, parse_objectives


yaml = pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
SETTING = {"data": {"captions": 1}, **{f"stage{stage}": {"json_file": "captions"} for stage in (1, 3, 4)}}
SHARPENED = ("sharpened", "sharpened_other_image", "sharpened_tenth")


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT / "examples" / "experiment")
    # Known while these tests run, and to no others of the process.
    controls = importlib.import_module("objectives")
    for objective in (controls.NoWords, controls.OtherImage, controls.UniformWords):
        OBJECTIVES.pop(objective.name, None)
        monkeypatch.setitem(OBJECTIVES, objective.name, objective)


@pytest.fixture
def run(in_root):
    return importlib.import_module("run")


@pytest.fixture
def plan(run) -> dict:
    return run.read_plan(run.PLAN)


@pytest.fixture
def tiny_plan(run, tmp_path) -> Path:
    """A file: two steps a stage, two arms, seven questions."""
    plan = yaml.safe_load(run.PLAN.read_text())
    plan["every_stage"] |= {"max_steps": 2, "global_batch_size": 4, "per_device_train_batch_size": 4}
    plan["settings"]["scarce"]["data"] = {"captions": 8, "conversations": 4, "images": 4}
    plan["questions"] = {"others": 1, "main": 4}  # in any order
    # 8 images at once, for as many patches as there are codes have to be kept.
    batch = {"max_steps": 6, "global_batch_size": 8, "per_device_train_batch_size": 8}
    plan["visual_tokenizer"]["data"] = {"captions": 8}
    plan["visual_tokenizer"]["changes"] |= batch
    plan["sizes"] = {"tiny": [{"setting": "scarce", "replicates": 1, "arms": ["visual_words", "codes"]}]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    return tmp_path / "plan.yaml"


class StopsEarly(ThreadPoolExecutor):
    """One that is interrupted when it has taken so many tasks."""

    def __init__(self, num_tasks):
        super().__init__(1)
        self.num_tasks = num_tasks

    def submit(self, *args):
        if not self.num_tasks:
            raise KeyboardInterrupt
        self.num_tasks -= 1
        return super().submit(*args)


class TestPlan:
    def test_each_arm_is_a_recipe(self, run, plan, tmp_path):
        train = importlib.import_module("train")
        for setting, lines in plan["settings"].items():
            for stage in [int(name.removeprefix("stage")) for name in lines if name.startswith("stage")]:
                for arm in plan["arms"] if stage == 4 else [None]:
                    changes = plan["arms"].get(arm, {})
                    start = tmp_path / "start" if stage > 1 else None
                    name = arm or f"stage{stage}"
                    recipe = run.write_recipe(plan, setting, stage, tmp_path, name, start, 7, changes)
                    data, args, model = train.parse_arguments(recipe)
                    assert args.stage == stage and args.seed == 7 and args.output_dir == str(tmp_path / name)
                    assert model.model_name_or_path == (None if start is None else str(start))
                    for entry in data.datasets:
                        file = Path(entry["json_file"]).name
                        assert file.split(".")[0] in lines["data"] and (".argmax." in file) == (arm == "argmax")
                        assert Path(entry["image_folder"]) == tmp_path / "data" / "images"
                    if arm is not None:
                        (objective,) = changes["visual_objective"]
                        assert args.get_visual_objective() == changes["visual_objective"]
                        assert objective in OBJECTIVES or objective == "reconstruction"
                        assert data.visual_word_temperature == (0.25 if arm in SHARPENED else None)
                        assert data.use_pseudo_image_features == (True if arm == "pseudo_image_features" else None)

    def test_what_is_compared_is_run(self, plan):
        for phases in plan["sizes"].values():
            arms = [set(phase["arms"]) for phase in phases]
            assert set.union(*arms) <= plan["arms"].keys()
            for phase in phases:  # widths of primary ones say when to stop
                assert "until" not in phase or any(set(pair) <= set(phase["arms"]) for pair in plan["primary"])
        arms = [set(phase["arms"]) for phase in plan["sizes"]["full"]]
        for pair in plan["primary"] + plan["comparisons"]:
            assert any(set(pair) <= together for together in arms)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"arms": ["sharp"]}, "A phase of bad has sharp, which the plan does not describe; expected"),
            ({"setting": "scarse"}, "A phase of bad has scarse, which the plan does not"),
            ({"until": {"half_width": 1.0, "at_least": 8, "step": 4, "at_most": 32}}, "has the arms of none"),
            ({"setting": "larger", "arms": ["codes"]}, "has codes in larger; expected a setting of the small world"),
            ({"arms": ["misspelt"]}, "recipe of misspelt in scarce cannot be read: Unknown .*--learning_rte"),
            ({"arms": ["unknown"]}, "recipe of unknown in scarce .*`visual_objective` is 'visual_wrods'; expected"),
            ({"arms": ["no_number"]}, "recipe of no_number in scarce .*learning_rate.*: invalid float value: 'high'"),
            ({"arms": ["no_heat"]}, "recipe of no_heat in scarce .*`visual_word_temperature` is 0"),
            ({"replicates": 0}, "replicates.*\n.*greater than 0"),
            ({"replicates": None}, "replicates.*\n.*should be"),
            ({"until": None, "replicates": 8}, "until\n.*should be"),
            ({"until": {"half_width": 1.0, "at_least": 8, "step": 4, "at_most": 9}, "replicates": 8}, "either"),
            ({"replicates": [3, 3]}, "3 stands there twice"),
            ({"arms": ["visual_words", "visual_words"]}, "visual_words stands there twice"),
            ({"arms": []}, "arms.*\n.*at least 1 item"),
            ({"arm": ["visual_words"]}, "arm\n *Extra inputs are not permitted"),
            ({"until": {"half_width": 1.0, "at_least": 8, "step": 0, "at_most": 9}}, "step.*\n.*greater than 0"),
            ({"until": {"half_width": 1.0, "at_least": 8, "step": 1, "at_most": 7}}, "`at_most` that is not below"),
        ],
    )
    def test_a_phase_that_would_fail_after_hours(self, run, tmp_path, changes, message):
        plan = yaml.safe_load(run.PLAN.read_text())
        plan["arms"] |= {"misspelt": {"learning_rte": 1e-3}, "unknown": {"visual_objective": {"visual_wrods": 1.0}}}
        plan["arms"] |= {"no_number": {"learning_rate": "high"}, "no_heat": {"visual_word_temperature": 0}}
        amount = {} if "until" in changes else {"replicates": 1}
        phase = {"setting": "scarce", "arms": ["visual_words"]} | amount | changes
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan | {"sizes": {"bad": [phase]}}))
        with pytest.raises(ValueError, match=message):
            run.main(["--plan", str(tmp_path / "plan.yaml"), "--size", "bad", "--output", str(tmp_path / "runs")])
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize(
        ("name", "lines", "message"),
        [
            ("arms", {"a": {"image_labels": "argmx"}}, "arms.a.image_labels"),
            ("arms", {"a": {"visual_tokenizer": False}}, "arms.a.visual_tokenizer"),
            ("arms", {"a": {"visual_tokenizer": None}}, "arms.a.visual_tokenizer"),
            ("arms", {"a": {"seed": 1}}, "seed is given to all recipes"),
            ("arms", {"a": {"stage": 2}}, "stage is given to all recipes"),
            ("arms", {"a": {"json_file": "captions"}}, "json_file is the same for all arms"),
            ("every_stage", {"output_dir": "runs"}, "output_dir is given to all recipes"),
            ("arms", {"stage3": {}}, "an arm is called stage3"),
            ("settings", {"s": {"data": {"captions": 1}, "stage1": {}, "stage_2": {}}}, "settings.s.stage_2"),
            ("settings", {"s": {"data": {"captions": 1, "image": 1}}}, "settings.s.data.image\n *Extra inputs"),
            ("settings", {"s": SETTING | {"stage1": {}}}, r"stage1 reads \[None\], of which `data` has nothing"),
            ("settings", {"s": SETTING | {"stage2": {"json_file": "captoins"}}}, r"stage2 reads \['captoins'\]"),
            ("settings", {"s": SETTING | {"stage4": {"datasets": [{"json_file": "images"}]}}}, r"\['images'\]"),
            ("changes", None, "changes"),
            ("changes", ["Today, another arm."], "changes.0"),
            ("sizes", {"quick": []}, "sizes.quick"),
            ("questions", {"main": 2100}, "questions.others"),
            ("held_out_look", [], "held_out_look"),
        ],
    )
    def test_a_line_that_is_none(self, run, tmp_path, name, lines, message):
        plan = yaml.safe_load(run.PLAN.read_text()) | {name: lines}
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        with pytest.raises(ValueError, match=message):
            run.read_plan(tmp_path / "plan.yaml")

    def test_a_look_that_no_scene_has(self, run, plan):
        plan["held_out_looks"] = [["red", "sqare"]]
        with pytest.raises(ValueError, match="`held_out_looks` has red sqare; expected one of red, .*triangle"):
            run.check_phases(plan, "quick")

    def test_results_that_were_cut(self, run, plan, tmp_path):
        (tmp_path / "results.json").write_text('{"plan": {')
        with pytest.raises(ValueError, match="results.json is not valid JSON .* Put a copy of it back"):
            run.open_results(tmp_path / "results.json", plan)

    def test_a_start_that_is_another_one(self, run, plan, tmp_path):
        results = {"plan": plan, "settings": {}}
        phase = run.Phase(plan, "scarce", ["visual_words"], tmp_path, results)
        for entropy in (1.7, 1.5):  # before an arm has started from it, it may be another one
            phase.store(7, None, {"entropy": {"all": entropy, "border": math.nan}})
        phase.store(7, "visual_words", {"main": {"all": 0.5}})
        phase.store(7, None, {"entropy": {"all": 1.5 + 1e-6, "border": math.nan}})
        message = r"replicate 7, measures entropy \(all\) 1.7; expected 1.5,.* name new `replicates`"
        with pytest.raises(ValueError, match=message):
            phase.store(7, None, {"entropy": {"all": 1.7, "border": math.nan}})

    def test_an_arm_that_fails_beside_others(self, run, plan, tmp_path, monkeypatch):
        """What others are at is stored, and nothing new is begun."""
        done = threading.Event()

        def run_arm(plan, setting, replicate, output, arm):
            if arm == "visual_words":
                raise OSError("no space left")
            done.wait(30)
            return {"main": {"all": 0.5}}

        monkeypatch.setattr(run, "run_arm", run_arm)
        monkeypatch.setattr(run, "run_start", lambda *args: {"entropy": {"all": 1.5}})
        monkeypatch.setattr(run, "print", lambda *args, **kwargs: "failed" in args[0] and done.set(), raising=False)
        results = {"plan": plan, "settings": {}}
        with ThreadPoolExecutor(2) as pool, pytest.raises(OSError, match="no space left"):
            run.Phase(plan, "scarce", ["visual_words", "sharpened", "argmax"], tmp_path, results).run(pool, 2, [0])
        assert results["settings"]["scarce"]["0"]["arms"] == {"sharpened": {"main": {"all": 0.5}}}
        assert json.loads((tmp_path / "results.json").read_text()) == results

    def test_a_comparison_of_an_arm_that_is_not_there(self, run, plan):
        plan["comparisons"] = [["visual_wrods", "language_alone"]]
        with pytest.raises(ValueError, match="compares visual_wrods; expected arms of language_alone"):
            run.check_phases(plan, "quick")

    def test_a_comparison_that_is_added_when_all_has_run_is_reported(self, run, plan, tmp_path):
        for changes, pairs in (([], []), (["Now: one more."], [["visual_words", "language_alone"]])):
            run.run_size(plan | {"sizes": {"none": []}, "changes": changes, "comparisons": pairs}, "none", tmp_path, 1)
            assert json.loads((tmp_path / "results.json").read_text())["plan"]["comparisons"] == pairs

    def test_two_runs_do_not_share_a_folder(self, run, tiny_plan, tmp_path, capsys):
        with run.FileLock(tmp_path / "results.lock"), pytest.raises(SystemExit):
            run.main(["--plan", str(tiny_plan), "--size", "tiny", "--output", str(tmp_path)])
        assert "another run writes to" in capsys.readouterr().err
        assert not (tmp_path / "results.json").exists()

    def test_more_replicates_by_width_alone(self, run, plan, tmp_path):
        def half_width(gain):
            exact = {"language_alone": [0.5, 0.5, 0.5], "visual_words": [0.5 + gain, 0.51 + gain, 0.52 + gain]}
            exact |= {"sharpened": exact["visual_words"], "sharpened_other_image": exact["language_alone"]}
            replicates = {
                str(n): {"arms": {arm: {"main": {"all": shares[n]}} for arm, shares in exact.items()}}
                for n in range(3)
            }
            results = {"plan": plan, "settings": {"scarce": replicates}}
            return run.Phase(plan, "scarce", [*exact], tmp_path, results).get_half_width(3)

        # Differences of 0, 1 and 2 points: a deviation of 1, and t = 4.3027 at two degrees of freedom.
        assert half_width(0) == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
        assert half_width(-0.3) == pytest.approx(half_width(0.3)) == pytest.approx(half_width(0))


class TestControls:
    """Against the same distributions by hand, for three pictures of which one comes twice."""

    @pytest.fixture
    def batch(self, run, processor):
        images = [make_image(seed) for seed in (0, 1, 1, 2)]
        texts = ["<image> a", "b <image><image> c", "d <image>"]
        inputs = processor(
            images=[[images[0]], images[1:3], [images[3]]],
            text=texts,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        return dict(inputs)

    def get_kl(self, model, batch, logits):
        """Summed KL of the words that `logits`, `[I, N, C]`, are, over image tokens with a token before them."""
        is_image = batch["input_ids"] == model.config.image_token_id  # [B, L]
        words = torch.zeros(*is_image.shape, logits.shape[-1])
        words[is_image] = logits.flatten(0, 1)
        at = is_image[:, 1:]
        predicted = model(**batch).logits[:, :-1][at].log_softmax(dim=-1)
        return F.kl_div(predicted, words[:, 1:][at].log_softmax(dim=-1), reduction="sum", log_target=True)

    @torch.no_grad()
    def test_other_image(self, model, batch):
        features = torch.stack(model.get_image_features(batch["pixel_values"]).image_features)  # [4, N, D]
        logits = model.model.vm_head(features[[1, 3, 3, 0]])  # the second of two copies is no other picture
        term = model(**batch, visual_objective={"other_image": 1.0}).terms["other_image"]
        torch.testing.assert_close(term.total, self.get_kl(model, batch, logits), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_other_objectives_see_the_images_as_they_are(self, model, batch):
        alone = model(**batch, visual_objective={"visual_words": 1.0}).terms["visual_words"]
        beside = model(**batch, visual_objective={"other_image": 1.0, "visual_words": 1.0}).terms["visual_words"]
        assert beside.total == alone.total

    @torch.no_grad()
    def test_uniform_words(self, model, batch):
        term = model(**batch, visual_objective={"uniform_words": 1.0}).terms["uniform_words"]
        logits = torch.zeros(4, model.config.image_seq_length, model.config.text_config.vocab_size)
        torch.testing.assert_close(term.total, self.get_kl(model, batch, logits), rtol=1e-4, atol=1e-4)

    def test_one_picture_has_no_other(self, model, processor, batch):
        alone = processor(images=[make_image(0), make_image(0)], text=["<image> a"] * 2, return_tensors="pt")
        with pytest.raises(ValueError, match="all of them the same picture"):
            model(**alone, visual_objective={"other_image": 1.0})

    def test_an_image_that_teaches_nothing_needs_no_other(self, model, processor):
        """As one that only fills up the last step of an epoch."""
        filler = processor(images=[make_image(0)], text=["<image> a"], return_tensors="pt")
        filler["labels"] = torch.full_like(filler["input_ids"], -100)
        objectives, _ = parse_objectives({"other_image": 1.0})
        found = find_supervised_positions(objectives, filler, model.config.image_token_id)
        found["by_objective"] = {name: positions[:0] for name, positions in found["by_objective"].items()}
        output = model(**filler, visual_objective={"other_image": 1.0}, supervised_positions=found)
        assert output.terms["other_image"].count == 0

    def test_no_words_teach_nothing(self, model, batch):
        output = model(**batch, labels=batch["input_ids"].clamp(max=9), visual_objective={"no_words": 1.0})
        torch.testing.assert_close(output.loss, output.terms["language"].total / output.terms["language"].count)
        model(**batch, visual_objective={"no_words": 1.0}).loss.backward()  # images alone have a gradient, too
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_data_hold_out(run, plan, tmp_path):
    """No combination that is held out is trained or asked for but in its own set, by the texts and by the labels."""
    looks = plan["held_out_looks"]
    run.write_training_data(tmp_path, {"captions": 60, "conversations": 20, "images": 20}, looks, 0)
    run.write_questions(tmp_path, 30, 12, looks)
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    captions = [record["conversations"][1]["value"] for record in records["captions"]]
    assert all(1 <= caption.count("at the") <= 3 for caption in captions)
    assert not any(" ".join(look) in caption for caption in captions for look in looks)

    def things(name):
        return [{tuple(words) for words in record["patch_words"] if len(words) == 3} for record in records[name]]

    held_out = {tuple(look) for look in looks}
    for name in ("main", "new_combinations", "more_objects", "noise"):
        shown = [{thing[:2] for thing in image} & held_out for image in things(name)]
        assert all(shown) if name == "new_combinations" else not any(shown)
    assert all(len(image) == 4 for image in things("more_objects"))
    assert all(len(image) <= 3 for image in things("main"))
    assert len(records["images"]) == 20 and all(len(record["conversations"]) == 1 for record in records["images"])
    # Labels: a third of the attributes each, which all captions but one or two name.
    for record, caption in zip(records["captions"], captions, strict=True):
        (labels,) = record["image_labels"]
        said = {label for label in labels if label not in (-100, "dark")}
        assert len(labels) == 64 and said and all(word in caption for word in said)


def test_same_results_again_and_after_a_stop(run, tiny_plan, tmp_path):
    options = ["--plan", str(tiny_plan), "--size", "tiny", "--processes", "1"]
    run.main([*options, "--output", str(tmp_path / "whole")])
    whole = (tmp_path / "whole" / "results.json").read_text()
    measured = json.loads(whole)["settings"]["scarce"]["0"]
    assert measured["arms"].keys() == {"visual_words", "codes"} and measured["stage3"]["kl"]["all"] > 0
    assert len({arm["main"]["nll"] for arm in measured["arms"].values()}) == 2
    assert measured["arms"]["visual_words"]["kl"]["all"] < measured["stage3"]["kl"]["all"]

    # In this process, and stopped behind the first arm; what is there is not run again.
    stopped, plan = tmp_path / "stopped", run.read_plan(tiny_plan)
    run.write_questions(stopped / "questions", 4, 1, plan["held_out_looks"])
    phase = plan["sizes"]["tiny"][0]
    with StopsEarly(3) as pool, pytest.raises(KeyboardInterrupt):  # the tokenizer, the start, and an arm
        results = run.open_results(stopped / "results.json", plan)
        run.Phase(plan, phase["setting"], phase["arms"], stopped, results).run(pool, 1, [0])
    assert list(json.loads((stopped / "results.json").read_text())["settings"]["scarce"]["0"]["arms"]) == [
        "visual_words"
    ]
    with StopsEarly(3) as pool:  # tokenizer and start, which are not trained again, and the other arm
        results = run.open_results(stopped / "results.json", plan)
        run.Phase(plan, phase["setting"], phase["arms"], stopped, results).run(pool, 1, [0])
    assert (stopped / "results.json").read_text() == whole

    plan["sizes"]["tiny"][0]["replicates"] = 2  # what is there stays, and the plan says what has changed
    with pytest.raises(ValueError, match="The plan has changed in sizes since .* do not say so"):
        run.open_results(stopped / "results.json", plan)
    plan["arms"]["another"] = {}  # as may an arm that has no results yet
    plan["changes"] = [*plan["changes"], "Now: two replicates, and another arm."]
    assert run.open_results(stopped / "results.json", plan) == {**json.loads(whole), "plan": plan}

    other = plan | {"arms": plan["arms"] | {"codes": {}}}  # one with results decides numbers
    with pytest.raises(ValueError, match="results of the plan .* choose another folder"):
        run.open_results(stopped / "results.json", other)
    plan["recipes"]["stage4"]["learning_rate"] *= 2  # a recipe decides numbers
    with pytest.raises(ValueError, match="results of the plan .* choose another folder"):
        run.open_results(stopped / "results.json", plan)
    (stopped / "results.json").unlink()  # what it has trained is there
    for folder in (stopped / "tokenizer", stopped / "scarce" / "00"):
        with pytest.raises(ValueError, match="results of the plan .* choose another folder"):
            run.is_done(folder, plan, None if folder.name == "tokenizer" else "scarce")


def test_labels_of_any_record(run, vicuna, model, processor, tmp_path, monkeypatch):
    """One row an image, the most probable words of just that image, and none where there is no image."""
    for seed in range(3):
        make_image(seed).save(tmp_path / f"{seed}.png")
    monkeypatch.setattr(run.label_images, "BATCH_SIZE", 2)
    answer = {"from": "gpt", "value": "b"}
    turns = [[{"from": "human", "value": f"{'<image>' * number} a"}, answer] for number in range(3)]
    records = [
        {"id": "a", "image": "0.png", "image_labels": [1], "conversations": turns[1]},  # labels that are none
        {"id": "b", "conversations": turns[0]},
        {"id": "c", "image": ["1.png", "2.png"], "conversations": turns[2]},
    ]
    (tmp_path / "in.json").write_text(json.dumps(records))
    run.label_images.main([vicuna, str(tmp_path / "in.json"), str(tmp_path), str(tmp_path / "out.json")])
    labelled = json.loads((tmp_path / "out.json").read_text())
    for record, seeds in zip(labelled, ([0], [], [1, 2]), strict=True):
        words = [processor(images=[make_image(seed)], return_tensors="pt") for seed in seeds]
        expected = [model.get_visual_words(**inputs).token_ids[0, :, 0].tolist() for inputs in words]
        assert record.get("image_labels", []) == expected

    for record, message in [
        ({"id": "d", "image": "none.png", "conversations": turns[1]}, "none.png is no readable image: the file does"),
        ({"id": "d", "image": "../0.png", "conversations": turns[1]}, "record 3 .*leaves the image folder"),
        (None, "record 3: found a value of type NoneType"),
    ]:
        (tmp_path / "in.json").write_text(json.dumps([*records, record]))
        with pytest.raises(ValueError, match=message):
            run.label_images.main([vicuna, str(tmp_path / "in.json"), str(tmp_path), str(tmp_path / "broken.json")])
    assert not (tmp_path / "broken.json").exists()  # nothing that looks whole


def test_no_labels_of_a_vm_head_that_may_be_random(run, vicuna, processor, tmp_path):
    model = VWLMMForConditionalGeneration.from_pretrained(vicuna, trained_stages=[1, 2])
    for part in (model, processor):
        part.save_pretrained(tmp_path / "stage2")
    with pytest.raises(ValueError, match=r"`trained_stages` are \[1, 2\]; expected 3 among them"):
        run.label_images.main([str(tmp_path / name) for name in ("stage2", "in.json", "images", "out.json")])


class TestReport:
    @pytest.fixture
    def results(self, plan):
        def measure(share):
            kinds = dict.fromkeys(["colour", "shape", "count", "exists", "where", "describe", "all"], share)
            main = {**kinds, "present_found": share, "absent_denied": share, "nll": 1 - share}
            return {"main": main, "kl": {"all": 2.0}} | {
                name: {"all": share} for name in ("new_combinations", "more_objects", "noise")
            }

        kinds = dict.fromkeys(["object", "border", "background", "all"], 1.0)
        replicates = {
            str(n): {
                "arms": {"language_alone": measure(0.5), "visual_words": measure(0.5 + n / 100)},
                "stage3": {"entropy": kinds, "kl": kinds, "kl_place": kinds},
            }
            for n in range(1, 5)
        }
        replicates["5"] = {"arms": {"language_alone": measure(0.1)}, "stage3": replicates["1"]["stage3"]}
        return {"plan": plan, "settings": {"scarce": replicates}}

    def test_interval_by_hand(self, results, tmp_path, capsys):
        """Differences of 1 to 4 points: mean 2.5, deviation 1.291, error 0.6455, t 3.1824. The fifth has no pair."""
        results["plan"] |= {"primary": [["visual_words", "language_alone"]], "comparisons": []}
        (tmp_path / "results.json").write_text(json.dumps(results))
        importlib.import_module("report").main([str(tmp_path / "results.json")])
        printed = capsys.readouterr().out
        row, each = [line for line in printed.splitlines() if line.startswith("| visual_words − language_alone")]
        assert each == "| visual_words − language_alone | +1.0, +2.0, +3.0, +4.0 |"
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:] == ["yes", "4", *["+2.5 ± 2.1"] * 6, "-0.025 ± 0.021"]
        (row,) = [line for line in printed.splitlines() if line.startswith("| language_alone")]
        assert row.split("|")[2].strip() == "5" and row.split("|")[9].strip() == "42.0%"
        assert (tmp_path / "report.md").read_text() == printed.removesuffix("\n")
        importlib.import_module("report").main([str(tmp_path / "results.json"), "--from_replicate", "3"])
        assert "| visual_words − language_alone | yes     | 2          | +3.5 ± 6.4" in capsys.readouterr().out
        assert (tmp_path / "report.md").read_text() == printed.removesuffix("\n")  # still that of all
        assert (tmp_path / "report.png").stat().st_size > 1000

    def test_of_few_questions(self, results, tmp_path, capsys):
        """A kind that was not asked has no column."""
        for record in results["settings"]["scarce"].values():
            for measured in record["arms"].values():
                del measured["main"]["describe"]
        (tmp_path / "results.json").write_text(json.dumps(results))
        importlib.import_module("report").main([str(tmp_path / "results.json"), "--from_replicate", "1"])
        printed = capsys.readouterr().out
        assert "| where " in printed and "| describe " not in printed


class TestLargerWorld:
    @pytest.fixture
    def scenes(self):
        world = importlib.import_module("larger_world")
        rng = random.Random(0)
        return [world.random_scene(rng) for _ in range(100)]

    def test_what_is_said_is_seen(self, scenes):
        for scene in scenes:
            pixels = np.asarray(scene.image())
            seen = scene.masks()
            assert sum(mask.astype(int) for mask in seen).max() == 1  # a pixel shows one thing
            assert (pixels[~np.logical_or.reduce(seen)] == scene.grey).all()
            for thing, mask in zip(scene.things, seen, strict=True):
                hidden = thing.mask() & ~mask
                assert thing.is_covered == hidden.any() and (not hidden.any() or hidden.sum() > 0.08 * mask.sum())
                assert (pixels[mask] == thing.rgb).all() == (thing.texture == "plain")
                assert {tuple(c) for c in pixels[mask]} <= {thing.rgb, tuple(round(0.45 * c) for c in thing.rgb)}
            words = scene.in_words(random.Random(1))
            assert {word for thing in scene.things for word in thing.words} == set(words) - {"dark"}
        assert {len(scene.things) for scene in scenes} == {1, 2, 3, 4, 5, 6}
        assert any(thing.is_covered for scene in scenes for thing in scene.things)

    def test_relations_are_those_of_the_picture(self, scenes):
        """By the middle of each thing: its row and its column, the nearest other in the direction first."""
        axes = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
        answers = set()
        for scene in scenes:
            middles = [np.argwhere(thing.mask()).mean(axis=0)[::-1] // (64 / 3, 32) for thing in scene.things]
            for thing, here in zip(scene.things, middles, strict=True):
                for direction, (axis, sign) in axes.items():
                    there = [
                        (sign * (other[axis] - here[axis]), found)
                        for other, found in zip(middles, scene.things, strict=True)
                        if other[1 - axis] == here[1 - axis] and sign * (other[axis] - here[axis]) > 0
                    ]
                    expected = min(there, key=lambda pair: pair[0])[1] if there else None
                    assert scene.find_next(thing, direction) is expected
            question, answer = scene.question("relation", random.Random(2))
            answers.add(answer == "nothing")
            assert answer == "nothing" or any(f"{t.place} the {t.colour} {t.shape}" in answer for t in scene.things)
        assert answers == {True, False}

    def test_its_data_are_written_as_those_of_the_small_world(self, run, plan, tmp_path):
        run.write_training_data(
            tmp_path, {"captions": 40, "conversations": 20, "images": 9}, [["red", "square"]], 0, "larger"
        )
        run.write_questions(tmp_path, 18, 9, [["red", "square"]], "larger")
        captions = json.loads((tmp_path / "captions.json").read_text())
        counts = {record["conversations"][1]["value"].count("at the") for record in captions}
        assert max(counts) == 5 and "red square" not in json.dumps(captions)
        assert {record["kind"] for record in json.loads((tmp_path / "main.json").read_text())} >= {
            "texture",
            "relation",
        }
        assert all(r["answer"] for r in json.loads((tmp_path / "more_objects.json").read_text()))
