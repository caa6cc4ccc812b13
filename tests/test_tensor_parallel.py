# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: two processes that share the matrices have the losses and gradients of one.

Run as a script by the launcher, this file computes them; run by pytest, it starts the launcher and compares.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from test_distributed import run_python

from modeling_vwlmm import VWLMMForConditionalGeneration


OBJECTIVES = {"language": None, "visual_words": "visual_words", "vm_head": "vm_head"}


def compute(checkpoint: str, output: str | None = None) -> dict[str, list[float]]:
    """The loss of each objective, and the norms of the gradients of both heads."""
    is_shared = output is not None
    if is_shared:
        torch.distributed.init_process_group("gloo")
    model = VWLMMForConditionalGeneration.from_pretrained(checkpoint, **({"tp_plan": "auto"} if is_shared else {}))
    # Earlier versions of Transformers leave the heads whole.
    assert any(hasattr(weight, "device_mesh") for weight in model.parameters()) == is_shared
    ids = torch.tensor([[1] + [480] * 16 + [5, 6, 7]])
    pixel_values = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, objective in OBJECTIVES.items():
        model.zero_grad()
        loss = model(input_ids=ids, pixel_values=pixel_values, labels=ids, visual_objective=objective).loss
        loss.backward()
        found[name] = [loss.item()]
        for weight in (model.lm_head.weight, model.model.vm_head.weight):
            grad = weight.grad
            whole = torch.zeros(1) if grad is None else grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[name].append(whole.norm().item())
    if is_shared and torch.distributed.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    return found


def test_two_processes_agree_with_one(vicuna, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run_python([*launcher, __file__, vicuna, str(tmp_path / "found.json")], {})
    found, expected = json.loads((tmp_path / "found.json").read_text()), compute(vicuna)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name
        assert values[1 + (name == "vm_head")] > 0


if __name__ == "__main__":
    compute(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort or hang the exit of an interpreter
