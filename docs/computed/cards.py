"""What each card can do with Falcon-Mamba-7B, by plan: `mamba-sft plan RECIPE --card NAME` for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mamba_sft.planning.gpus import GPUS
from mamba_sft.planning.plan import Plan, make_plan
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.wording import size_text

WAYS = {
    "LoRA, 16 bits (`instruct`)": ("instruct", ()),
    "QLoRA, 4 bits (`instruct-qlora`)": ("instruct-qlora", ()),
    "QLoRA, small (`instruct-t4`)": ("instruct-t4", ()),
    "rows of 32k (`long-context`)": ("long-context", ()),
    "all weights (`instruct adapter=none`)": ("instruct", ("adapter=none",)),
}
"""What a table's column is called, and the recipe with its overrides."""
SMALLEST = ("train.per_device_train_batch_size=1", "train.checkpointing=block")
"""What a recipe is tried with before it is said not to fit."""


def text() -> str:
    """Returns a table of memory and one of speed, a line for each card."""
    recipes = {way: Recipe.load(name, overrides=list(more)) for way, (name, more) in WAYS.items()}
    least = {
        way: Recipe.load(name, overrides=[*more, *SMALLEST])
        if name != "long-context"  # it is as small as it gets already
        else recipes[way]
        for way, (name, more) in WAYS.items()
    }
    plans = {
        card: {way: (make_plan(recipes[way], card), make_plan(least[way], card)) for way in WAYS}
        for card in GPUS
    }
    return "\n".join(
        [
            "Memory of a step, and of one row of 2,048 tokens where the recipe as it is does not fit:\n",
            *_table(plans, _memory),
            "Tokens a second, by counting operations, and the largest micro-batch at the recipe's length:\n",
            *_table(plans, _speed),
        ]
    )


Pair = tuple[Plan, Plan]


def _table(plans: dict[str, dict[str, Pair]], cell: Callable[[Pair], str]) -> Iterator[str]:
    yield "| `--card` | usable | " + " | ".join(WAYS) + " |"
    yield "|---|---:|" + "---:|" * len(WAYS)
    for card, ways in plans.items():
        usable = size_text(GPUS[card].usable_bytes)
        cells = [cell(pair) for pair in ways.values()]
        yield f"| `{card}` | {usable} | " + " | ".join(cells) + " |"
    yield ""


def _memory(pair: Pair) -> str:
    whole, least = pair
    if whole.fits:
        return size_text(whole.peak)
    return f"one row: {size_text(least.peak)}" if least.fits else "no"


def _speed(pair: Pair) -> str:
    plan = pair[0] if pair[0].fits else pair[1]
    if not plan.fits or plan.rate is None:
        return ""
    return f"{plan.rate.tokens_per_second:,.0f} ({plan.largest_rows})"
