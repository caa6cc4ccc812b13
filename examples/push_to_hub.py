"""
Publishes a checkpoint on the Hugging Face Hub, with a model card. Log in first, with `hf auth login`:

    python examples/push_to_hub.py runs/small_world/stage4 your-name/vwlmm-small-world --license apache-2.0

    python examples/push_to_hub.py runs/vicuna_7b/stage4 your-name/vwlmm-vicuna-7b --license llama2 \
        --datasets liuhaotian/LLaVA-Pretrain liuhaotian/LLaVA-Instruct-150K --metrics results.json

`--dry_run` writes the card and lists the files, and uploads nothing. Modules that objectives have trained beside the
model stay at home, unless `--with_training_modules` sends them along for who wants to train on; without it those of an
earlier upload are deleted, for they are of other weights. `results.json` is what lmms-eval writes, or a list:

    [{"dataset_type": "lmms-lab/POPE", "dataset_name": "POPE", "metric_type": "accuracy", "metric_value": 0.875}]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers.dynamic_module_utils import get_relative_imports

from modeling_vwlmm import VWLMMConfig
from modeling_vwlmm.training.model_card import make_model_card, read_eval_results
from modeling_vwlmm.training.training_modules import FOLDER


# What a training run leaves in its folder beside the checkpoint.
IGNORED = [
    *("_*", ".*", "checkpoint-*", "global_step*", "runs/*", "wandb/*"),
    *("training_args.bin", "trainer_state.json", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*"),
]


def check_is_complete(folder: Path) -> None:
    """
    Checks that a VW-LMM can be loaded from this folder alone.

    Args:
        folder (`Path`): Folder of a checkpoint.

    Raises:
        FileNotFoundError: Naming what is missing: config, weights, processor, tokenizer, or custom code.
        ValueError: If the checkpoint is of another architecture, names no custom code, or has two sets of weights.
    """
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    if config.get("model_type", VWLMMConfig.model_type) != VWLMMConfig.model_type:
        raise ValueError(
            f"{folder} has the model type {config['model_type']!r}; expected {VWLMMConfig.model_type!r}. "
            "Pass the folder of a VW-LMM."
        )
    expected = ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"]
    index = folder / "model.safetensors.index.json"
    if index.is_file() and (folder / "model.safetensors").is_file():
        raise ValueError(
            f"{folder} has both model.safetensors and {index.name}. Transformers loads model.safetensors alone; "
            "remove what is not of this checkpoint."
        )
    expected += set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else ["model.safetensors"]
    for name in expected:  # the list grows meanwhile, as code files import others
        file = folder / name
        if name in ("config.json", "processor_config.json") and file.is_file():
            auto_map = json.loads(file.read_text()).get("auto_map")
            if not auto_map:
                raise ValueError(
                    f"{file} has no `auto_map`, by which Transformers finds the custom code. Save it again with this "
                    "package, `model.save_pretrained` and `processor.save_pretrained`."
                )
            modules = {reference.split(".")[0] for reference in auto_map.values()}
        else:
            modules = get_relative_imports(file) if name.endswith(".py") and file.is_file() else ()
        expected += [f"{module}.py" for module in sorted(modules) if f"{module}.py" not in expected]
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}. Write a whole checkpoint with `model.save_pretrained` and "
            "`processor.save_pretrained`; of a PEFT adapter, that is the merged model."
        )


def write_model_card(folder: Path, repo_id: str, metrics: list[str], **metadata: Any) -> ModelCard:
    """
    Writes the card of the checkpoint in `folder`, on top of the card that it may have already.

    Args:
        folder (`Path`): Folder of the checkpoint.
        repo_id (`str`): Its repository on the Hub, `owner/name`.
        metrics (`list[str]`): JSON files of results.
        metadata: Fields of the card, as [`make_model_card`] takes them.

    Returns:
        `ModelCard`
    """
    file = folder / "README.md"
    card = make_model_card(
        VWLMMConfig.from_pretrained(folder),
        repo_id,
        previous=ModelCard.load(file) if file.is_file() else None,
        eval_results=[result for metrics_file in metrics for result in read_eval_results(metrics_file)],
        **metadata,
    )
    card.save(file)
    return card


def list_files(folder: Path, with_training_modules: bool = False) -> list[str]:
    """
    The files that are uploaded, relative to `folder`.

    Raises:
        FileNotFoundError: If training modules are asked for, and there are none.
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    modules = [file for file in files if file.startswith(f"{FOLDER}/")] if with_training_modules else []
    if with_training_modules and not modules:
        raise FileNotFoundError(f"{folder} has no {FOLDER}, which `--with_training_modules` asks for. Leave it out.")
    return [*filter_repo_objects(files, ignore_patterns=IGNORED), *modules]


def main(args: list[str] | None = None) -> None:
    """Checks, describes and uploads the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a VW-LMM checkpoint")
    parser.add_argument("repo_id", help="repository on the Hub, 'owner/name'; made if it does not exist")
    parser.add_argument("--license", help="license of the weights, as the Hub names it: 'apache-2.0', 'llama2'")
    parser.add_argument("--datasets", nargs="+", help="ids on the Hub of what it was trained on")
    parser.add_argument(
        "--base_model",
        nargs="*",
        help="ids on the Hub of what it was made from; by default those that config.json records; no id for none",
    )
    parser.add_argument("--language", nargs="+", help="languages it speaks, as ISO codes: 'en'")
    parser.add_argument("--tags", nargs="+", default=[], help="further tags")
    parser.add_argument("--metrics", nargs="+", default=[], help="JSON files of results, see above")
    parser.add_argument(
        "--with_training_modules", action="store_true", help="also upload what objectives train beside the model"
    )
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private")
    parser.add_argument("--dry_run", action="store_true", help="write the card and list the files, upload nothing")
    args = vars(parser.parse_args(args))
    folder, repo_id, private, dry_run = (args.pop(name) for name in ("folder", "repo_id", "private", "dry_run"))
    with_training_modules = args.pop("with_training_modules")

    check_is_complete(folder)
    card = write_model_card(folder, repo_id, **args)
    files = list_files(folder, with_training_modules)
    print(card.data.to_yaml(), *files, sep="\n")
    if dry_run:
        return
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=files,
        # Earlier weights would stay.
        delete_patterns=["model*.safetensors", "model.safetensors.index.json", f"{FOLDER}/*"],
    )
    print(f"{api.endpoint}/{repo_id}")


if __name__ == "__main__":
    main()
