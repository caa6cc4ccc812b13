# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures this implementation against its alternatives, side by side on one machine:

    make bench                                      # full size
    python benchmarks/run.py --size small           # a quick look
    python benchmarks/run.py --size 7b --only kl    # on a CUDA machine

Every figure is a ratio of medians. The two sides of a ratio run in turn, each run in a process of its own. Memory is the
peak that a step adds to its inputs: the operating system's peak resident set on a CPU, the allocator's peak on CUDA.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass(frozen=True)
class Comparison:
    """`ours` against `other`: at most `time` times the time and `memory` times the memory."""

    name: str
    ours: str
    other: str
    time: float
    memory: float | None = None


COMPARISONS = (
    Comparison("fused KL against full logits", "kl", "kl written out", 0.95, 0.40),
    Comparison("fused KL against TRL's chunked divergence", "kl", "kl trl", 0.42, 0.15),
    Comparison("fused KL against its four matrix products", "kl", "kl floor", 1.2),
    Comparison("text and KL in one against apart", "text and kl", "text and kl apart", 1.0),
    Comparison("stage IV step against full logits", "stage 4", "stage 4 written out", 0.6, 0.38),
    Comparison("stage III step against full logits", "stage 3", "stage 3 written out", 0.75, 0.06),
    Comparison("image positions x 8", "kl", "kl 1/8 positions", 8 * 1.1),
    Comparison("vocabulary x 4", "kl", "kl 1/4 vocabulary", 4 * 1.1),
    Comparison("prefill against LLaVA", "prefill", "prefill llava", 1 / 0.98),
    Comparison("decoding against LLaVA", "decode", "decode llava", 1 / 0.98),
    Comparison("preprocessing against LLaVA", "preprocess", "preprocess llava", 1 / 0.98),
)
CUDA_COMPARISONS = (
    Comparison("fused KL against TRL's chunked divergence", "kl", "kl trl", 0.7, 1.0),
    Comparison("fused KL against Liger's fused linear JSD", "kl", "kl liger", 0.9, 1.0),
    Comparison("fused KL against its four matrix products", "kl", "kl floor", 1.2),
)


def measure(case: str, size: str) -> dict[str, float]:
    """Seconds and added bytes of one step, after a first step that warms up."""
    import torch
    from cases import CASES

    step = CASES[case](size)
    cuda = torch.cuda.is_available()
    step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident("VmRSS")
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    return {"seconds": seconds, "bytes": peak - before}


def resident(field: str) -> int:
    """Resident bytes of this process, now (`VmRSS`) or at most (`VmHWM`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def compare(comparison: Comparison, size: str, runs: int, progress: tqdm) -> str:
    results = {comparison.ours: [], comparison.other: []}
    for _ in range(runs):
        for case in results:
            progress.set_description(case)
            command = [sys.executable, __file__, "--size", size, "--case", case]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[case].append(json.loads(output.splitlines()[-1]))
            progress.update()
    seconds, added = (
        [statistics.median(result[key] for result in results[case]) for case in (comparison.ours, comparison.other)]
        for key in ("seconds", "bytes")
    )
    cells = [
        comparison.name,
        f"{seconds[0]:.3f} s",
        f"{seconds[1]:.3f} s",
        f"{seconds[0] / seconds[1]:.2f} x",
        f"{comparison.time:.2f} x",
    ]
    if comparison.memory is None:
        cells += [""] * 4
    else:
        cells += [
            f"{added[0] / 2**20:.0f} MiB",
            f"{added[1] / 2**20:.0f} MiB",
            f"{added[0] / added[1]:.2f} x",
            f"{comparison.memory:.2f} x",
        ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "full", "7b"), default="full")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side")
    parser.add_argument("--only", help="comparisons whose name contains this")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what a process of its own measures
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.size)))
        return
    comparisons = CUDA_COMPARISONS if args.size == "7b" else COMPARISONS
    comparisons = [comparison for comparison in comparisons if (args.only or "") in comparison.name]
    rows = []
    with tqdm(total=2 * args.runs * len(comparisons), unit="run") as progress:
        for comparison in comparisons:
            rows.append(compare(comparison, args.size, args.runs, progress))
    print(f"\n{machine()}; size {args.size}, medians of {args.runs} runs in turn\n")
    print("| comparison | ours | other | time | bar | ours | other | memory | bar |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {model}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
