"""The built-in recipes beside what they take: measured where something was measured, planned elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from mamba_sft.planning.plan import Plan, make_plan
from mamba_sft.recipe.builtin import builtin_recipes
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.wording import size_text, time_text

MEASURED = Path(__file__).with_name("measured.json")
"""By recipe: what a run of it took and came to, where, when, and by which command."""
CARDS = {
    "instruct": ("h100", 1, "one 80 GB card"),
    "instruct-qlora": ("4090", 1, "one 24 GB card"),
    "instruct-t4": ("t4", 1, "Colab's T4, 16 GB"),
    "instruct-multi-gpu": ("h100", 8, "eight 80 GB cards"),
    "instruct-2x24gb": ("4090", 2, "two 24 GB cards"),
    "long-context": ("4090", 1, "one 24 GB card, rows of 32k tokens and more"),
    "continue-pretraining": ("4090", 1, "one 24 GB card, plain text with chats mixed in"),
    "falcon-mamba-procedure": ("h100", 1, "one 80 GB card, the published procedure"),
    "quickstart": (None, 1, "any CPU, the tiny base"),
}
"""The card that a recipe is planned for, how many of them, and what it is for."""


def text() -> str:
    """Returns the table, and below it where the measured lines are from."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    lines = [
        "| recipe | for | base weights | memory | speed | time | val loss | exact match |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    others = [name for name in builtin_recipes() if name not in CARDS]
    for name in ["quickstart", *(name for name in CARDS if name != "quickstart"), *others]:
        made = measured.get(name)
        lines.append(_measured(name, made) if made else _planned(name))
    lines.append("\nMeasured: " + "; ".join(_where(name, made) for name, made in measured.items()) + ".")
    lines.append(
        "All else is planned for one of the cards named, by `mamba-sft plan RECIPE --card NAME`, and not "
        "measured: memory of one card, speed of all without what they send, time at most, as if every row "
        "were as long as `data.max_length`."
    )
    return "\n".join(lines)


def _base(recipe: Recipe) -> str:
    weights = {"none": recipe.model.dtype, "nf4": f"NF4, {recipe.model.dtype}", "int8": "int8"}
    return weights[recipe.model.quantization]


def _measured(name: str, made: dict[str, str]) -> str:
    cells = [made[key] for key in ("memory", "speed", "time", "loss", "exact_match")]
    base = _base(Recipe.load(name))
    return f"| `{name}` | {CARDS[name][2]} | {base} | " + " | ".join(f"**{one}**" for one in cells) + " |"


def _planned(name: str) -> str:
    recipe = Recipe.load(name)
    card, count, about = CARDS.get(name, ("h100", 1, "one 80 GB card"))
    plan = make_plan(recipe, card)
    speed = f"{count * plan.rate.tokens_per_second:,.0f} tokens/s" if plan.rate else ""
    cells = [_base(recipe), size_text(plan.peak), speed, _planned_time(plan, count), "", ""]
    return f"| `{name}` | {about} | " + " | ".join(cells) + " |"


def _planned_time(plan: Plan, count: int) -> str:
    """The time of a run whose tokens the plan knows; of others that of a million tokens."""
    if plan.seconds:
        return time_text(plan.seconds / count)
    if plan.rate is None:
        return "by the data"
    return f"{time_text(1e6 / (count * plan.rate.tokens_per_second))} for 1M tokens"


def _where(name: str, made: dict[str, str]) -> str:
    return f"`{name}` on {made['machine']}, {made['date']}, by `{made['command']}`"
