# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Two processes take the same steps as one, data parallel or sharded, also where one of them has only text.

Run as a script by the launcher, this file trains; run by pytest, it starts the launcher and compares.
"""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import load_from_disk
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.data import SequentialSampler

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from processing_vwlmm import VWLMMProcessor


# Stage, and whether with pseudo image features.
RUNS = {"stage2": (2, False), "stage3": (3, False), "stage4": (4, False), "stage4_pif": (4, True)}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    # By default Accelerate looks for a class of CLIP's text model, and does not find it.
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,CLIPEncoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}

ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "DS_ACCELERATOR": "cpu",
}


class InOrderTrainer(VWLMMTrainer):
    """Two samples a process and step, in the order of the dataset."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def train(checkpoint: str, data: str, output: str) -> None:
    """Takes two SGD steps of each run, and writes the losses and weights."""
    logs = {}
    for name, (stage, use_pseudo_image_features) in RUNS.items():
        args = VWLMMTrainingArguments(
            f"{output}/run",
            stage=stage,
            chat_template="vicuna_v1",
            per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
            per_device_eval_batch_size=1,
            global_batch_size=4,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        trainer = InOrderTrainer(
            model=VWLMMForConditionalGeneration.from_pretrained(
                checkpoint, use_pseudo_image_features=use_pseudo_image_features
            ),
            args=args,
            train_dataset=load_from_disk(data),
            eval_dataset=load_from_disk(data).select([0, 2]),  # one process has an image, the other text only
            processing_class=VWLMMProcessor.from_pretrained(checkpoint),
        )
        trainer.train()
        trainer.save_model(f"{output}/{name}")
        logs[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
        evaluation = trainer.evaluate()
        logs[name].append({k: v for k, v in trainer.state.log_history[-1].items() if k in evaluation or "_loss" in k})
        logs[name][0]["wrapped"] = type(trainer.model_wrapped).__name__
    if trainer.is_world_process_zero():
        with open(f"{output}/logs.json", "w") as file:
            json.dump(logs, file)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while another still talks to it


def shard_on_cpu() -> None:
    """Accelerate turns FSDP and DeepSpeed on for accelerators alone, and runs DDP without a word on CPU."""
    init = AcceleratorState.__init__

    def init_sharded(self, *args, fsdp_plugin=None, deepspeed_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if deepspeed_plugin is not None:
            deepspeed_plugin.set_mixed_precision("no")
            deepspeed_plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = deepspeed_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED

    AcceleratorState.__init__ = init_sharded


@pytest.fixture(scope="module")
def data(dataset, tmp_path_factory) -> str:
    """Two steps of two pairs of samples: with images, text only; two images and one, text only."""
    folder = tmp_path_factory.mktemp("distributed") / "data"
    dataset.select([0, 3, 1, 6, 2, 5, 6, 1]).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(vicuna, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    train(vicuna, data, str(output))
    return output


@pytest.mark.parametrize(
    ("environment", "wrapper"),
    [
        ({}, "DistributedDataParallel"),
        (FSDP, "FSDPVWLMM"),
        ({**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "DeepSpeedEngine"),
        (ZERO3, "DeepSpeedEngine"),
    ],
    ids=["ddp", "fsdp2", "zero2", "zero3"],
)
def test_two_processes_take_the_steps_of_one(vicuna, data, alone, tmp_path, environment, wrapper):
    if "DS_ACCELERATOR" in environment:
        pytest.importorskip("deepspeed")
        if shutil.which("g++") is None:
            pytest.skip("DeepSpeed compiles what it needs on a CPU, with g++")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    result = subprocess.run(
        [*launcher, __file__, vicuna, data, str(tmp_path)],
        # DeepSpeed compiles with `ninja`, which stands beside the interpreter.
        env={
            **os.environ,
            **environment,
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        },
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    logs, expected = (json.loads((folder / "logs.json").read_text()) for folder in (tmp_path, alone))
    for name in RUNS:
        # Whatever ran, it was this.
        assert logs[name][0]["wrapped"].startswith(wrapper)
        for entry, other in zip(logs[name], expected[name], strict=True):
            # Transformers' own `eval_loss` is a mean over batches, which are not the same here.
            metrics = {m for m in other if m.endswith(("loss", "positions", "entropy")) and m != "eval_loss"}
            for metric in metrics:
                assert entry[metric] == pytest.approx(other[metric], rel=1e-5), (name, metric)
        weights, others = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, alone))
        assert weights.keys() == others.keys()
        for tensor, value in weights.items():
            assert_close(value, others[tensor], atol=1e-6, rtol=1e-5, msg=lambda m, t=tensor, n=name: f"{n} {t}: {m}")


def test_the_steps_change_something(vicuna, alone):
    before = load_file(f"{vicuna}/model.safetensors")
    for name, (stage, _) in RUNS.items():
        after = load_file(alone / name / "model.safetensors")
        changed = {tensor for tensor, value in after.items() if not torch.equal(value, before[tensor])}
        assert ("model.vm_head.weight" in changed) == (stage == 3)
        assert ("lm_head.weight" in changed) == (stage != 3)


if __name__ == "__main__":
    shard_on_cpu()
    train(*sys.argv[1:])
    # All that was asked for is on disk, and gloo's threads now and then abort or hang the exit of an interpreter.
    os._exit(0)
