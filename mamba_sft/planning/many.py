"""What a recipe takes on many GPUs: memory of each process, time of a step with what they tell each other."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mamba_sft.errors import UsageError
from mamba_sft.planning.communication import (
    MODES,
    Cluster,
    Links,
    Mode,
    Traffic,
    step_traffic,
)
from mamba_sft.planning.extent import run_length
from mamba_sft.planning.memory import peak, weights
from mamba_sft.planning.plan import Plan
from mamba_sft.planning.sharing import shared_parts
from mamba_sft.recipe.recipe import Recipe


@dataclass(frozen=True)
class Shared:
    """A way to share the work.

    Args:
        mode: Which.
        peak: Bytes of each process, at most, while it trains.
        loaded: Bytes of the whole base, which each process loads before it is shared.
        fits: Whether its GPU has both.
        traffic: What a process sends in an optimizer step.
        communication: Seconds of a step that it takes, at most: when none is hidden.
        step: Seconds of an optimizer step, None where the speed of the GPU is not known.
        seconds: Of the whole run, None where its length is not known either.
    """

    mode: Mode
    peak: int
    loaded: int
    fits: bool
    traffic: Traffic
    communication: float
    step: float | None
    seconds: float | None


@dataclass(frozen=True)
class ManyPlan:
    """A recipe on many GPUs.

    Args:
        cluster: How many.
        links: How fast they send.
        tokens_per_step: Positions of an optimizer step, over all.
        accumulation: Micro-batches of a step, in each process.
        steps: Optimizer steps, None where the data has to be seen first.
        shared: By mode.
    """

    cluster: Cluster
    links: Links
    tokens_per_step: int
    accumulation: int
    steps: int | None
    shared: list[Shared]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON-safe values."""
        return asdict(self) | {"processes": self.cluster.total}


def plan_many(recipe: Recipe, made: Plan, cluster: Cluster) -> ManyPlan:
    """Plans a recipe on many GPUs.

    Args:
        recipe: What would be trained.
        made: Its plan for one of them.
        cluster: How many there are.

    Raises:
        UsageError: It was planned for a CPU, which processes share.
    """
    if made.accelerator.type != "cuda":
        raise UsageError(
            "`--processes` plans for GPUs, and there is none here", hint="name one: `--card h100`"
        )
    work, links = made.work, Links.of(made.accelerator, cluster)
    length, accumulation, steps, tokens = made.length, made.accumulation, made.steps, made.most_tokens
    if length is not None:
        length = run_length(recipe, rows=length.rows, tokens=length.tokens, processes=cluster.total)
        accumulation, steps = length.accumulation, length.steps
    rows = work.rows * cluster.total  # at once, on all
    if ramp := recipe.train.batch_ramp:  # a step of its end
        accumulation, per_step = math.ceil(ramp.to / rows), ramp.to * work.length
    else:
        accumulation = accumulation or 1
        per_step = rows * work.length * accumulation
    if length is not None:
        filled = length.tokens / (length.rows * work.length) if length.rows else 1.0
        tokens = int(length.steps * per_step * filled)
    computing = None
    if made.rate is not None:
        computing = per_step / cluster.total / made.rate.tokens_per_second
    shared, loaded = [], weights(work)
    for mode in MODES:
        most = peak(shared_parts(mode, made.parts, work, cluster.total))
        traffic = step_traffic(mode, work, cluster.total, accumulation)
        communication = links.seconds(traffic)
        step = None if computing is None else computing + communication
        shared.append(
            Shared(
                mode=mode,
                peak=most,
                loaded=loaded,
                fits=max(most, loaded) <= made.accelerator.usable_bytes,
                traffic=traffic,
                communication=communication,
                step=step,
                seconds=None if step is None or tokens is None else step * tokens / per_step,
            )
        )
    return ManyPlan(cluster, links, per_step, accumulation, steps, shared)
