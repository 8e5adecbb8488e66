"""The lines of `plan` about many GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mamba_sft.errors import UsageError
from mamba_sft.wording import count_text, size_text, time_text

if TYPE_CHECKING:
    from mamba_sft.planning.many import ManyPlan, Shared
    from mamba_sft.planning.plan import Plan
    from mamba_sft.recipe.recipe import Recipe


def plan_asked(
    recipe: Recipe, made: Plan, processes: int | None, nodes: int | None, link: float | None
) -> ManyPlan | None:
    """Returns the plan for the GPUs that the options name; None where they name none."""
    from mamba_sft.planning.communication import LINK, Cluster
    from mamba_sft.planning.many import plan_many

    if processes is None:
        for option, value in {"--nodes": nodes, "--link": link}.items():
            if value is not None:
                raise UsageError(
                    f"`{option}` goes with `--processes`", hint="say how many GPUs a machine has"
                )
        return None
    cluster = Cluster(processes, 1 if nodes is None else nodes, LINK if link is None else link)
    return plan_many(recipe, made, cluster)


def many_lines(many: ManyPlan) -> Iterator[tuple[str, str]]:
    """Yields the head and the text of each line."""
    cluster, links = many.cluster, many.links
    where = f"on {cluster.nodes} machines of {cluster.processes}" if cluster.nodes > 1 else "on one machine"
    yield "many GPUs", f"{count_text(cluster.total, 'process', 'es')} {where}; estimated, not measured"
    between = f", {links.between / 1e9:g} GB/s between ({cluster.link:g} Gb/s)" if links.between else ""
    yield "", f"{links.inside / 1e9:g} GB/s within ({links.name}){between}"
    steps = "steps: known when the data is here" if many.steps is None else f"{many.steps:,} steps"
    yield "", f"{many.tokens_per_step:,} tokens a step over all; {steps}"
    known = any(shared.seconds is not None for shared in many.shared)
    head = ("", "memory of each", "sent", "adding at most", "a step", "in all" if known else "1M tokens")
    rows = [head, *(_shared(shared, many.tokens_per_step) for shared in many.shared)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "", " ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _shared(shared: Shared, tokens: int) -> tuple[str, ...]:
    step, whole = shared.step, shared.seconds
    if step is not None and whole is None:
        whole = step * 1e6 / tokens
    least = shared.peak if shared.fits or shared.peak >= shared.loaded else shared.loaded
    loads = " to load" if least != shared.peak else ""
    return (
        shared.mode,
        size_text(least) + loads + ("" if shared.fits else ", too much"),
        size_text(shared.traffic.sent),
        _seconds(shared.communication) + (f" ({shared.communication / step:.1%})" if step else ""),
        _seconds(step) if step is not None else "unknown",
        time_text(whole) if whole is not None else "unknown",
    )


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
