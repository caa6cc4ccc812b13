# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures this implementation against its alternatives and against floors, side by side on one machine:

    make bench                                      # full size
    python benchmarks/run.py --size small           # a quick look
    python benchmarks/run.py --only TRL             # comparisons whose name contains this
    python benchmarks/run.py --only packed          # whether packing pays on this machine
    python benchmarks/run.py --only any-res         # VLSA's memory; needs diffusers (the extra `vlsa`)
    python benchmarks/run.py --size 7b --only kl    # on a CUDA machine

Time is the median ratio of pairs of steps: both sides take turns in one process. On a CPU it is processor time on one
thread, which other processes of the machine disturb least, and memory stays with the process between steps, as CUDA's
allocator has it, so that fresh pages cost neither side; on CUDA it is the time that passes. Memory is the peak that a
step adds to its inputs, in a process of its own: the operating system's peak resident set on a CPU, the allocator's
peak on CUDA.

Exits with 1 if a bar is missed by more than the noise, which is the standard error of the median ratio. Bars are those
of the full size: at the small one, calls of functions weigh more than what is in them.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path


@dataclass(frozen=True)
class Comparison:
    """`ours` against `other`: at most `time` times the time and `memory` times the memory.

    `gradient` names the matrix that is larger in `ours`: memory may grow by as much as its gradient, and no more.
    """

    name: str
    ours: str
    other: str
    time: float | None = None
    memory: float | None = None
    gradient: str | None = None


COMPARISONS = (
    Comparison("fused KL against its four matrix products", "kl", "kl floor", 1.05),
    Comparison("the same at the hidden size of a 7B decoder", "wide kl", "wide kl floor", 1.05),
    Comparison("stage IV step against decoder and products", "stage 4", "stage 4 floor", 1.05),
    Comparison("stage III step against gradient and chunk", "stage 3", "stage 3 floor", memory=1.1),
    Comparison("stage II step against TRL's defaults", "trainer", "trainer trl", 1.0, 1.0),
    Comparison("stage II step against TRL's best in bf16", "trainer bf16", "trainer bf16 trl", 1.0, 1.0),
    Comparison("stage II step against TRL's best in fp32", "trainer fp32", "trainer fp32 trl", 1.0, 1.0),
    Comparison("fused KL against full logits", "kl", "kl written out", 0.95, 0.40),
    Comparison("fused KL against TRL's chunked divergence", "kl", "kl trl", 1.0, 0.15),
    Comparison("text and KL in one against apart", "text and kl", "text and kl apart", 1.0),
    Comparison("stage IV step against full logits", "stage 4", "stage 4 written out", 1.0, 0.38),
    Comparison("stage III step against full logits", "stage 3", "stage 3 written out", 0.75, 1.0),
    Comparison("image positions x 8", "scale, positions", "scale", 8 * 1.1, gradient="hidden states"),
    Comparison("vocabulary x 4", "scale, vocabulary", "scale", 4 * 1.1, gradient="head"),
    Comparison("bf16 head gradient by tiles, not at once", "bf16 head by tiles", "bf16 head at once", 1.05, 0.60),
    Comparison("tower and SA-Perceiver against tower", "tower and perceiver", "tower", 1.05),
    Comparison("VLSA's stage I step against any-res", "vlsa", "any-res", memory=1.0),
    Comparison(
        "VLSA's stage I step against any-res, checkpointed", "vlsa checkpointed", "any-res checkpointed", memory=1.0
    ),
    Comparison("prefill against LLaVA", "prefill", "prefill llava", 1 / 0.98),
    Comparison("decoding against LLaVA", "decode", "decode llava", 1 / 0.98),
    Comparison("preprocessing against LLaVA", "preprocess", "preprocess llava", 1 / 0.98),
)
# Says whether `packing` pays on the machine at hand. Measured where `--only` asks for it.
PACKING = Comparison("packed row against padded batch", "packed", "padded", 1.0)
CUDA_COMPARISONS = (
    Comparison("fused KL against its four matrix products", "kl", "kl floor", 1.05),
    Comparison("fused KL against TRL's chunked divergence", "kl", "kl trl", 0.7, 1.0),
    Comparison("fused KL against Liger's fused linear JSD", "kl", "kl liger", 0.9, 1.0),
)

# Parameters of glibc's `mallopt`, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


