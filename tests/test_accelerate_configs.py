# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The configs of `accelerate launch`: each is one, and its own commands start what they say."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "accelerate_configs"
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def read_commands(file: Path) -> list[list[str]]:
    """The commands of the comment in front."""
    comment = "\n".join(line.removeprefix("#") for line in file.read_text().splitlines() if line.startswith("#"))
    blocks = re.findall(r"(?m)^ {5}accelerate launch(?:.*\\\n)*.*$", comment)
    return [shlex.split(block.replace("\\\n", " "))[2:] for block in blocks]


def test_there_are_no_others():
    assert {file.stem for file in FOLDER.iterdir()} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_commands_start_what_they_say(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    single, several = read_commands(FOLDER / f"{name}.yaml")
    assert load_config_from_file(str(FOLDER / f"{name}.yaml")).distributed_type.value == KINDS[name]
    for command, machines, processes in ((single, 1, 8), (several, 2, 16)):
        args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
        assert args.config_file == f"examples/accelerate_configs/{name}.yaml"
        assert (args.num_machines, args.num_processes, args.mixed_precision) == (machines, processes, "bf16")
        assert args.training_script == "examples/train.py"
        assert (ROOT / args.training_script_args[1]).exists()
        assert args.use_deepspeed == (KINDS[name] == "DEEPSPEED") and args.use_fsdp == (KINDS[name] == "FSDP")


def test_layers_that_fsdp_wraps_are_those_of_the_parts():
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    parts = CLIPVisionModel(CLIPVisionConfig(**size)), LlamaForCausalLM(LlamaConfig(**size, vocab_size=8))
    classes = {type(module).__name__ for part in parts for module in part.modules()}
    config = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())["fsdp_config"]
    assert set(config["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= classes
