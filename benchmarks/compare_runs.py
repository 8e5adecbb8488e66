"""Whether two runs are the same run: for refactorings, which must not change a single bit.

    python benchmarks/compare_runs.py runs/before runs/after

Compares every logged number that training computes (losses, gradient norms, learning rates, token counts,
entropies and accuracies; times and speeds are left out) and every tensor of the two adapters, bit for bit.
Exit code 0 if all of it is identical, else 1, after the first and the largest difference of each kind. Bits
agree only on one machine, with the same versions and the same number of threads.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from mamba_sft.run import ADAPTER_WEIGHTS, Run

TIMED = ("runtime", "per_second", "time", "seconds", "flos", "memory")
"""Parts of the names of what is measured and not computed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("a", help="a run directory")
    parser.add_argument("b", help="the run to hold it against")
    arguments = parser.parse_args()
    a, b = (Run.open(Path(name)) for name in (arguments.a, arguments.b))
    differences = [*metric_differences(a.read_metrics(), b.read_metrics()), *adapter_differences(a, b)]
    for line in differences:
        print(line)
    if not differences:
        steps = max((line["step"] for line in a.read_metrics()), default=0)
        print(f"identical: {len(a.read_metrics())} lines of metrics up to step {steps}, and the adapters")
    return bool(differences)


def metric_differences(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Iterator[str]:
    """Yields a line for every name whose logged values are not the same in both, and for missing lines."""
    left, right = _by_name(a), _by_name(b)
    for name in sorted({*left, *right}):
        ours, theirs = left.get(name, {}), right.get(name, {})
        if ours.keys() != theirs.keys():
            places = sorted(ours.keys() ^ theirs.keys())
            yield f"{name}: only one of them logged it at step {places[0][0]} ({len(places)} such places)"
        apart = {
            at: abs(ours[at] - theirs[at]) for at in ours.keys() & theirs.keys() if ours[at] != theirs[at]
        }
        apart = {
            at: gap for at, gap in apart.items() if not (math.isnan(ours[at]) and math.isnan(theirs[at]))
        }
        if apart:
            first = min(apart)
            yield (
                f"{name}: {len(apart)} of {len(ours)} values differ, first at step {first[0]}"
                f" ({ours[first]!r}, {theirs[first]!r}), by at most {max(apart.values()):.3g}"
            )


def adapter_differences(a: Run, b: Run) -> Iterator[str]:
    """Yields a line for every adapter tensor that is not the same, bit for bit, in both runs."""
    left, right = (load_file(run.adapter / ADAPTER_WEIGHTS) for run in (a, b))
    for name in sorted({*left, *right}):
        if name not in left or name not in right:
            yield f"{name}: only in one of the adapters"
        elif left[name].shape != right[name].shape or left[name].dtype != right[name].dtype:
            yield f"{name}: {left[name].shape} {left[name].dtype}, {right[name].shape} {right[name].dtype}"
        elif not left[name].equal(right[name]):
            gap = (left[name].double() - right[name].double()).abs().max().item()
            yield f"{name}: differs by at most {gap:.3g}"


def _by_name(lines: list[dict[str, Any]]) -> dict[str, dict[tuple[int, int], float]]:
    """Every computed number by its name, then by its step and its place among the lines of that step."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float) and not any(part in name for part in TIMED):
                values = found.setdefault(name, {})
                place = 0
                while (line["step"], place) in values:
                    place += 1
                values[line["step"], place] = float(value)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
