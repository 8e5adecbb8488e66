"""Results as tables of text: the layout of the published card, the tasks one by one, two models compared.

What prints them, the model card and the report share these; a value that is missing is blank, and where it is
missing there is no average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mamba_sft.evaluation.normalisation import Column, Figure
from mamba_sft.evaluation.paired import Difference
from mamba_sft.evaluation.results import Results

PUBLISHED = "published"
"""How the row of a card is called beside ours."""
PARTIAL = "*"
"""After each number that was measured on some of the documents only."""
_WIDEST = 8
"""Columns that stand side by side; more are written one below the other."""


class Table(NamedTuple):
    """Titles and rows, the first cell of each being its name."""

    titles: list[str]
    rows: list[list[str]]


def scores_table(results: Sequence[Results], published: Mapping[str, Sequence[float]]) -> Table:
    """Returns the values of models on one suite, a row each; one below the other where they are many.

    Args:
        results: Of the same suite.
        published: Rows to stand beside them, which they do unless only some documents were scored.
    """
    columns = [column for column, _ in results[0].figures]
    averages = [one for one in columns if one.averaged and one.kind == "percent"]
    if len(columns) > _WIDEST or len(averages) < 2:
        return _long_table(results)
    rows = []
    for one in results:
        mark = PARTIAL if one.limit is not None else ""
        values = [_number(column, figure) for column, figure in one.figures]
        average = "" if one.average is None else f"{one.average:.2f}"
        rows.append([one.model["name"], *(value and value + mark for value in (*values, average))])
    if all(one.limit is None for one in results):
        for name, known in published.items():
            if len(known) != len(columns) + 1:
                continue  # of another set of columns
            rows.append([f"{name} ({PUBLISHED})", *(f"{value:.2f}" for value in known)])
    return Table(["", *(column.title for column in columns), "Average"], rows)


def _long_table(results: Sequence[Results]) -> Table:
    rows = []
    for one in results:
        mark = PARTIAL if one.limit is not None else ""
        name = one.model["name"]
        for column, figure in one.figures:
            value = _number(column, figure)
            error = "" if figure is None or figure.stderr is None else _text(column, figure.stderr)
            shots = "" if figure is None or figure.shots is None else str(figure.shots)
            count = "" if figure is None else f"{figure.n:,}"
            rows.append([name, column.title, value and value + mark, error, count, shots])
    return Table(["", "metric", "value", "standard error", "documents", "shots"], rows)


def differences_table(
    before: str, after: str, differences: Sequence[tuple[Column, Difference | None]]
) -> Table:
    """Returns a row for each column: both models, how they differ, and within what that is certain.

    Args:
        before: What the first model is called.
        after: The second.
        differences: From `paired`.
    """
    rows = []
    for column, one in differences:
        if one is None:
            rows.append([column.title, "", "", "", "", "", ""])
            continue
        rows.append(
            [
                column.title,
                _text(column, one.before),
                _text(column, one.after),
                _signed(column, one.delta),
                _interval(column, one),
                f"{one.raw:+.4f}",
                f"{one.n:,}",
            ]
        )
    return Table(["", before, after, "difference", "95 % interval", "raw difference", "documents"], rows)


def _interval(column: Column, one: Difference) -> str:
    if one.margin is None:
        return ""
    low, high = one.delta - one.margin, one.delta + one.margin
    return f"{_signed(column, low)} to {_signed(column, high)}"


def notes(results: Sequence[Results], differences: Sequence[tuple[Column, Difference | None]]) -> list[str]:
    """Returns what a reader of the tables has to know, a sentence each.

    Args:
        results: Of one suite.
        differences: Between the last of them and another model.
    """
    found = []
    for one in results:
        if one.limit is not None:
            found.append(
                f"{PARTIAL} partial: at most {one.limit:,} documents of each task, which is comparable with"
                " nothing that was published"
            )
            break
    missing = [column.title for column, figure in results[-1].figures if figure is None]
    if missing:
        found.append(f"no average, since {', '.join(missing)} is missing")
    at_chance = [
        column.title
        for column, figure in results[-1].figures
        if column.kind == "percent" and figure is not None and figure.value == 0
    ]
    if at_chance and differences:
        found.append(
            f"at chance, where a score is cut off at 0: {', '.join(at_chance)}; see the raw difference"
        )
    compared = [one for _, one in differences if one is not None]
    changed = max((one.other_prompts for one in compared), default=0)
    if changed:
        found.append(
            "the two models were shown different prompts (another chat template, or one of them none; other"
            " examples; another length): the difference is that of model and prompt together"
        )
    if differing := (results[-1].compared or {}).get("settings_that_differ"):
        found.append(
            f"the other model (there) and this one (now) were not scored alike: {'; '.join(differing)}"
        )
    if left := max((one.left_out for one in compared), default=0):
        found.append(f"{left:,} documents that only one of the two was scored on are left out")
    return found


def settings_text(results: Results) -> str:
    """Returns how a suite was scored, on one line."""
    settings, made_with = results.settings, results.made_with
    on = settings.get("chat_template")
    template = f"chat template {'on' if on else 'off'}" if isinstance(on, bool) else None
    suite = settings.get("suite")
    own = suite.get("max_length") if isinstance(suite, dict) else None  # where a run's recipe says it
    held, longest = settings.get("quantization"), own or settings.get("max_length")
    computed = str(made_with.get("computed_in", settings.get("dtype"))).removeprefix("torch.")
    parts = [
        template,
        f"at most {longest:,} tokens" if isinstance(longest, int) else None,
        f"held in {held}" if held not in (None, "none") else None,
        computed,
        *(f"{name.replace('_', '-')} {value}" for name, value in _tools(settings)),
    ]
    return f"{results.suite}: {', '.join(part for part in parts if part)}"


def _tools(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    suite = settings.get("suite")
    return [("lm_eval", suite["lm_eval"])] if isinstance(suite, dict) and "lm_eval" in suite else []


def _number(column: Column, figure: Figure | None) -> str:
    return "" if figure is None else _text(column, figure.value)


def _text(column: Column, value: float) -> str:
    return f"{value:.2f}" if column.kind == "percent" else f"{value:.4f}"


def _signed(column: Column, value: float) -> str:
    return f"{value:+.2f}" if column.kind == "percent" else f"{value:+.4f}"
