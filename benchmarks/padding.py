# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
How much of all positions is padding, over an epoch of samples as long as LLaVA-1.5's, and how long packing takes.

    python benchmarks/padding.py

Lengths are drawn, not read: the distribution is an assumption (`draw_lengths`).
"""

import argparse
import time
from collections.abc import Iterable, Sequence

import numpy as np

from modeling_vwlmm.training.packing import pack_rows
from modeling_vwlmm.training.sampling import ModalityLengthGroupedSampler


MAX_LENGTH, ROWS_OF_A_BATCH, GLOBAL_BATCH_SIZE = 2048, 16, 128


def draw_lengths() -> tuple[np.ndarray, np.ndarray]:
    """
    Tokens of each sample and whether it has an image, both `[samples]`.

    An assumption after llava_v1_5_mix665k: 624,000 samples with one image of 576 tokens and a text of log-normal
    length, median 120 tokens, and 41,000 texts alone of median 400; sigma is 1, and `MAX_LENGTH` cuts.
    """
    generator = np.random.default_rng(0)
    with_image = 576 + generator.lognormal(np.log(120), 1.0, 624_000)
    text_alone = generator.lognormal(np.log(400), 1.0, 41_000)
    lengths = np.concatenate([with_image, text_alone]).clip(1, MAX_LENGTH).astype(int)
    order = generator.permutation(len(lengths))
    return lengths[order], (np.arange(len(lengths)) < len(with_image))[order]


def share_of_padding(batches: Iterable[Sequence[int]]) -> tuple[float, float]:
    """The share of padding in batches of rows of so many tokens, and the mean number of tokens in a batch."""
    tokens = positions = num_batches = 0
    for rows in batches:
        tokens += sum(rows)
        positions += max(rows) * len(rows)
        num_batches += 1
    return 1 - tokens / positions, tokens / num_batches


def cut(rows: Sequence[int]) -> list[list[int]]:
    """Consecutive batches."""
    return [list(rows[start : start + ROWS_OF_A_BATCH]) for start in range(0, len(rows), ROWS_OF_A_BATCH)]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lengths, has_image = draw_lengths()
    grouped = lengths[list(ModalityLengthGroupedSampler(GLOBAL_BATCH_SIZE, lengths.tolist(), has_image))]

    def row_lengths(samples: list[int]) -> list[int]:
        return [sum(samples[index] for index in row) for row in pack_rows(samples, MAX_LENGTH)]

    random_batches = cut(lengths.tolist())
    start = time.process_time()
    rows = pack_rows(lengths, MAX_LENGTH)
    seconds = time.process_time() - start
    rows = [int(lengths[list(row)].sum()) for row in rows]

    print("| batches | padding_share | tokens a batch |")
    print("|---|---|---|")
    for name, batches in (
        ("16 random samples", random_batches),
        ("16 samples, grouped by length", cut(grouped.tolist())),
        ("16 random samples, packed into rows of 2,048", map(row_lengths, random_batches)),
        ("16 rows of 2,048, packed across the dataset", cut(rows)),
    ):
        share, tokens = share_of_padding(batches)
        print(f"| {name} | {share:.2%} | {tokens:,.0f} |")
    print(f"\n{len(lengths):,} samples, {len(rows):,} rows, packed in {seconds:.1f} s of processor time")


if __name__ == "__main__":
    main()
