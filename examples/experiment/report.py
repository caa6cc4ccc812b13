"""
Tables and a figure of the experiment, from its results alone:

    python examples/experiment/report.py runs/experiment/results.json

It prints the tables in Markdown, and writes them and the figure beside the results; of a part of the replicates it
prints them alone.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib
from data import WORLDS, get_world
from demo import markdown_table
from evaluate import get_interval
from measure import SETS


matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables, and of all replicates writes `report.md` and `report.png` into the folder of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--from_replicate", type=int, default=0, help="leaves those before it out, and writes nothing")
    args = parser.parse_args(arguments)
    path, results = args.results, json.loads(args.results.read_text())
    for setting, done in results["settings"].items():
        results["settings"][setting] = {n: record for n, record in done.items() if int(n) >= args.from_replicate}
    changes = "".join(f"- {change}\n" for change in results["plan"]["changes"]) or "- none\n"
    tables = [make_tables(results["plan"], name, done) for name, done in results["settings"].items() if done]
    text = "\n".join([f"Changes of the plan:\n\n{changes}", *tables])
    if not args.from_replicate:
        path.with_name("report.md").write_text(text)
        draw(results, path.with_name("report.png"))
    print(text)


def get_differences(done: dict[str, dict], first: str, second: str, name: str, measure: str) -> list[float]:
    """`measure` of the set `name`, first arm minus second, of each replicate that has both."""
    arms = [record["arms"] for _, record in sorted(done.items(), key=lambda item: int(item[0]))]
    return [a[first][name][measure] - a[second][name][measure] for a in arms if first in a and second in a]


def find_comparisons(plan: dict[str, Any], done: dict[str, dict]) -> list[tuple[str, str]]:
    """The comparisons, primary ones first, that there are replicates of."""
    pairs = [tuple(pair) for pair in plan["primary"] + plan["comparisons"]]
    return [pair for pair in pairs if get_differences(done, *pair, "main", "all")]


def make_tables(plan: dict[str, Any], setting: str, done: dict[str, dict]) -> str:
    """Arms, comparisons, on average and by replicate, and visual words of a setting."""
    asked = {kind for record in done.values() for measured in record["arms"].values() for kind in measured["main"]}
    kinds = [kind for kind in WORLDS[get_world(plan, setting)].KINDS if kind in asked]  # of few questions not all
    columns = [("main", measure) for measure in (*kinds, "all", "present_found", "absent_denied")]
    columns += [(name, "all") for name in SETS[1:]]
    header = ["arm", "replicates", *kinds, "all", "present found", "absent denied"]
    rows = []
    for arm in plan["arms"]:
        measured = [record["arms"][arm] for record in done.values() if arm in record["arms"]]
        if measured:
            means = [sum(m[name][measure] for m in measured) / len(measured) for name, measure in columns]
            nll = sum(m["main"]["nll"] for m in measured) / len(measured)
            kl = sum(m["kl"]["all"] for m in measured) / len(measured)
            rows.append([arm, str(len(measured)), *(f"{mean:.1%}" for mean in means), f"{nll:.3f}", f"{kl:.2f}"])
    arms = markdown_table([*header, *(n.replace("_", " ") for n in SETS[1:]), "nats a token", "KL at the end"], rows)

    compared = [(name, "all") for name in SETS] + [("main", "present_found"), ("main", "absent_denied")]
    rows, each = [], []
    for first, second in find_comparisons(plan, done):
        differences = [get_differences(done, first, second, *column) for column in compared]
        cells = [show(values, 100, 1) for values in differences]
        points = [100 * difference for difference in differences[0]]
        nll = show(get_differences(done, first, second, "main", "nll"), 1, 3)
        primary = "yes" if [first, second] in plan["primary"] else ""
        rows.append([f"{first} − {second}", primary, str(len(points)), *cells, nll])
        each.append([f"{first} − {second}", ", ".join(f"{difference:+.1f}" for difference in points)])
    names = [f"{name.replace('_', ' ')}, {plan['questions'].get(name, plan['questions']['others'])}" for name in SETS]
    names += ["present found", "absent denied"]
    comparisons = markdown_table(["points, questions", "primary", "replicates", *names, "nats a token"], rows)
    replicates = markdown_table(["points of main", "each replicate"], each)

    starts = [record["stage3"] for record in done.values()]
    rows = [
        [name, *(show([start[name][kind] for start in starts], 1, 3, sign="") for kind in starts[0][name])]
        for name in starts[0]
    ]
    words = markdown_table([f"visual words, {len(starts)} stages III, nats", *starts[0]["kl"]], rows)
    return f"## {setting}\n\n{arms}\n{comparisons}\n{replicates}\n{words}"


def show(values: list[float], scale: float, digits: int, sign: str = "+") -> str:
    """Mean and 95 % interval over replicates; of a single one there is no interval."""
    mean, half_width = get_interval([scale * value for value in values])
    return f"{mean:{sign}.{digits}f}" + (f" ± {half_width:.{digits}f}" if len(values) > 1 else "")


def draw(results: dict[str, Any], path: Path) -> None:
    """
    Each comparison on `main`: a dot a replicate, a bar for the 95 % interval, and a line at zero. Nothing if no
    replicate has both arms of one yet.
    """
    plan = results["plan"]
    settings = {name: find_comparisons(plan, done) for name, done in results["settings"].items()}
    settings = {name: pairs for name, pairs in settings.items() if pairs}
    if not settings:
        return
    heights = [len(pairs) + 1.5 for pairs in settings.values()]
    figure, axes = plt.subplots(
        len(settings),
        figsize=(10, 0.45 * sum(heights) + 0.6),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (setting, pairs) in zip(axes[:, 0], settings.items(), strict=True):
        axis.axvline(0, color="black", linewidth=1)
        means = []
        for row, (first, second) in enumerate(pairs):
            points = [100 * d for d in get_differences(results["settings"][setting], first, second, "main", "all")]
            color = "tab:red" if [first, second] in plan["primary"] else "tab:blue"
            mean, half_width = get_interval(points)
            axis.plot(points, [row + 0.18] * len(points), "o", color=color, alpha=0.4, markersize=4)
            if len(points) > 1:
                axis.plot([mean - half_width, mean + half_width], [row, row], color=color, linewidth=3)
            axis.plot(mean, row, "|", color="black", markersize=9)
            means.append(show(points, 1, 1) + f", n = {len(points)}")
        axis.set_title(setting, loc="left")
        axis.set_yticks(range(len(pairs)), [f"{first} − {second}" for first, second in pairs])
        axis.set_ylim(len(pairs) - 0.4, -0.6)
        right = axis.secondary_yaxis("right")
        right.set_yticks(range(len(pairs)), means)
        right.tick_params(length=0)
    axes[-1, 0].set_xlabel("points of exact match; a dot is a replicate, a bar the 95 % interval, red is primary")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
