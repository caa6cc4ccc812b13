# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures this implementation against its alternatives, side by side on one machine:

    make bench                                      # full size
    python benchmarks/run.py --size small           # a quick look
    python benchmarks/run.py --only packed          # whether packing pays on this machine
    python benchmarks/run.py --size 7b --only kl    # on a CUDA machine

Time is a ratio of medians: all cases run in turn, round by round, each run in a process of its own. Memory is the peak
that a step adds to its inputs: the operating system's peak resident set on a CPU, the allocator's peak on CUDA.
"""

import argparse
import ctypes
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
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
    Comparison("image positions x 8", "scale, positions", "scale", 8 * 1.1, gradient="hidden states"),
    Comparison("vocabulary x 4", "scale, vocabulary", "scale", 4 * 1.1, gradient="head"),
    Comparison("prefill against LLaVA", "prefill", "prefill llava", 1 / 0.98),
    Comparison("decoding against LLaVA", "decode", "decode llava", 1 / 0.98),
    Comparison("preprocessing against LLaVA", "preprocess", "preprocess llava", 1 / 0.98),
)
# Says whether `packing` pays on the machine at hand. Measured where `--only` asks for it.
PACKING = Comparison("packed row against padded batch", "packed", "padded", 1.0)
CUDA_COMPARISONS = (
    Comparison("fused KL against TRL's chunked divergence", "kl", "kl trl", 0.7, 1.0),
    Comparison("fused KL against Liger's fused linear JSD", "kl", "kl liger", 0.9, 1.0),
    Comparison("fused KL against its four matrix products", "kl", "kl floor", 1.2),
)


def seconds_of_step(case: str, size: str) -> float:
    """Median seconds of one step, over steps that take a second together, after a first that warms up."""
    import torch
    from cases import CASES

    step = CASES[case](size)
    seconds = []
    while sum(seconds[1:]) < 1:
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def bytes_of_step(case: str, size: str) -> int:
    """Bytes that one step adds to what is resident before it, at its peak, after a first that warms up."""
    # Memory of a freed tensor goes back to the operating system at once. Otherwise glibc keeps it for reuse, and the
    # peak would count the holes between tensors. That makes steps slower: time is measured in a process of its own.
    m_mmap_threshold = -3  # of malloc.h
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**17)
    import torch
    from cases import CASES

    step = CASES[case](size)
    step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


FIGURES = {"seconds": seconds_of_step, "bytes": bytes_of_step}


def resident(field: str) -> int:
    """Resident bytes of this process, now (`VmRSS`) or at most (`VmHWM`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_in_turn(
    comparisons: Sequence[Comparison], size: str, runs: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of every case, over rounds in which each has a process of its own, and bytes where they count."""
    cases = dict.fromkeys(case for comparison in comparisons for case in (comparison.ours, comparison.other))
    in_memory = dict.fromkeys(
        case
        for comparison in comparisons
        if comparison.memory is not None or comparison.gradient is not None
        for case in (comparison.ours, comparison.other)
    )
    turns = [(case, "seconds") for _ in range(runs) for case in cases] + [(case, "bytes") for case in in_memory]
    results = {"seconds": defaultdict(list), "bytes": defaultdict(list)}
    for case, figure in (progress := tqdm(turns, unit="run")):
        progress.set_description(case)
        command = [sys.executable, __file__, "--size", size, "--case", case, "--figure", figure]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(f"The case {case!r} failed:\n{process.stderr[-2000:]}")
        results[figure][case].append(float(process.stdout.splitlines()[-1]))
    return tuple({case: statistics.median(values) for case, values in result.items()} for result in results.values())


def row(comparison: Comparison, seconds: dict[str, float], memory: dict[str, float], size: str) -> str:
    ours, other = seconds[comparison.ours], seconds[comparison.other]
    cells = [
        comparison.name,
        f"{ours:.3f} s",
        f"{other:.3f} s",
        f"{ours / other:.2f} x",
        f"{comparison.time:.2f} x",
    ]
    if comparison.memory is None and comparison.gradient is None:
        cells += [""] * 4
    else:
        ours, other = memory[comparison.ours], memory[comparison.other]
        bar = comparison.memory
        if comparison.gradient is not None:
            bar = 1 + gradient_growth(size)[comparison.gradient] / other
        cells += [f"{ours / 2**20:.0f} MiB", f"{other / 2**20:.0f} MiB", f"{ours / other:.2f} x", f"{bar:.2f} x"]
    return "| " + " | ".join(cells) + " |"


def gradient_growth(size: str) -> dict[str, int]:
    """Bytes by which the gradients grow with eight times the positions, and with four times the vocabulary."""
    from cases import scale_size

    num_positions, hidden_size, vocab_size = scale_size(size)
    return {"hidden states": 7 * num_positions * hidden_size * 4, "head": 3 * vocab_size * hidden_size * 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "full", "7b"), default="full")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side")
    parser.add_argument("--only", help="comparisons whose name contains this")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what a process of its own measures,
    parser.add_argument("--figure", choices=FIGURES, help=argparse.SUPPRESS)  # and which figure of it
    args = parser.parse_args()
    if args.case:
        print(FIGURES[args.figure](args.case, args.size))
        return
    comparisons = CUDA_COMPARISONS if args.size == "7b" else COMPARISONS
    if args.only:
        comparisons = [comparison for comparison in (*comparisons, PACKING) if args.only in comparison.name]
    seconds, memory = measure_in_turn(comparisons, args.size, args.runs)
    print(f"\n{machine()}; size {args.size}, medians of {args.runs} runs in turn\n")
    print("| comparison | ours | other | time | bar | ours | other | memory | bar |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(row(comparison, seconds, memory, args.size) for comparison in comparisons))


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {model}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
