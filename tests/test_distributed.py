# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Two processes take the same steps as one, data parallel or sharded, also where one of them has only text.

Run as a script by the launcher, this file trains; run by pytest, it starts the launcher and compares.
"""

import gc
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from conftest import LONG, make_image, make_vae
from datasets import Dataset, List, Value, load_from_disk
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.data import SequentialSampler

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from processing_vwlmm import VWLMMProcessor


LABELS_AND_FEATURES = {"token_labels": 0.5, "features": {"weight": 2.0, "loss": "cosine"}}
# Stage, whether with pseudo image features, and what image positions learn in place of the stage's objective.
RUNS = {
    "stage2": (2, False, None),
    "stage3": (3, False, None),
    "stage4": (4, False, None),
    "stage4_pif": (4, True, None),
    "labels_and_features": (2, False, LABELS_AND_FEATURES),
    "aligned": (4, False, {"features": {"shift": False, "layer": 1}}),
    "images_without_text": (4, False, None),  # on one process, and text without images on the other
}
if importlib.util.find_spec("diffusers") is not None:
    RUNS["reconstruction"] = (2, False, {"reconstruction": {"vae": "vae"}})  # beside the data
    RUNS["vlsa"] = (2, False, {"reconstruction": {"vae": "vae"}})  # whose tower and perceiver learn, of patches
# Those that train a module beside the model's own are resumed, too.
RESUMED = "labels_and_features"
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


def leave_out_answers_about_images(dataset: Dataset) -> Dataset:
    messages = [
        [{"role": "user", "content": [{"type": "image"}] * len(sample["images"])}]
        if sample["images"]
        else sample["messages"]
        for sample in dataset
    ]
    feature = dataset.features["messages"]
    return dataset.remove_columns("messages").add_column("messages", messages, feature=feature)


def make_trainer(checkpoint: str, data: str, output: str, name: str) -> InOrderTrainer:
    stage, use_pseudo_image_features, visual_objective = RUNS[name]
    if "reconstruction" in (visual_objective or ()):
        visual_objective = {"reconstruction": {"vae": str(Path(data, "vae"))}}
    is_vlsa = name == "vlsa"
    dataset = load_from_disk(data)
    if name == "images_without_text":
        dataset = leave_out_answers_about_images(dataset)
    args = VWLMMTrainingArguments(
        f"{output}/run_{name}",
        method="vlsa" if is_vlsa else "vw-lmm",
        stage=stage,
        visual_objective=visual_objective,
        chat_template="vicuna_v1",
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
        per_device_eval_batch_size=1,
        global_batch_size=4,
        max_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="steps" if name == RESUMED else "no",
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return InOrderTrainer(
        model=VWLMMForConditionalGeneration.from_pretrained(
            str(Path(data, "vlsa")) if is_vlsa else checkpoint, use_pseudo_image_features=use_pseudo_image_features
        ),
        args=args,
        train_dataset=dataset,
        eval_dataset=load_from_disk(data).select([0, 2]),  # one process has an image, the other text only
        processing_class=VWLMMProcessor.from_pretrained(checkpoint, **({"max_patches": 4} if is_vlsa else {})),
        # With momentum, because FSDP cannot resume an optimizer without a state.
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    )


def train(checkpoint: str, data: str, output: str, *names: str) -> None:
    """Takes two SGD steps of each run, and writes the losses and weights."""
    logs = {}
    for name in names or RUNS:
        trainer = make_trainer(checkpoint, data, output, name)
        calls = []
        trainer.model.model.vision_tower.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        trainer.train()
        num_calls = gather_object([len(calls)])
        trainer.save_model(f"{output}/{name}")
        logs[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
        evaluation = trainer.evaluate()
        logs[name].append({k: v for k, v in trainer.state.log_history[-1].items() if k in evaluation or "_loss" in k})
        logs[name][0] |= {"wrapped": type(trainer.model_wrapped).__name__, "tower_calls": num_calls}
        if name == "stage4":
            logs["answers"] = answer(trainer)
    trainer = make_trainer(checkpoint, data, output, RESUMED)
    trainer.train(resume_from_checkpoint=f"{output}/run_{RESUMED}/checkpoint-1")
    trainer.save_model(f"{output}/resumed")
    logs["resumed"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        with open(f"{output}/logs.json", "w") as file:
            json.dump(logs, file)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while another still talks to it


def answer(trainer: InOrderTrainer) -> list[list[int]]:
    """Answers to a question about an image and to one without, of other lengths: each of two processes has one."""
    texts, images = ["<image>\nWhat color?", "How many people are there?"], [make_image(3), None]
    lengths = [12, 4]
    index, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
    found = []
    for text, image, length in [*zip(texts, images, lengths, strict=True)][index::count]:
        inputs = trainer.processing_class(images=image, text=text, return_tensors="pt")
        output = trainer.model.generate(
            **inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0
        )
        found.append(output[0, inputs["input_ids"].shape[1] :].tolist()[:length])
    return gather_object(found)


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
def data(dataset, vicuna, tmp_path_factory) -> str:
    """Two steps of two pairs of samples: with images, text only; two images and one, text only. And models beside."""
    folder = tmp_path_factory.mktemp("distributed") / "data"
    samples: Dataset = dataset.select([0, 3, 1, 6, 2, 5, 6, 1])
    # A label for two image tokens of three.
    labels = [
        [[-100 if n % 3 == 0 else 7 * n + 5 * sample for n in range(16)] for _ in images]
        for sample, images in enumerate(samples["images"])
    ]
    samples.add_column("image_labels", labels, feature=List(List(Value("int64")))).save_to_disk(folder)
    if "reconstruction" in RUNS:
        make_vae(folder / "vae")
        # Saved, for where weights are sharded as they are made a new perceiver draws others.
        VWLMMForConditionalGeneration.from_pretrained(vicuna, adapter="sa_perceiver").save_pretrained(folder / "vlsa")
    return str(folder)


def launch(environment: dict[str, str], *arguments: str) -> None:
    """Runs this file in two processes, with the arguments of `train`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    run_python([*launcher, __file__, *arguments], environment)


