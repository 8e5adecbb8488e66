"""Several runs on one page: figures beside figures, curves over each other, what the recipes differ in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mamba_sft.errors import MambaSFTError, UsageError
from mamba_sft.evaluation import run_figures as figures
from mamba_sft.evaluation.pages import page_text
from mamba_sft.evaluation.prompts import Prompt, is_right
from mamba_sft.evaluation.run_facts import RunFacts, read_facts
from mamba_sft.evaluation.run_figures import Plot, ShownSample
from mamba_sft.evaluation.svg_plot import Curve, Point, in_both_widths, smooth, svg_text
from mamba_sft.run import COMPARISON, Run, write_atomically

_MARK = 'content="mamba-sft comparison"'
_HEAD = 4096
_ABSENT = "-"
_COMPARED = (  # title, unit, name in metrics.jsonl, logarithmic
    ("validation loss", "nats per token", "eval_loss", None),
    ("learning rate", "", "learning_rate", False),
    ("gradient norm", "", "grad_norm", None),
    ("token accuracy", "in training", "mean_token_accuracy", False),
    ("tokens per second", "", "tokens_per_second", None),
    ("time per step", "seconds", "seconds_per_step", None),
)


def asked_place(runs: Sequence[Run], output: str | Path | None, option: str) -> Path:
    """Returns where the comparison of some runs goes: beside the first of them, if nothing else is said.

    Args:
        runs: One, which is compared with nothing, or more.
        output: Where it was asked for.
        option: What that is called by who asks.

    Raises:
        UsageError: The same run twice, or a place for one run.
    """
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise UsageError("the same run twice", hint="name each run once")
    if output is not None and len(runs) == 1:
        raise UsageError(
            f"`{option}` is for a comparison, and there is one run", hint="name two runs or more"
        )
    return Path(output) if output is not None else runs[0].path.absolute().parent / COMPARISON


@contextmanager
def report_errors_explained(place: Path, option: str) -> Iterator[None]:
    """Turns what keeps a report or a comparison from being written into an error that says so.

    Args:
        place: Where the comparison goes.
        option: What another place is named with.

    Raises:
        MambaSFTError: It cannot be written.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or place
        raise MambaSFTError(
            f"cannot write the report: `{where}`: {error.strerror or error}",
            hint=f"free space or permission is missing there; a comparison goes elsewhere with `{option}`",
        ) from error


def write_comparison(runs: Sequence[Run], output: Path) -> list[str]:
    """Writes a page that compares runs.

    Args:
        runs: Two or more, finished or not.
        output: The page; an earlier comparison there is replaced.

    Returns:
        What could not be read, which the page names too.

    Raises:
        UsageError: `output` is something else than an earlier comparison.
        OSError: It cannot be written.
    """
    check_comparison_place(output)
    compared = [read_facts(run) for run in runs]
    names = _names(compared)
    problems = [
        f"{name}: {problem}"
        for name, facts in zip(names, compared, strict=True)
        for problem in dict.fromkeys(facts.problems)
    ]
    losses = [facts.series("loss") for facts in compared]
    longest = max(map(len, losses))
    loss = Plot(
        "training loss",
        "nats per token, smoothed",
        [Curve(n, smooth(x, longest), i) for i, (n, x) in enumerate(zip(names, losses, strict=True))],
    )
    page = page_text(
        "comparison.html.jinja",
        names=names,
        states=[figures.state_text(facts, None) for facts in compared],
        figures=list(_figure_rows(compared)),
        problems=problems,
        loss=loss,
        loss_drawn=in_both_widths(loss.curves, title="training loss over steps"),
        plots=[
            (plot, svg_text(plot.curves, title=f"{plot.title} over steps", logarithmic=plot.logarithmic))
            for plot in _plots(names, compared)
        ],
        differences=list(recipe_differences(compared)),
        unread=[name for name, facts in zip(names, compared, strict=True) if facts.recipe is None],
        samples=compared_samples(names, compared),
        shown=figures.SHOWN_SAMPLES,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )
    write_atomically(output, page)
    return problems


