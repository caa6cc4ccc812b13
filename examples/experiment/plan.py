"""
A plan: what it may say, and what of it decides the numbers of a replicate.

A fault that would show after hours is found before the first step: the form is checked, each recipe is parsed, and
what is compared has to be there.
"""

import hashlib
import io
import json
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Annotated, Any, Literal

import objectives  # noqa: F401  makes the controls known
import yaml
from data import WORLDS, get_world
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from train import parse_arguments, read_config_changes


PLAN = Path(__file__).with_name("plan.yaml")
# What recipes are given here, so that a plan cannot say it; and names of a replicate's folders that are no arm's.
GIVEN = ("stage", "seed", "image_folder", "output_dir", "model_name_or_path")
TAKEN = ("data", "start", "stage1", "stage2", "stage3")


def refuse_given(lines: dict[str, Any]) -> dict[str, Any]:
    """Lines of a recipe, unless one of them would be overwritten."""
    if given := [name for name in lines if name in GIVEN]:
        raise ValueError(f"{', '.join(given)} is given to all recipes by the run; leave it out")
    return lines


Lines = Annotated[dict[str, Any], AfterValidator(refuse_given)]
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class Form(BaseModel):
    """What may be left out has a default, and None is none."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Data(Form):
    captions: PositiveInt
    conversations: NonNegativeInt = 0
    images: NonNegativeInt = 0


class Setting(Form):
    world: Literal["small", "larger"] = "small"
    data: Data
    stage1: Lines
    stage2: Lines = {}
    stage3: Lines
    stage4: Lines

    @model_validator(mode="after")
    def check(self) -> "Setting":
        for name in [name for name in ("stage1", "stage2", "stage3", "stage4") if name in self.model_fields_set]:
            lines = getattr(self, name)
            files = [entry.get("json_file") for entry in lines.get("datasets", [lines])]
            if missing := [file for file in files if not getattr(self.data, str(file), 0)]:
                raise ValueError(f"{name} reads {missing}, of which `data` has nothing")
        return self


class Arm(Form):
    """Any line of a recipe, beside which labels of images the arm learns from, and whether codes."""

    model_config = ConfigDict(extra="allow")
    image_labels: Literal[True, "argmax"] = True
    visual_tokenizer: Literal[True] = True

    @model_validator(mode="after")
    def check(self) -> "Arm":
        refuse_given(self.model_extra)
        if data := [name for name in ("json_file", "datasets") if name in self.model_extra]:
            raise ValueError(f"{', '.join(data)} is the same for all arms of a replicate; leave it out")
        return self


class Tokenizer(Form):
    recipe: str
    data: Data
    changes: Lines


class Questions(Form):
    main: PositiveInt
    others: PositiveInt


class Until(Form):
    half_width: PositiveFloat
    at_least: Annotated[int, Field(ge=2)]  # one replicate has no interval
    step: PositiveInt
    at_most: PositiveInt

    @model_validator(mode="after")
    def check(self) -> "Until":
        if self.at_most < self.at_least:
            raise ValueError("expected an `at_most` that is not below `at_least`")
        return self


class Phase(Form):
    setting: str
    arms: Annotated[list[str], Field(min_length=1)]
    replicates: PositiveInt | Annotated[list[NonNegativeInt], Field(min_length=1)] = 0
    until: Until = None

    @model_validator(mode="after")
    def check(self) -> "Phase":
        if len({"replicates", "until"} & self.model_fields_set) != 1:
            raise ValueError("expected either `replicates` or `until`")
        names = self.arms + (self.replicates if isinstance(self.replicates, list) else [])
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{', '.join(map(str, twice))} stands there twice")
        return self


class Plan(Form):
    changes: list[Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}")]]
    recipes: str
    every_stage: Lines
    held_out_looks: list[Pair]
    settings: dict[str, Setting]
    arms: dict[str, Arm]
    visual_tokenizer: Tokenizer
    primary: list[Pair]
    comparisons: list[Pair]
    questions: Questions
    sizes: dict[str, Annotated[list[Phase], Field(min_length=1)]]

    @model_validator(mode="after")
    def check(self) -> "Plan":
        if taken := [name for name in self.arms if name in TAKEN]:
            raise ValueError(f"an arm is called {', '.join(taken)}, as something else of a replicate is")
        return self


def read_plan(path: Path) -> dict[str, Any]:
    """
    A plan with the recipes that it builds on, which are a part of what is planned.

    Raises:
        ValueError: If it is not of the form of a plan. All places that are not are named.
    """
    plan = yaml.safe_load(path.read_text())
    Plan.model_validate(plan)
    recipes = {f"stage{stage}": Path(plan["recipes"]) / f"stage{stage}.yaml" for stage in (1, 2, 3, 4)}
    recipes["visual_tokenizer"] = Path(plan["visual_tokenizer"]["recipe"])
    read = {name: yaml.safe_load(recipe.read_text()) for name, recipe in recipes.items()}
    read["stage4"].pop("visual_loss_weight", None)  # the demo's; arms say theirs
    return plan | {"recipes": read}


def check_phases(plan: dict[str, Any], size: str) -> None:
    """
    Raises:
        ValueError: If a phase of a size cannot be run to its end, or what is compared is not there.
    """
    arms = [arm for pair in plan["primary"] + plan["comparisons"] for arm in pair]
    if unknown := sorted({arm for arm in arms if arm not in plan["arms"]}):
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
        world = get_world(plan, setting)
        with_codes = [arm for arm in arms if "visual_tokenizer" in plan["arms"][arm]]
        if with_codes and world != "small":
            raise ValueError(
                f"A phase of {size} has {', '.join(with_codes)} in {setting}; expected a setting of the small world, "
                "on which the visual tokenizer is trained."
            )
        colours, shapes = WORLDS[world].COLOURS, WORLDS[world].SHAPES
        for colour, shape in plan["held_out_looks"]:
            if colour not in colours or shape not in shapes:
                raise ValueError(
                    f"`held_out_looks` has {colour} {shape}; expected one of {', '.join(colours)} with one of "
                    f"{', '.join(shapes)}."
                )
        with tempfile.TemporaryDirectory() as name:
            folder, start = Path(name), Path("stage3")
            for stage in get_first_stages(plan, setting):
                recipe = write_recipe(plan, setting, stage, folder, f"stage{stage}", None, 0, {})
                _check_recipe(f"stage {stage} of {setting}", recipe)
            for arm in arms:
                recipe = write_recipe(plan, setting, 4, folder, arm, start, 0, plan["arms"][arm])
                _check_recipe(f"{arm} in {setting}", recipe)
            if with_codes:
                _check_recipe("the visual tokenizer", write_tokenizer_recipe(plan, folder))


def _check_recipe(name: str, arguments: list[str]) -> None:
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):  # what the parser of a command line says before it leaves
            data, args, _ = parse_arguments(arguments)
        read_config_changes(data, args.trains_tokenizer)
    except (ValueError, SystemExit) as error:
        said = printed.getvalue().strip().splitlines()[-1] if isinstance(error, SystemExit) else error
        raise ValueError(f"The recipe of {name} cannot be read: {said}") from error


def get_first_stages(plan: dict[str, Any], setting: str) -> list[int]:
    """The stages of a setting before the one that arms differ in."""
    return [stage for stage in (1, 2, 3) if f"stage{stage}" in plan["settings"][setting]]


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
    labels = recipe.pop("image_labels", True)
    suffix = f".{name}.json" if labels == "argmax" else ".json"  # arms of a replicate may be made at once
    data = {"image_folder": str(folder / "data" / "images")}
    entries = recipe.pop("datasets", None) or [{"json_file": recipe["json_file"]}]
    entries = [{**entry, **data, "json_file": str(folder / "data" / entry["json_file"]) + suffix} for entry in entries]
    for key in ("json_file", "image_folder", "visual_tokenizer"):
        recipe.pop(key, None)
    recipe |= {"datasets": entries, "output_dir": str(folder / name), "seed": seed}
    if start is not None:
        recipe["model_name_or_path"] = str(start)
    return _write(recipe, folder / f"{name}.yaml")


def write_tokenizer_recipe(plan: dict[str, Any], folder: Path) -> list[str]:
    """The same of the visual tokenizer, which is trained to `folder`."""
    recipe = plan["recipes"]["visual_tokenizer"] | {"language_model": plan["recipes"]["stage1"]["language_model"]}
    recipe |= plan["every_stage"] | plan["visual_tokenizer"]["changes"]
    data = {"json_file": str(folder / "data" / "captions.json"), "image_folder": str(folder / "data" / "images")}
    return _write(recipe | data | {"output_dir": str(folder)}, folder / "tokenizer.yaml")


def _write(recipe: dict[str, Any], path: Path) -> list[str]:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return ["--config", str(path)]


def fingerprint(plan: dict[str, Any], setting: str | None = None, arms: Iterable[str] = ()) -> str:
    """
    Of what decides the numbers of a replicate, and of some arms: not how many there are of either, nor what is
    compared.
    """
    names = ("recipes", "every_stage", "held_out_looks", "visual_tokenizer", "questions")
    decides = {name: plan[name] for name in names} | {"setting": plan["settings"].get(setting)}
    decides |= {"arms": {arm: plan["arms"].get(arm) for arm in arms}}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


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
