# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Estimates on paper what the real runs cost, VW-LMM's and LaVIT's: FLOPs, hours and memory of each stage.

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


@dataclass(frozen=True)
class LaVIT:
    """LaVIT's set-up. How many images stage 1 sees, and which share of stage 2 is pairs, the paper does not say."""

    width: int = 1408
    intermediate_size: int = 6144
    tower_layers: int = 40
    merger_layers: int = 12
    decoder_layers: int = 3
    patches: int = 256
    num_codes: int = 16384
    code_dim: int = 32
    kept: int = 85  # a third
    images: float = 93e6  # all of the paper's, once
    tokens: float = 12e3 * 4e6
    text_of_pair: int = 30  # as in stage I above
    document: int = 2048
    pair_share: float = 0.5  # of stage 2's tokens

    @property
    def tower_parameters(self) -> float:
        return self.tower_layers * (4 * self.width**2 + 2 * self.width * self.intermediate_size)

    @property
    def block_parameters(self) -> float:
        """Of a block of merger or decoder: two attentions and an MLP."""
        return 8 * self.width**2 + 2 * self.width * self.intermediate_size

    @property
    def merger_parameters(self) -> float:
        return self.merger_layers * self.block_parameters

    @property
    def coding_parameters(self) -> float:
        """Selector and task layer."""
        return (1 + 1 / 2 + 1 / 8) * self.width**2 + self.width**2 + self.width * self.code_dim

    @property
    def decoder_parameters(self) -> float:
        return self.decoder_layers * self.block_parameters + 2 * self.width**2 + self.width * self.code_dim

    @property
    def tower_flops(self) -> float:
        """Of an image, forward alone."""
        tokens = self.patches + 1
        return 2 * tokens * self.tower_parameters + self.tower_layers * 4 * tokens**2 * self.width

    def block_flops(self, parameters: float, layers: int, passes: int) -> float:
        """Of an image. All patches pass, dropped ones, too, and attention is over all pairs of them."""
        return passes * self.patches * (parameters + layers * 4 * self.patches * self.width)

    def activations(self, images: float, layers: int) -> float:
        """What checkpointing keeps, and one block at work with about ten fp32 copies of the scores of 16 heads."""
        return images * self.patches * (self.width * 2 * (layers + 16) + 10 * 16 * self.patches * 4)


def estimate_lavit(run: Run, lavit: LaVIT, stage: int) -> dict[str, float]:
    coding = lavit.coding_parameters + lavit.merger_parameters
    if stage == 1:
        trained, layers, micro_batch = (
            coding + lavit.decoder_parameters,
            lavit.merger_layers + lavit.decoder_layers,
            64,
        )
        flops = lavit.images * (lavit.tower_flops + lavit.block_flops(trained, layers, 2 + 4 + 2))
        states = 16 * trained + 2 * lavit.tower_parameters  # DDP: each GPU has all
        activations = lavit.activations(micro_batch, layers)
    else:
        vocab_size = run.vocab_size + 2 + lavit.num_codes
        pair = lavit.kept + 2 + lavit.text_of_pair
        images = lavit.pair_share * lavit.tokens / pair
        length = lavit.pair_share * pair + (1 - lavit.pair_share) * lavit.document  # of a token's own sample
        decoder = 8 * (run.decoder_parameters + run.layers * length * run.hidden_size)
        heads = 3 * 2 * vocab_size * run.hidden_size  # text and codes alike are learned
        # The frozen tokenizer reads each image once, and the reader's merger learns.
        image = lavit.tower_flops + lavit.block_flops(coding, lavit.merger_layers, 2)
        image += lavit.block_flops(lavit.merger_parameters, lavit.merger_layers, 8)
        flops = lavit.tokens * (decoder + heads) + images * image
        trained = run.decoder_parameters + 2 * vocab_size * run.hidden_size + lavit.merger_parameters
        states = (16 * trained + 2 * (lavit.tower_parameters + coding)) / run.gpus  # ZeRO-3
        rows = 4 * 2048
        activations = rows * run.hidden_size * 2 * (run.layers + 16)
        activations += lavit.activations(rows * lavit.pair_share / pair, lavit.merger_layers)
    return {
        "EFLOPs": flops / 1e18,
        "GPU hours": flops / (run.tflops * 1e12 * run.utilisation) / 3600,
        "trained, millions": trained / 1e6,
        "GB a GPU": (states + activations) / 1e9,
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
    print("\n| LaVIT, stage | " + " | ".join(estimate_lavit(run, LaVIT(), 1)) + " |")
    print("|---" * 5 + "|")
    for stage in (1, 2):
        cells = [f"{value:.1f}" for value in estimate_lavit(run, LaVIT(), stage).values()]
        print(f"| {stage} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