def check_comparison_place(output: Path) -> None:
    """Refuses a place that holds anything but an earlier comparison.

    Raises:
        UsageError: It does.
    """
    other = "give another file with `--output`"
    if output.is_dir():
        raise UsageError(f"`{output}` is a directory", hint=other)
    if output.exists():
        with output.open("rb") as file:
            if _MARK.encode() not in file.read(_HEAD):
                raise UsageError(f"`{output}` exists and is no earlier comparison", hint=other)


def _names(compared: Sequence[RunFacts]) -> list[str]:
    """What the runs are called: their directories, whole where two would be called the same."""
    names = [facts.name for facts in compared]
    if len(set(names)) == len(names):
        return names
    return [str(facts.run.path) for facts in compared]


def _figure_rows(compared: Sequence[RunFacts]) -> Iterator[list[str]]:
    columns = [dict(figures.key_figures(facts)) for facts in compared]
    for title in dict.fromkeys(title for column in columns for title in column):
        yield [title, *(column.get(title, _ABSENT) for column in columns)]


def _plots(names: Sequence[str], compared: Sequence[RunFacts]) -> Iterator[Plot]:
    for title, unit, name, logarithmic in _COMPARED:
        found: list[tuple[int, str, list[Point]]] = [
            (number, names[number], points)
            for number, facts in enumerate(compared)
            if (points := facts.series(name))
        ]
        if found:
            kind: Any = "dots" if name.startswith("eval") else "line"
            yield Plot(title, unit, [Curve(n, points, i, kind) for i, n, points in found], logarithmic)


def recipe_differences(compared: Sequence[RunFacts]) -> Iterator[list[str]]:
    """Yields (field, value in each run) for every field of the recipes that is not the same in all.

    A run whose recipe cannot be read has a question mark, and says nothing of whether fields differ.
    """
    recipes = [None if facts.recipe is None else _flat(facts.recipe.model_dump()) for facts in compared]
    read = [recipe for recipe in recipes if recipe is not None]
    for name in dict.fromkeys(name for recipe in read for name in recipe):
        values = [recipe.get(name, _ABSENT) for recipe in read]
        if any(value != values[0] for value in values):
            yield [name, *("?" if recipe is None else recipe.get(name, _ABSENT) for recipe in recipes)]


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Every value by its dotted name, as text; items of a list by their numbers."""
    if isinstance(values, dict) and values:
        parts = [(f"{prefix}.{name}" if prefix else str(name), value) for name, value in values.items()]
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        parts = [(f"{prefix}[{number}]", value) for number, value in enumerate(values)]
    else:
        text = {True: "true", False: "false", None: "null"}.get(values) if _is_word(values) else None
        return {prefix: str(values) if text is None else text}
    return {name: text for dotted, value in parts for name, text in _flat(value, dotted).items()}


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def compared_samples(names: Sequence[str], compared: Sequence[RunFacts]) -> list[ShownSample]:
    """Returns every sample prompt with the answer of each run, those answered differently first."""
    given: dict[Prompt, dict[str, str]] = {}
    for name, facts in zip(names, compared, strict=True):
        for sample in facts.samples:
            given.setdefault(sample.prompt, {})[name] = sample.after
    found = [
        ShownSample(
            prompt,
            [
                (name, by_run[name], is_right(prompt, by_run[name])) if name in by_run else (name, "", None)
                for name in names
            ],
        )
        for prompt, by_run in given.items()
    ]
    return sorted(found, key=_rank)


def _rank(sample: ShownSample) -> tuple[int, int]:
    verdicts = {right for _, _, right in sample.answers if right is not None}
    texts = {text for _, text, _ in sample.answers}
    return (0 if len(verdicts) > 1 else 1 if False in verdicts else 2, 0 if len(texts) > 1 else 1)
