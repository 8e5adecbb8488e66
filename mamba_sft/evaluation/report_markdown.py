"""The report of a run as Markdown, for a terminal, an issue or a repository: no plots, the same facts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from mamba_sft.evaluation import run_figures as figures
from mamba_sft.evaluation.losses import loss_warnings
from mamba_sft.evaluation.run_facts import RunFacts
from mamba_sft.evaluation.run_figures import Progress, ShownSample
from mamba_sft.evaluation.svg_plot import number_text
from mamba_sft.wording import printable

_SHOWN_STEPS = 10
_MEANING = re.compile(r"([\\`*_\[\]<>&|~$#])")
_COURSE = ("loss", "eval_loss", "learning_rate", "grad_norm", "mean_token_accuracy", "tokens_per_second")


def markdown_text(facts: RunFacts, progress: Progress | None = None) -> str:
    """Returns the report of a run as Markdown.

    Args:
        facts: What was read of it.
        progress: What the process that trains knows of it.
    """
    return "\n".join(_lines(facts, progress)) + "\n"


def _lines(facts: RunFacts, progress: Progress | None) -> Iterator[str]:
    told, data = facts.told, facts.data
    changes = told(lambda: figures.data_changes(data), facts.run.data)
    data_facts = told(lambda: figures.data_facts(data), facts.run.data) if data else []
    sources = told(lambda: figures.data_sources(data), facts.run.data) if data else []
    files = told(lambda: figures.exported_files(facts.files), facts.run.quality)
    origins = told(lambda: figures.origins(facts), facts.run.environment)
    yield from (f"# {_plain(facts.name)}", "", _plain(figures.state_text(facts, progress)), "")
    yield from _table(("", ""), figures.key_figures(facts))
    yield from _list("Could not be read", dict.fromkeys(facts.problems))
    yield from _list("Worth a look", [*loss_warnings(facts.metrics), *changes])
    yield from _course(facts)
    yield from _samples(facts)
    if sources or data_facts:
        yield from ("## Data", "")
        yield from _table(("source", "format", "read", "bad", "kept", "weight", "rows an epoch"), sources)
        yield from _table(("", ""), data_facts)
    for one in figures.evaluations(facts):
        yield from (f"## Evaluation: {_plain(one.suite)}", "", _plain(one.settings), "")
        yield from _table(one.table.titles, one.table.rows)
        yield from _table(("", ""), one.differences)
    if files:
        yield from ("## GGUF files", "")
        yield from _table(("file", "size", "KL, nats", "same next token"), files)
    yield from ("## What to do next", "")
    yield from _fenced("\n".join(f"{do:<80}  # {why}" for why, do in figures.next_commands(facts, progress)))
    yield from ("## Where it comes from", "")
    yield from _table(("", ""), origins)
    yield from ("## Recipe", "")
    yield from _fenced(facts.recipe_text, "yaml")


def _course(facts: RunFacts) -> Iterator[str]:
    """A few of the logged steps, evenly spread: the first, the last, and every one with a validation loss."""
    found: dict[int, dict[str, float]] = {}
    for line in facts.metrics:
        found.setdefault(line["step"], {}).update(line)
    lines = [line for line in found.values() if any(name in line for name in _COURSE)]
    if not lines:
        return
    every = max(1, len(lines) // _SHOWN_STEPS)
    kept = [line for i, line in enumerate(lines) if i % every == 0 or line is lines[-1]]
    names = [name for name in _COURSE if any(name in line for line in kept)]
    yield from ("## Course", "")
    rows = ([str(line["step"]), *(_number(line.get(name)) for name in names)] for line in kept)
    yield from _table(("step", *(name.replace("_", " ") for name in names)), rows)


def _number(value: float | None) -> str:
    return "" if value is None else number_text(value)


def _samples(facts: RunFacts) -> Iterator[str]:
    samples = figures.shown_samples(facts)
    if not samples:
        return
    heading = figures.samples_heading(min(figures.SHOWN_SAMPLES, len(samples)), len(samples))
    counts = figures.right_counts(samples)
    yield from ("## Answers", "", f"{heading}{'; ' if counts else ''}{counts}", "")
    titles = ("prompt", "expected", *figures.sample_titles(facts.data))
    yield from _table(titles, map(_row, samples[: figures.SHOWN_SAMPLES]))


def _row(sample: ShownSample) -> list[str]:
    given = [figures.MARKS[right] + text for _, text, right in sample.answers]
    return [sample.prompt.prompt, sample.prompt.answer or "", *given]


def _list(title: str, texts: Iterable[str]) -> Iterator[str]:
    items = [f"- {_plain(text)}" for text in texts]
    if items:
        yield from (f"## {title}", "", *items, "")


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    cells = [[_plain(cell) for cell in row] for row in rows]
    if cells:
        yield f"| {' | '.join(titles)} |"
        yield f"|{'---|' * len(titles)}"
        yield from (f"| {' | '.join(row)} |" for row in cells)
        yield ""


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _MEANING.sub(r"\\\1", printable(text)).replace("\n", "<br>").replace("\t", " ")


def _fenced(text: str, language: str = "") -> Iterator[str]:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    yield from (f"{fence}{language}", printable(text).rstrip("\n"), fence, "")
