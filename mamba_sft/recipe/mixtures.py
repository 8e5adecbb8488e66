"""What sources are called, and what mixtures and stages owe them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from mamba_sft.recipe.fields import DataSection, SourceSection, StageSection, TrainSection
from mamba_sft.recipe.schedule_conflicts import Keys, Problem


def source_ids(data: DataSection) -> list[str]:
    """Returns what each source is called: its `id`, or its path's last part without what follows a dot."""
    return [source.id if source.id is not None else _called(source) for source in data.sources]


def _called(source: SourceSection) -> str:
    last = source.path.rstrip("/").rpartition("/")[2]
    return last.partition(".")[0] or last


def mixture_conflicts(data: DataSection, train: TrainSection) -> Iterator[Problem]:
    """Yields every clash of mixture, stages and sources."""
    if data.mixture is None:
        for number, source in enumerate(data.sources):
            if source.max_epochs is not None:
                yield Problem(
                    ("data", "sources", number, "max_epochs"),
                    "is a limit within a mixture, and there is none; set `data.mixture: {}`, or say with "
                    "`weight` how often an epoch shows the rows",
                    (("data", "mixture"),),
                )
        return
    ids = source_ids(data)
    for name in (name for name, count in Counter(ids).items() if count > 1):
        yield Problem(
            ("data", "sources"), f"must not have several called `{name}`: give each an `id` of its own"
        )
    yield from _curriculum_conflicts(("data", "mixture", "curriculum"), data.mixture.curriculum, data)
    stages = train.stages or []
    yield from _end_conflicts(stages)
    for number, stage in enumerate(stages):
        yield from _stage_conflicts(("train", "stages", number), stage, data, ids)


def _end_conflicts(stages: Sequence[StageSection]) -> Iterator[Problem]:
    """Where stages end: each later than the one before, the last with the run."""
    ends = [stage.until for stage in stages]
    for number, end in enumerate(ends):
        path = ("train", "stages", number)
        last, earlier = number == len(ends) - 1, ends[number - 1] if number else None
        if last and end is not None:
            yield Problem((*path, "until"), "must be left out in the last stage, which ends with the run")
        elif not last and end is None:
            yield Problem(path, "needs `until`, the share of the run where it ends")
        elif end is not None and earlier is not None and end <= earlier:
            yield Problem((*path, "until"), f"must be above that of the stage before, {earlier:g}")


def _stage_conflicts(path: Keys, stage: StageSection, data: DataSection, ids: list[str]) -> Iterator[Problem]:
    longest = data.max_length
    if stage.max_length is not None and longest is not None and stage.max_length > longest:
        yield Problem(
            (*path, "max_length"),
            f"must be at most `data.max_length` ({longest}), to which rows are cut",
            (("data", "max_length"),),
        )
    yield from _curriculum_conflicts((*path, "curriculum"), stage.curriculum, data)
    for name in stage.sources or {}:
        if name not in ids:
            close = get_close_matches(name, ids, n=1)
            meant = f"; did you mean `{close[0]}`?" if close else "."
            listed = ", ".join(f"`{one}`" for one in ids)
            yield Problem((*path, "sources", name), f"is no source{meant} Sources are called {listed}")
    if stage.sources is not None and not any(stage.sources.values()):
        yield Problem((*path, "sources"), "must have a weight above 0")


def _curriculum_conflicts(path: Keys, curriculum: str | None, data: DataSection) -> Iterator[Problem]:
    if curriculum != "difficulty":
        return
    lacking = [
        name
        for name, source in zip(source_ids(data), data.sources, strict=True)
        if "difficulty" not in source.columns
    ]
    if lacking:
        yield Problem(
            path,
            f"orders by a column, and the source `{lacking[0]}` does not say which; write "
            "`columns: {difficulty: COLUMN}` there",
            (("data", "sources"),),
        )
