"""The run report: one HTML page that holds everything a reader of a run asks for, with no outside file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from mamba_sft.evaluation.losses import loss_warnings
from mamba_sft.evaluation.prompts import Sample, exact_match, read_samples
from mamba_sft.run import Run, write_atomically
from mamba_sft.wording import size_text, time_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN_SAMPLES = 12


def loss_plot(metrics: list[dict[str, Any]]) -> str:
    """Returns the loss (and learning rate) over the steps as an SVG element."""
    text = io.StringIO()
    loss_figure(metrics).savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def loss_figure(metrics: list[dict[str, Any]]) -> Figure:
    """Returns the loss (and learning rate) over the steps as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    steps = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    held_out = [(m["step"], m["eval_loss"]) for m in metrics if "eval_loss" in m]
    rates = [(m["step"], m["learning_rate"]) for m in metrics if "learning_rate" in m]
    if steps:
        axes.plot(*zip(*steps, strict=True), color="#74c0fc", linewidth=1, label="training loss, each step")
        axes.plot(
            *zip(*_smooth(steps), strict=True), color="#1971c2", linewidth=2, label="training loss, smoothed"
        )
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#e8590c", linewidth=2, label="validation loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if rates:
        right = axes.twinx()
        right.plot(
            *zip(*rates, strict=True), color="#868e96", linewidth=1, linestyle=":", label="learning rate"
        )
        right.set_ylabel("learning rate")
        right.set_ylim(bottom=0)
    lines = [line for ax in figure.axes for line in ax.get_lines()]
    labels = [str(line.get_label()) for line in lines]
    figure.legend(lines, labels, frameon=False, loc="outside upper center", ncols=4, fontsize="small")
    return figure


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential moving average over about a twentieth of the run."""
    weight = max(0.0, 1 - 20 / len(points))
    smooth: list[tuple[int, float]] = []
    total = norm = 0.0
    for step, value in points:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smooth.append((step, total / norm))
    return smooth


def sample_titles(run: Run) -> tuple[str, str]:
    """Returns what gave the two answers to a sample prompt: base and tuned model, or before and after."""
    started = run.read_data().get("start")
    return ("before", "after") if started else ("base", "tuned")


def write_report(run: Run) -> None:
    """Writes `report.html` of a finished run from the files beside it."""
    metrics = run.read_metrics()
    environment = json.loads(run.environment.read_text(encoding="utf-8"))
    samples = read_samples(run.samples) if run.samples.exists() else []
    data = run.read_data()
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        name=run.path.name,
        version=environment["packages"]["mamba-sft"],
        figures=list(_figures(environment, metrics, samples)),
        plot=loss_plot(metrics) if metrics else None,
        samples=[(s.prompt.prompt, s.before, s.after) for s in samples[:SHOWN_SAMPLES]],
        sample_titles=["prompt", *sample_titles(run)],
        files=list(_files(run)),
        warnings=[*loss_warnings(metrics), *_changes(data)],
        data=data,
        data_rows=[(row["where"], row["text"], row["trained_text"]) for row in data.get("rows", [])],
        data_facts=list(_data_facts(data)) if data else [],
        recipe=run.recipe.read_text(encoding="utf-8"),
        environment=json.dumps(environment, indent=2),
    )
    write_atomically(run.report, page + "\n")


def _figures(
    environment: dict[str, Any], metrics: list[dict[str, Any]], samples: list[Sample]
) -> Iterator[tuple[str, str]]:
    yield "steps", f"{environment.get('steps', 0):,}"
    yield "time", time_text(environment.get("seconds", 0.0))
    tokens = [m["num_tokens"] for m in metrics if "num_tokens" in m]
    if tokens:
        yield "tokens read", f"{tokens[-1]:,.0f}"
    best = environment.get("best_validation_loss")
    if best is not None:
        yield "best validation loss", f"{best:.4f}"
    for when in ("before", "after"):
        score = exact_match([s.prompt for s in samples], [getattr(s, when) for s in samples])
        if score is not None:
            yield f"exact match {when}", f"{100 * score:.1f} %"


def _changes(data: dict[str, Any]) -> Iterator[str]:
    """What the run went on with that it had not been started with."""
    for change in data.get("changes", []):
        lines = "\n".join(change["what"])
        yield f"after step {change['after_step']:,} the run went on with other data:\n{lines}"


def _data_facts(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the rows came to, in words."""
    length, packed, lengths = data["length"], data.get("packed"), data["lengths"]
    yield "rows", f"{data['train_rows']:,} to train on, {data['validation_rows']:,} to validate on"
    if packed:
        full = f"{packed['rows']:,} rows of {packed['max_length']:,} tokens, {packed['fill']:.1%} full"
        yield "packed into", full
    yield "tokens an epoch", f"{data['train_tokens']:,}, {data['trained_share']:.1%} of them trained"
    if lengths:
        middle, high, longest = (lengths[name] for name in ("median", "percentile_95", "longest"))
        yield "tokens a row", f"median {middle:,}, 95% at most {high:,}, longest {longest:,}"
    batches = f"{length['accumulation']:,} micro-batches of {length['batch_size']:,}"
    yield "steps", f"{length['steps']:,}, {batches} in each, {length['tokens_per_step']:,} tokens in the mean"


def _files(run: Run) -> Iterator[tuple[str, ...]]:
    """The exported GGUF files with their sizes and what they lose."""
    if not run.quality.is_file():
        return
    files = json.loads(run.quality.read_text(encoding="utf-8"))["files"]
    for name, entry in sorted(files.items(), key=lambda item: int(item[1]["nbytes"])):
        measured = (f"{entry['kl']:.2g}", f"{entry['top1']:.1%}") if "kl" in entry else ("-", "-")
        yield name, size_text(entry["nbytes"]), *measured
