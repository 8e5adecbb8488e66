"""Thousands of odd inputs, each of which has to get its answer: one message or a result, in bounded time.

    python benchmarks/fuzz.py recipes --count 10000 --seed 0

The strategies are those of the tests, which run a few hundred of each. Stops at the first input that has none
and prints it, made as small as it gets.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hypothesis import HealthCheck, given, seed, settings


def fuzz_recipes(count: int, start: int, scratch: Path) -> Counter[str]:
    """Recipe files with overrides; returns how many were answered in which way."""
    from tests.recipe.odd_recipes import check_answer, recipes, some_overrides

    answers: Counter[str] = Counter()

    @seed(start)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(recipes, some_overrides)
    def run(raw: bytes, overrides: list[str]) -> None:
        answer = check_answer(raw, overrides, scratch / "odd.yaml")
        answers["accepted" if answer == "valid" else "refused"] += 1
        answers["longest message"] = max(answers["longest message"], len(answer))

    run()
    return answers


MODES: dict[str, Callable[[int, int, Path], Counter[str]]] = {"recipes": fuzz_recipes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mamba-sft-fuzz-") as scratch:
        answers = MODES[arguments.mode](arguments.count, arguments.seed, Path(scratch))
    print(f"{arguments.mode}: {dict(answers)} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