def run_python(arguments: list[str], environment: dict[str, str], timeout: int = 600) -> None:
    result = subprocess.run(
        [sys.executable, *arguments],
        # DeepSpeed compiles with `ninja`, which stands beside the interpreter.
        env={
            **os.environ,
            **environment,
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def deepspeed() -> None:
    """Compiles what DeepSpeed needs on a CPU, processes that talk through shared memory, before a run needs it."""
    pytest.importorskip("deepspeed")
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles what it needs on a CPU, with g++")
    build = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"
    run_python(["-c", build], {"DS_ACCELERATOR": "cpu"}, timeout=1800)


@pytest.fixture(scope="module")
def alone(vicuna, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    train(vicuna, data, str(output))
    return output


@pytest.mark.parametrize(
    ("environment", "wrapper", "is_sharded"),
    [
        ({}, "DistributedDataParallel", False),
        (FSDP, "FSDPVWLMM", True),
        pytest.param({**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "DeepSpeedEngine", False, marks=LONG),
        (ZERO3, "DeepSpeedEngine", True),
    ],
    ids=["ddp", "fsdp2", "zero2", "zero3"],
)
def test_two_processes_take_the_steps_of_one(request, vicuna, data, alone, tmp_path, environment, wrapper, is_sharded):
    if "DS_ACCELERATOR" in environment:
        request.getfixturevalue("deepspeed")
    launch(environment, vicuna, data, str(tmp_path))
    logs, expected = (json.loads((folder / "logs.json").read_text()) for folder in (tmp_path, alone))
    for name in RUNS:
        # Whatever ran, it was this.
        assert logs[name][0]["wrapped"].startswith(wrapper)
        # Two steps, in which one process has text only: it runs the tower where that is sharded, or learns.
        assert logs[name][0]["tower_calls"] == [2, 2 if is_sharded or name == "vlsa" else 0]
        assert expected[name][0]["tower_calls"] == [2]
        for entry, other in zip(logs[name], expected[name], strict=True):
            metrics = {m for m in other if m.endswith(("loss", "positions", "entropy", "cosine", "_grad_norm"))}
            if wrapper == "DeepSpeedEngine":  # which keeps the gradients to itself
                metrics = {metric for metric in metrics if not metric.endswith("_grad_norm")}
            for metric in metrics:
                assert entry[metric] == pytest.approx(other[metric], rel=1e-5), (name, metric)
        # The code that loads the model travels with it.
        configs = [json.loads((folder / name / "config.json").read_text()) for folder in (tmp_path, alone)]
        assert configs[0]["auto_map"] == configs[1]["auto_map"]
        assert {file.name for file in (tmp_path / name).iterdir()} == {file.name for file in (alone / name).iterdir()}
        weights, others = (all_tensors(folder / name) for folder in (tmp_path, alone))
        assert weights.keys() == others.keys()
        for tensor, value in weights.items():
            assert_close(value, others[tensor], atol=1e-6, rtol=1e-5, msg=lambda m, t=tensor, n=name: f"{n} {t}: {m}")
    # A question about an image on one process, and one without on the other.
    assert logs["answers"] == expected["answers"]
    assert [len(answer) for answer in logs["answers"]] == [12, 4]
    through, resumed = (all_tensors(tmp_path / name) for name in (RESUMED, "resumed"))
    assert through.keys() == resumed.keys()
    assert not [tensor for tensor, value in through.items() if not torch.equal(value, resumed[tensor])]


def test_sharded_checkpoint_has_the_modules_that_only_training_needs(vicuna, data, tmp_path):
    """FSDP's default: each process saves its own shards, and no folder that `from_pretrained` loads is written."""
    launch({**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, vicuna, data, str(tmp_path), RESUMED)
    logs = json.loads((tmp_path / "logs.json").read_text())
    through, resumed = logs[RESUMED][1], logs["resumed"][-1]
    assert through["step"] == resumed["step"] == 2
    for name in ("loss", "language_loss", "token_labels_loss", "features_loss", "grad_norm"):
        assert through[name] == resumed[name], name


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What a saved folder holds, the modules that only training needs with their own names."""
    tensors = load_file(folder / "model.safetensors")
    assert not any("training_modules" in name for name in tensors)
    for file in sorted(folder.glob("_training_modules/*.safetensors")):
        tensors |= {f"{file.stem}: {name}": value for name, value in load_file(file).items()}
    return tensors


def test_the_steps_change_something(vicuna, alone):
    before = load_file(f"{vicuna}/model.safetensors")
    for name, (stage, _, objective) in RUNS.items():
        after = load_file(alone / name / "model.safetensors")
        changed = {n for n, value in after.items() if n not in before or not torch.equal(value, before[n])}
        assert ("model.vm_head.weight" in changed) == (stage == 3)
        assert ("lm_head.weight" in changed) == (stage != 3 and name != "vlsa")
        assert any(n.startswith("model.vision_tower.") for n in changed) == (name == "vlsa")
        trained, fresh = (
            {n: v for n, v in all_tensors(alone / folder).items() if n.startswith("features: ")}
            for folder in (name, f"run_{RESUMED}/checkpoint-1")
        )
        assert trained.keys() == ({"features: weight", "features: bias"} if "features" in (objective or ()) else set())
        if name == RESUMED:
            assert not any(torch.equal(value, fresh[tensor]) for tensor, value in trained.items())


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    shard_on_cpu()
    train(*sys.argv[1:])
    # All that was asked for is on disk, and gloo's threads now and then abort or hang the exit of an interpreter.
    os._exit(0)
