# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures this implementation against its alternatives, side by side on one machine:

    make bench                                      # full size
    python benchmarks/run.py --size small           # a quick look
    python benchmarks/run.py --size 7b --only kl    # on a CUDA machine

Every figure is a ratio of medians. All cases run in turn, round by round, each run in a process of its own. Memory is the
peak that a step adds to its inputs: the operating system's peak resident set on a CPU, the allocator's peak on CUDA.
"""

import argparse
import ctypes
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
    """`ours` against `other`: at most `time` times the time and `memory` times the memory.

    `gradient` names the matrix that is larger in `ours`: memory may grow by as much as its gradient, and no more.
    """

    name: str
    ours: str
    other: str
    time: float
    memory: float | None = None
    gradient: str | None = None


COMPARISONS = (
    Comparison("fused KL against full logits", "kl", "kl written out", 0.95, 0.40),
    Comparison("fused KL against TRL's chunked divergence", "kl", "kl trl", 0.42, 0.15),
    Comparison("fused KL against its four matrix products", "kl", "kl floor", 1.2),
    Comparison("text and KL in one against apart", "text and kl", "text and kl apart", 1.0),
    Comparison("stage IV step against full logits", "stage 4", "stage 4 written out", 0.6, 0.38),
    Comparison("stage III step against full logits", "stage 3", "stage 3 written out", 0.75, 0.06),
    Comparison("packed row against padded batch", "packed", "padded", 1.0),
    Comparison("image positions x 8", "scale, positions", "scale", 8 * 1.1, gradient="hidden states"),
    Comparison("vocabulary x 4", "scale, vocabulary", "scale", 4 * 1.1, gradient="head"),
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
        ctypes.CDLL(None).malloc_trim(0)  # what the first step has freed is not there any more
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


def measure_in_turn(cases: list[str], size: str, runs: int) -> dict[str, dict[str, float]]:
    """Medians of every case, over rounds in which each has a process of its own."""
    results = {case: [] for case in cases}
    with tqdm(total=runs * len(cases), unit="run") as progress:
        for _ in range(runs):
            for case in cases:
                progress.set_description(case)
                command = [sys.executable, __file__, "--size", size, "--case", case]
                process = subprocess.run(command, capture_output=True, text=True)
                if process.returncode:
                    raise RuntimeError(f"The case {case!r} failed:\n{process.stderr[-2000:]}")
                results[case].append(json.loads(process.stdout.splitlines()[-1]))
                progress.update()
    return {
        case: {key: statistics.median(result[key] for result in measured) for key in ("seconds", "bytes")}
        for case, measured in results.items()
    }


def row(comparison: Comparison, medians: dict[str, dict[str, float]], size: str) -> str:
    ours, other = medians[comparison.ours], medians[comparison.other]
    cells = [
        comparison.name,
        f"{ours['seconds']:.3f} s",
        f"{other['seconds']:.3f} s",
        f"{ours['seconds'] / other['seconds']:.2f} x",
        f"{comparison.time:.2f} x",
    ]
    memory = comparison.memory
    if comparison.gradient is not None:
        memory = 1 + gradient_growth(size)[comparison.gradient] / other["bytes"]
    if memory is None:
        cells += [""] * 4
    else:
        cells += [
            f"{ours['bytes'] / 2**20:.0f} MiB",
            f"{other['bytes'] / 2**20:.0f} MiB",
            f"{ours['bytes'] / other['bytes']:.2f} x",
            f"{memory:.2f} x",
        ]
    return "| " + " | ".join(cells) + " |"


def gradient_growth(size: str) -> dict[str, int]:
    """Bytes by which the gradients grow with eight times the positions, and with four times the vocabulary."""
    from cases import LOSS_SIZES

    num_positions, hidden_size, vocab_size = LOSS_SIZES[size]
    return {"hidden states": 7 * 2 * num_positions * hidden_size * 4, "head": 3 * vocab_size // 4 * hidden_size * 4}


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
    cases = dict.fromkeys(case for comparison in comparisons for case in (comparison.ours, comparison.other))
    medians = measure_in_turn(list(cases), args.size, args.runs)
    print(f"\n{machine()}; size {args.size}, medians of {args.runs} runs in turn\n")
    print("| comparison | ours | other | time | bar | ours | other | memory | bar |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(row(comparison, medians, args.size) for comparison in comparisons))


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {model}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
