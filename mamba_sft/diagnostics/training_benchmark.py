"""`bench train`: how fast this machine takes the optimizer steps of a recipe, and how fast stock tools would.

Imports no torch: what can be said without is said before it is loaded, and the steps are taken in processes
of their own, one after the other, so that the memory of each is its own.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from mamba_sft.diagnostics.benched_recipe import check_recipe, missing_sources, peer_targets
from mamba_sft.diagnostics.measured_process import Fact, NoMemoryError, TooLongError, told_by
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.wording import count_text, time_text

logger = logging.getLogger(__name__)

WARM_UP, PEER_WARM_UP = 2, 1
"""Steps that are not counted: the first compiles kernels, and allocators grow. Stock compiles nothing."""
PEER = "transformers + PEFT"


def measure_training(
    recipe: Recipe, *, steps: int = 5, peer: bool = True, peer_seconds: float = 120.0
) -> dict[str, Any]:
    """Takes some optimizer steps of a recipe, and the same ones with stock transformers and PEFT.

    Nothing is written into `output_dir`. A recipe whose data are not on this machine gets rows of random
    tokens of its length.

    Args:
        recipe: What would be trained.
        steps: Optimizer steps that are counted; those of the warm-up come before.
        peer: Whether to measure stock transformers and PEFT.
        peer_seconds: When they are stopped, counted from the begin of their first step.

    Returns:
        JSON-safe: `benchmark`, `machine`, `settings`, `rows`, `ours`, `peer` (None: not measured),
        `times_peer`, `times_peer_in_cpu_time` and `peak_of_peer` (None where either is not known), `plan`.

    Raises:
        MambaSFTError: Anything in recipe, base or data that would make training fail.
    """
    check_recipe(recipe)
    load = current_load()
    missing = missing_sources(recipe)
    if missing:
        logger.warning("`%s` is not on this machine: rows of random tokens take its place", missing[0])
    ours = _measure_ours(recipe, steps)
    stock = _measure_peer(recipe, steps, peer_seconds) if peer else None
    return {
        "benchmark": "train",
        "machine": machine_facts(load),
        "settings": {
            "steps": steps,
            "warm_up": WARM_UP,
            "base": recipe.model.base,
            "dtype": recipe.model.dtype,
        },
        "rows": {
            "made_up": bool(missing),
            "max_length": recipe.data.max_length,
            "batch_size": recipe.train.per_device_train_batch_size,
            "tokens_per_step": ours["tokens_per_step"],
        },
        "ours": ours,
        "peer": stock,
        "times_peer": _ratio(ours, stock, "tokens_per_second"),
        "times_peer_in_cpu_time": _ratio(stock or ours, stock and ours, "cpu_seconds_per_token"),
        "peak_of_peer": _ratio(ours, stock, "peak_bytes"),
        "plan": _planned(recipe, ours),
    }


def _measure_ours(recipe: Recipe, steps: int) -> dict[str, Any]:
    from mamba_sft.diagnostics.training_steps import take_our_steps

    logger.info("measuring mamba-sft: %s after %d to warm up", count_text(steps, "step"), WARM_UP)
    with tempfile.TemporaryDirectory(prefix="mamba-sft-bench-") as place:
        told = list(told_by(take_our_steps, recipe, steps + WARM_UP, place, what="our steps"))
    return summed_up(told, WARM_UP)


def _measure_peer(recipe: Recipe, steps: int, seconds: float) -> dict[str, Any]:
    from mamba_sft.diagnostics.training_steps import take_stock_steps

    logger.info("measuring %s, %s at most", PEER, time_text(seconds))
    told: list[Fact] = []
    ended = below = None
    try:
        count = steps + PEER_WARM_UP
        for fact in told_by(take_stock_steps, recipe, count, what="stock steps", seconds=seconds):
            told.append(fact)
    except TooLongError:
        ended = f"stopped after {time_text(seconds)}"
        if not any("seconds" in fact for fact in told):  # not one micro-batch was done
            below = told[0]["next_tokens"] / seconds
    except NoMemoryError:
        ended = "out of memory"
    left_out = []
    if recipe.adapter is not None:
        targets = recipe.adapter.target_modules
        left_out = [name for name in targets if name not in peer_targets(targets)]
    return summed_up(told, PEER_WARM_UP) | {
        "of": PEER, "ended": ended, "below_tokens_per_second": below, "without_lora_on": left_out,
    }  # fmt: skip


def summed_up(told: Sequence[Fact], warm_up: int) -> dict[str, Any]:
    """Returns what the steps come to: medians, and the least and the most.

    Where not one step after the warm-up came to its end, the rate is that of what was done of the last one.

    Args:
        told: What the process told.
        warm_up: Steps that are not counted.
    """
    whole = [fact for fact in told if "seconds" in fact and "batch" not in fact]
    counted = [fact for fact in whole if fact["step"] > warm_up] or whole[1:] or whole
    partly = counted or [fact for fact in told if "batch" in fact][-1:]
    rates, seconds = ([of(fact) for fact in partly] for of in (_rate, lambda fact: fact["seconds"]))
    if not counted and partly:  # of a step that was not ended
        done = [fact for fact in told if fact.get("batch") is not None and fact["step"] == partly[0]["step"]]
        rates = [sum(fact["tokens"] for fact in done) / partly[0]["seconds"]]
    losses = [fact["loss"] for fact in told if "loss" in fact]
    return {
        "of": "mamba-sft",
        "steps": len(counted),
        "tokens_per_second": _median(rates),
        "tokens_per_second_range": _ends(rates),
        "seconds_per_step": _median(seconds) if counted else None,
        "seconds_per_step_range": _ends(seconds) if counted else None,
        "cpu_seconds_per_token": _median([fact["cpu_seconds"] / fact["tokens"] for fact in counted]),
        "tokens_per_step": _median([fact["tokens"] for fact in counted]),
        "peak_bytes": max((fact["peak_bytes"] for fact in told if "peak_bytes" in fact), default=None),
        "first_loss": losses[0] if losses else None,
        "seconds": [round(fact["seconds"], 4) for fact in whole],
    }


def _rate(fact: Fact) -> float:
    return float(fact["tokens"] / fact["seconds"])


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _ends(values: Sequence[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None


def _ratio(ours: dict[str, Any], stock: dict[str, Any] | None, name: str) -> float | None:
    if stock is None or not stock[name] or not ours[name]:
        return None
    return float(ours[name] / stock[name])


def current_load() -> float | None:
    """Returns the load that others put on the machine; None where the system does not say."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def machine_facts(load: float | None) -> dict[str, Any]:
    """Returns what a number must be quoted with.

    Args:
        load: Of the machine before it was measured.
    """
    import torch

    from mamba_sft.diagnostics.kernel_benchmark import machine

    facts = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return facts | ({"load": load} if "load" in facts else {})


def _planned(recipe: Recipe, ours: dict[str, Any]) -> dict[str, Any] | None:
    """What `plan` says of the same recipe: how far its speed is off, and on a CPU its processor time."""
    from mamba_sft.planning.plan import make_plan

    planned = make_plan(recipe).rate
    if planned is None:
        return None
    rate, spent = ours["tokens_per_second"], ours["cpu_seconds_per_token"]
    of_measured = planned.tokens_per_second / rate if rate else None
    in_cpu_time = spent / planned.cpu_seconds if spent and planned.cpu_seconds else None
    return {
        "tokens_per_second": planned.tokens_per_second, "source": planned.source,
        "processor": planned.processor, "of_measured": of_measured, "of_measured_in_cpu_time": in_cpu_time,
    }  # fmt: skip
