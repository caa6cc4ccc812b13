# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Estimates on paper what the real runs cost: FLOPs, hours and memory of each stage.

    python benchmarks/estimate.py                       # the paper's set-up on 8 GPUs of 80 GB
    python benchmarks/estimate.py --image-tokens 2304   # and if images had four times the tokens

Counted are the matrix products of tower, decoder and heads, and attention. A forward pass takes two FLOPs a weight and
token, and a backward pass two for the gradient of the inputs and two for that of the weights.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """A set-up. Text tokens are rough means over LLaVA-1.5's data: an assumption, not a count."""

    layers: int = 32
    hidden_size: int = 4096
    intermediate_size: int = 11008
    vocab_size: int = 32000
    image_tokens: int = 576
    tower_parameters: float = 0.304e9
    gpus: int = 8
    tflops: float = 312.0  # dense bf16 of an A100, or 989 for an H100
    utilisation: float = 0.4

    @property
    def decoder_parameters(self) -> float:
        """Weights of the layers: embeddings take part in no product, the heads are counted with the losses."""
        return self.layers * (4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_parameters(self) -> float:
        return self.vocab_size * self.hidden_size

    @property
    def adapter_parameters(self) -> float:
        return 1024 * self.hidden_size + self.hidden_size**2


# Stage: samples, share with an image, text tokens a sample, those of them supervised, micro-batch of a GPU.
STAGES = {"I": (558e3, 1.0, 30, 25, 32), "II": (665e3, 0.94, 300, 200, 16)}
STAGES |= {"III": STAGES["I"], "IV": STAGES["II"]}


def estimate(run: Run, stage: str) -> dict[str, float]:
    samples, with_image, text_tokens, supervised, micro_batch = STAGES[stage]
    images = with_image * run.image_tokens
    if stage == "III":
        text_tokens = 0  # the decoder stops at the last image token
    length = images + text_tokens
    # Stage I passes gradients through a frozen decoder, stage III needs none of it, checkpointing runs it once more.
    passes = {"I": 2 + 2 + 2, "II": 2 + 4 + 2, "III": 2, "IV": 2 + 4 + 2}[stage]
    decoder = passes * length * run.decoder_parameters
    attention = passes * run.layers * length**2 * run.hidden_size  # causal: half of two products of [L, L, D]
    tower = 2 * images * run.tower_parameters
    # Products with a head a position: logits, and the gradients of hidden states and head.
    text_products = {"I": 2, "II": 3, "III": 0, "IV": 3}[stage]
    image_products = {"I": 0, "II": 0, "III": 3, "IV": 4}[stage]
    heads = 2 * run.head_parameters * (text_products * supervised + image_products * images)
    flops = samples * (decoder + attention + tower + heads)

    frozen = 2 * (run.decoder_parameters + 3 * run.head_parameters + run.tower_parameters)  # bf16
    trained = {
        "I": run.adapter_parameters,
        "II": run.decoder_parameters + 2 * run.head_parameters + run.adapter_parameters,
        "III": run.head_parameters,
        "IV": run.decoder_parameters + 2 * run.head_parameters,
    }[stage]
    # fp32 weights, gradients and AdamW's two moments, sharded; frozen weights are sharded under ZeRO-3 alone.
    states = 16 * trained / run.gpus + (frozen / run.gpus if stage in ("II", "IV") else frozen)
    # What checkpointing keeps between layers, and one layer at work.
    kept = 0 if stage == "III" else run.layers
    activations = micro_batch * length * run.hidden_size * 2 * (kept + 16)
    logits = micro_batch * (length + (images if image_products else 0)) * run.vocab_size * 4  # fp32, both heads
    return {
        "EFLOPs": flops / 1e18,
        "of it heads": samples * heads / flops,
        "hours": flops / (run.gpus * run.tflops * 1e12 * run.utilisation) / 3600,
        "GB a GPU": (states + activations) / 1e9,
        "GB of full logits, once": logits / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Run()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    run = Run(**vars(parser.parse_args()))
    columns = list(estimate(run, "I"))
    print("| stage | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for stage in STAGES:
        values = estimate(run, stage)
        cells = [f"{value:.0%}" if name == "of it heads" else f"{value:.1f}" for name, value in values.items()]
        print(f"| {stage} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