def seconds_of_pairs(ours: str, other: str, size: str, num_pairs: int) -> list[tuple[float, float]]:
    """Seconds of a step of `ours` and of one of `other`, so many times, after a first that warms up."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # freed memory stays with the process
    import torch
    from cases import CASES

    torch.set_num_threads(1)
    steps = {case: CASES[case](size) for case in (ours, other)}
    now = time.perf_counter if torch.cuda.is_available() else time.process_time

    def seconds(case: str) -> float:
        start = now()
        steps[case]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return now() - start

    for case in steps:
        seconds(case)
    pairs = []
    for order, _ in zip(cycle([(ours, other), (other, ours)]), range(num_pairs)):
        pair = {case: seconds(case) for case in order}
        pairs.append((pair[ours], pair[other]))
    return pairs


def bytes_of_step(case: str, size: str) -> int:
    """Bytes that one step adds to what is resident before it, at its peak, after a first that warms up."""
    # Memory of a freed tensor goes back to the operating system at once. Otherwise glibc keeps it for reuse, and the
    # peak would count the holes between tensors.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)
    import torch
    from cases import CASES, FLOOR_BYTES

    if case in FLOOR_BYTES:
        return FLOOR_BYTES[case](size)
    torch.set_num_threads(1)
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


def resident(field: str) -> int:
    """Resident bytes of this process, now (`VmRSS`) or at most (`VmHWM`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_a_process(*arguments: str) -> list:
    """What this script prints when it is called with these arguments, read as JSON."""
    process = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def compare(comparison: Comparison, size: str, num_pairs: int) -> tuple[str, bool]:
    """A row of the table, and whether all of its bars hold."""
    cells, holds = [comparison.name], True
    if comparison.time is None:
        cells += [""] * 4
    else:
        pairs = in_a_process("--size", size, "--pairs", str(num_pairs), "--time", comparison.ours, comparison.other)
        ratios = [ours / other for ours, other in pairs]
        ratio, noise = statistics.median(ratios), standard_error(ratios)
        holds &= ratio - noise <= comparison.time
        for seconds in map(statistics.median, zip(*pairs, strict=True)):
            speed = f" ({four_products_flops(size) / seconds / 1e12:.0f} TFLOP/s)" if size == "7b" else ""
            cells.append(f"{seconds:.3f} s{speed}")
        cells += [f"{ratio:.3f} ± {noise:.3f}", f"{comparison.time:.2f}"]
    if comparison.memory is None and comparison.gradient is None:
        cells += [""] * 4
    else:
        ours, other = (in_a_process("--size", size, "--memory", case) for case in (comparison.ours, comparison.other))
        bar = comparison.memory
        if comparison.gradient is not None:
            bar = 1 + gradient_growth(size)[comparison.gradient] / other
        holds &= ours / other <= bar
        cells += [f"{ours / 2**20:.0f} MiB", f"{other / 2**20:.0f} MiB", f"{ours / other:.2f}", f"{bar:.2f}"]
    return "| " + " | ".join([*cells, "" if holds else "missed"]) + " |", holds


def standard_error(values: list[float]) -> float:
    """That of the median, from the interquartile range."""
    first, _, third = statistics.quantiles(values, n=4)
    return 0.93 * (third - first) / len(values) ** 0.5


def four_products_flops(size: str) -> int:
    """Those of the four matrix products behind every comparison of the size 7b."""
    from cases import LOSS_SIZES

    return 4 * 2 * math.prod(LOSS_SIZES[size])


def gradient_growth(size: str) -> dict[str, int]:
    """Bytes by which the gradients grow with eight times the positions, and with four times the vocabulary."""
    from cases import scale_size

    num_positions, hidden_size, vocab_size = scale_size(size)
    return {"hidden states": 7 * num_positions * hidden_size * 4, "head": 3 * vocab_size * hidden_size * 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "full", "7b"), default="full")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of steps that are timed")
    parser.add_argument("--only", help="comparisons whose name contains this")
    parser.add_argument("--time", nargs=2, help=argparse.SUPPRESS)  # what a process of its own measures
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.time:
        print(json.dumps(seconds_of_pairs(*args.time, args.size, args.pairs)))
        return
    if args.memory:
        print(json.dumps(bytes_of_step(args.memory, args.size)))
        return
    comparisons = CUDA_COMPARISONS if args.size == "7b" else COMPARISONS
    if args.only:
        comparisons = [comparison for comparison in (*comparisons, PACKING) if args.only in comparison.name]
    print(f"{machine()}; size {args.size}, medians of {args.pairs} pairs\n")
    print("| comparison | ours | other | time | bar | ours | other | memory | bar | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    missed = 0
    for comparison in comparisons:
        row, holds = compare(comparison, args.size, args.pairs)
        print(row, flush=True)
        missed += not holds
    if missed and args.size != "small":
        sys.exit(f"\n{missed} of {len(comparisons)} comparisons miss a bar.")


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {model}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
