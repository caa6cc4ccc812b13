# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Counts the graphs that `torch.compile` makes of the forward pass of a training step, as the trainer calls the model.

    python benchmarks/graphs.py
    PYTHONPATH=../before python benchmarks/graphs.py    # of another checkout, such as `git worktree add ../before`

The decoder is whole if one graph holds all of its layers.
"""

import argparse
import inspect
import re

import torch
from cases import MODEL_SIZES, prepare_stage
from torch import fx
from torch._dynamo.utils import counters


# layers, hidden size, vocabulary, patches a side, text tokens
MODEL_SIZES["tiny"] = (2, 64, 512, 4, 24)


def count_graphs(stage: int) -> tuple[int, int, int]:
    """Graphs, those of them with decoder layers, and breaks."""
    model, batch = prepare_stage("tiny", stage)
    objective = "visual_words" if stage == 4 else None
    if "supervised_positions" in inspect.signature(model.forward).parameters:
        # The collator finds them on the host. Checkouts from before it did so find them in `forward`.
        from modeling_vwlmm.objectives_vwlmm import find_supervised_positions, parse_objectives

        objectives, _ = parse_objectives(objective)
        batch["supervised_positions"] = find_supervised_positions(objectives, batch, model.config.image_token_id)
        del batch["attention_mask"]  # the trainer leaves it out where padding is on the right
    graphs = []

    def backend(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> fx.GraphModule:
        graphs.append({path for node in graph.graph.nodes for path in decoder_layers(node)})
        return graph

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend)
    output = compiled(
        **batch, visual_objective=objective, logits_to_keep=torch.empty(0, dtype=torch.long), use_cache=False
    )
    output.loss.backward()
    return len(graphs), sum(map(bool, graphs)), sum(counters["graph_break"].values())


def decoder_layers(node: fx.Node) -> set[str]:
    """The layers of the decoder that an operation belongs to."""
    return set(re.findall(r"language_model\W+layers\W+\d+", str(node.meta.get("nn_module_stack", ""))))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| stage | graphs | with decoder layers | breaks |")
    print("|---|---|---|---|")
    for stage in (2, 4):
        graphs, with_layers, breaks = count_graphs(stage)
        print(f"| {stage} | {graphs} | {with_layers} | {breaks} |")


if __name__ == "__main__":
    main()
