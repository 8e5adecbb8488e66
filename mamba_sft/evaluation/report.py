"""The report of a run: one HTML page that holds everything a reader asks for, with no outside file."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from mamba_sft.evaluation import run_figures as figures
from mamba_sft.evaluation.losses import loss_warnings
from mamba_sft.evaluation.pages import page_text
from mamba_sft.evaluation.report_markdown import markdown_text
from mamba_sft.evaluation.run_facts import RunFacts, read_facts
from mamba_sft.evaluation.run_figures import Plot, Progress
from mamba_sft.evaluation.svg_plot import in_both_widths, svg_text
from mamba_sft.run import Run, write_atomically

REFRESH = 15
"""Seconds after which the page of a run in progress asks for itself again."""


def write_report(run: Run, progress: Progress | None = None) -> list[str]:
    """Writes `report.html` and `report.md` of a run from the files beside them.

    Args:
        run: The run; finished, in progress, or ended early, and however damaged.
        progress: What the process that trains knows of it; None when it is read afterwards.

    Returns:
        What could not be read, which both name too.

    Raises:
        OSError: They cannot be written.
    """
    facts = read_facts(run)
    write_atomically(run.report, report_page(facts, progress))
    write_atomically(run.report_text, markdown_text(facts, progress))
    return list(dict.fromkeys(facts.problems))


def refresh_report(where: Run | str | Path) -> None:
    """Writes the report of a run anew, where it has one: it shows what was measured of it since.

    Args:
        where: A run, or anything else, which has none.
    """
    run = where if isinstance(where, Run) else Run(Path(where))
    if run.report.is_file():
        write_report(run)


def report_page(facts: RunFacts, progress: Progress | None = None) -> str:
    """Returns the page about a run.

    Args:
        facts: What was read of it.
        progress: What the process that trains knows of it.
    """
    loss = Plot("loss", "nats per token", figures.loss_curves(facts))
    samples = figures.shown_samples(facts)
    titles = ["prompt", *figures.sample_titles(facts.data)]
    if any(sample.prompt.answer is not None for sample in samples):
        titles.insert(1, "expected")
    data, told = facts.data, facts.told
    sources = told(lambda: figures.data_sources(data), facts.run.data) if data else []
    changes = told(lambda: figures.data_changes(data), facts.run.data)
    runs_now = progress is not None and progress.ended is None
    return page_text(
        "report.html.jinja",
        name=facts.name,
        refresh=REFRESH if runs_now else None,
        state=figures.state_text(facts, progress),
        share=_share(facts, progress),
        figures=list(figures.key_figures(facts)),
        warnings=[*loss_warnings(facts.metrics), *changes],
        loss=loss,
        loss_drawn=in_both_widths(loss.curves, title="loss over steps"),
        plots=[(plot, _drawn(plot)) for plot in figures.plots(facts)],
        samples=samples,
        samples_heading=figures.samples_heading(min(figures.SHOWN_SAMPLES, len(samples)), len(samples)),
        right_counts=figures.right_counts(samples),
        sample_titles=titles,
        shown=figures.SHOWN_SAMPLES,
        changing=figures.changing_samples(facts),
        sources=sources,
        data_facts=told(lambda: figures.data_facts(data), facts.run.data) if data else [],
        data_rows=told(lambda: figures.data_rows(data), facts.run.data),
        data_warnings=told(lambda: figures.data_warnings(data), facts.run.data),
        files=told(lambda: figures.exported_files(facts.files), facts.run.quality),
        evaluations=list(figures.evaluations(facts)),
        commands=list(figures.next_commands(facts, progress)),
        origins=told(lambda: figures.origins(facts), facts.run.environment),
        environment=json.dumps(facts.environment, indent=2, ensure_ascii=False),
        recipe=facts.recipe_text,
        problems=list(dict.fromkeys(facts.problems)),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def _drawn(plot: Plot) -> str:
    title = f"{plot.title} over steps"
    return svg_text(plot.curves, title=title, logarithmic=plot.logarithmic, from_zero=plot.from_zero)


def _share(facts: RunFacts, progress: Progress | None) -> float | None:
    """How much of the run is done, where it is not all of it."""
    if progress is not None:
        return progress.step / max(1, progress.steps)
    if facts.is_finished or not facts.steps:
        return None
    return min(1.0, facts.last_step / facts.steps)
