"""The tables of docs/many-gpus.md: communication against a step, for 1 to 256 H100, computed by the plan.

    python benchmarks/many_gpus.py            prints them
    python benchmarks/many_gpus.py --write    puts them into the page

Nothing here is measured; `mamba_sft/planning/communication.py` has the formulas.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from mamba_sft import Recipe
from mamba_sft.planning.communication import MODES, Cluster
from mamba_sft.planning.many import Shared, plan_many
from mamba_sft.planning.plan import make_plan
from mamba_sft.wording import size_text

PAGE = Path(__file__).parents[1] / "docs/many-gpus.md"
BEGIN, END = "<!-- computed: benchmarks/many_gpus.py -->", "<!-- until here -->"
RECIPE, CARD, ON_A_MACHINE = "instruct-multi-gpu", "h100", 8
LINKS = (25.0, 100.0, 400.0)
COUNTS = tuple(1 << power for power in range(9))
ENOUGH = (16, 256)
TOKENS = 8192
"""Of a micro-batch of the recipe."""
ROWS, MICRO_BATCH = 512, 4
"""Of the optimizer step that is shared out: a million tokens, so that 256 GPUs have two rows each."""
PAYS = 1.5
"""How many times as fast a step has to be on twice as many GPUs."""


def shared(count: int, link: float, *overrides: str) -> dict[str, Shared]:
    """Returns the plan of each mode on `count` GPUs."""
    recipe = Recipe.load(RECIPE, overrides=list(overrides))
    cluster = Cluster(min(count, ON_A_MACHINE), max(1, count // ON_A_MACHINE), link)
    many = plan_many(recipe, make_plan(recipe, CARD), cluster)
    return {one.mode: one for one in many.shared}


def tables() -> str:
    """Returns all tables as Markdown."""
    return "\n".join((*same_work(), *same_step()))


def same_work() -> Iterator[str]:
    """Every GPU has a micro-batch of its own, so a step has more tokens on more of them."""
    plans = {link: {count: shared(count, link) for count in COUNTS} for link in LINKS}
    alone = plans[LINKS[0]][1]["ddp"].step
    yield f"A micro-batch of {TOKENS:,} tokens on each GPU, {seconds(alone)} of computing (estimated).\n"
    for mode in MODES:
        yield f"**{mode}**: what is added to a step, and the share of the step that it is\n"
        yield "| GPUs | memory of each | sent by each | " + " | ".join(f"{x:g} Gb/s" for x in LINKS) + " |"
        yield "|---:|---:|---:|" + "---:|" * len(LINKS)
        for count in COUNTS:
            ways = [plans[link][count][mode] for link in LINKS]
            cells = [size_text(ways[0].peak), size_text(ways[0].traffic.sent) if count > 1 else ""]
            cells += [added(way) if count > 1 else "" for way in ways]
            yield f"| {count} | " + " | ".join(cells) + " |"
        yield ""
    yield "Tokens a GPU needs in a step (fsdp: in a micro-batch) to compute as long as it communicates:\n"
    yield "| | " + " | ".join(f"{count} GPUs, {link:g} Gb/s" for count in ENOUGH for link in LINKS) + " |"
    yield "|---|" + "---:|" * (len(ENOUGH) * len(LINKS))
    for mode in MODES:
        cells = [f"{enough(plans[link][count][mode]):,}" for count in ENOUGH for link in LINKS]
        yield f"| {mode} | " + " | ".join(cells) + " |"
    yield ""


def enough(one: Shared) -> int:
    """Returns the tokens that take a GPU as long as what is sent, in hundreds."""
    rate = TOKENS / ((one.step or 1.0) - one.communication)
    return round(one.communication * rate / 100) * 100


def same_step() -> Iterator[str]:
    """A step of a million tokens, shared out."""
    steps = {
        link: {count: shared(count, link, *split(count)) for count in COUNTS} for link in LINKS
    }  # fmt: skip
    yield f"A step of {ROWS * 2048:,} tokens, shared out: its time, and how much faster than one GPU.\n"
    yield "| GPUs | " + " | ".join(f"{mode}, {link:g}" for mode in MODES for link in LINKS) + " |"
    yield "|---:|" + "---:|" * (len(MODES) * len(LINKS))
    for count in COUNTS:
        cells = []
        for mode in MODES:
            for link in LINKS:
                step = steps[link][count][mode].step or 0.0
                cells.append(f"{seconds(step)} ({(steps[link][1][mode].step or 0.0) / step:.3g})")
        yield f"| {count} | " + " | ".join(cells) + " |"
    yield ""
    yield f"Twice the GPUs make a step at least {PAYS} times as fast up to:\n"
    yield "| | " + " | ".join(f"{link:g} Gb/s" for link in LINKS) + " |"
    yield "|---|" + "---:|" * len(LINKS)
    for mode in MODES:
        points = (paying({count: steps[link][count][mode] for count in COUNTS}) for link in LINKS)
        yield f"| {mode} | " + " | ".join(points) + " |"


def split(count: int) -> tuple[str, str]:
    """Returns the overrides that give each GPU its part of the step's rows."""
    rows = ROWS // count
    at_once = min(MICRO_BATCH, rows)
    return (
        f"train.per_device_train_batch_size={at_once}",
        f"train.gradient_accumulation_steps={rows // at_once}",
    )


def paying(plans: dict[int, Shared]) -> str:
    """Returns the number of GPUs up to which doubling it pays."""
    for fewer, more in pairwise(COUNTS):
        if (plans[fewer].step or 0.0) < PAYS * (plans[more].step or 0.0):
            return f"{fewer} GPUs"
    return f"{COUNTS[-1]} GPUs or more"


def added(one: Shared) -> str:
    """Returns seconds and share of a step."""
    return f"{seconds(one.communication)}, {one.communication / (one.step or 1.0):.1%}"


def seconds(value: float | None) -> str:
    """Returns a time with three figures."""
    if value is None:
        return "unknown"
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def with_tables(page: str) -> str:
    """Returns the page with its tables computed anew."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Prints the tables, or writes them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them into docs/many-gpus.md")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
