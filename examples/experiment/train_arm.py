"""
Trains an arm of the plan from a model and on data of your own, which a recipe names:

    accelerate launch examples/experiment/train_arm.py sharpened \
        --config examples/recipes/vicuna_7b/stage4.yaml --output_dir runs/vicuna_7b/sharpened

What follows the arm's name is what `examples/train.py` takes. Labels of patches and a visual tokenizer are yours to
bring: the first as `image_labels` in the data, the second in the model that the recipe starts from.
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import objectives  # noqa: F401  makes the controls known
import train
import yaml


PLAN = Path(__file__).with_name("plan.yaml")
NOT_OF_RECIPES = ("image_labels", "visual_tokenizer")


def main(arguments: list[str] | None = None) -> None:
    """Trains the arm and the recipe that the command line, or `arguments` in its place, names."""
    arguments = sys.argv[1:] if arguments is None else arguments
    arms = yaml.safe_load(PLAN.read_text())["arms"]
    if not arguments or arguments[0] not in arms:
        found = repr(arguments[0]) if arguments else "nothing"
        raise SystemExit(f"Found {found} in place of an arm; expected one of {', '.join(arms)}, then a recipe.")
    options = []
    for name, value in arms[arguments[0]].items():
        if name not in NOT_OF_RECIPES:
            values = value if isinstance(value, list) else [value if isinstance(value, str) else json.dumps(value)]
            options += [f"--{name}", *values]
    train.main([*arguments[1:], *options])


if __name__ == "__main__":
    main()
