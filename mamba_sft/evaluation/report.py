"""The run report: one HTML page that holds everything a reader of a run asks for, with no outside file."""

from __future__ import annotations

import io
import json
from html import escape
from typing import TYPE_CHECKING, Any

from mamba_sft.evaluation.prompts import Sample, exact_match, read_samples
from mamba_sft.run import Run, write_atomically
from mamba_sft.wording import size_text, time_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_SAMPLES = 12

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #0b7285; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; vertical-align: top;
  padding: .35rem .6rem; border-bottom: 1px solid var(--line) } th { font-weight: 600 }
td pre, pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .9rem }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 } .figures div { background: var(--soft);
  border-radius: .5rem; padding: .6rem 1rem }
.figures b { display: block; font-size: 1.3rem; color: var(--accent) }
.plot { background: #fff; border-radius: .5rem; padding: .5rem } .plot svg { width: 100%; height: auto }
details pre { background: var(--soft); border-radius: .5rem; padding: 1rem }
"""


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


def write_report(run: Run) -> None:
    """Writes `report.html` of a finished run from the files beside it."""
    metrics = run.read_metrics()
    environment = json.loads(run.environment.read_text(encoding="utf-8"))
    samples = read_samples(run.samples) if run.samples.exists() else []
    parts = [
        f"<h1>{escape(run.path.name)}</h1>",
        f"<p>trained with mamba-sft {escape(str(environment['packages']['mamba-sft']))}</p>",
        _figures(environment, metrics, samples),
        f'<h2>Loss</h2><div class="plot">{loss_plot(metrics)}</div>' if metrics else "",
        _samples_table(samples),
        _gguf_table(run),
        f"<h2>Recipe</h2><pre>{escape(run.recipe.read_text(encoding='utf-8'))}</pre>",
        "<h2>Environment</h2><details><summary>versions and hardware</summary>"
        f"<pre>{escape(json.dumps(environment, indent=2))}</pre></details>",
    ]
    title = f"<title>{escape(run.path.name)}: mamba-sft run report</title>"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{meta}{title}<style>{STYLE}</style>"
    write_atomically(
        run.report, f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"
    )


def _figures(environment: dict[str, Any], metrics: list[dict[str, Any]], samples: list[Sample]) -> str:
    figures = {
        "steps": f"{environment.get('steps', 0):,}",
        "time": time_text(environment.get("seconds", 0.0)),
    }
    tokens = [m["num_tokens"] for m in metrics if "num_tokens" in m]
    if tokens:
        figures["tokens read"] = f"{tokens[-1]:,.0f}"
    best = environment.get("best_validation_loss")
    if best is not None:
        figures["best validation loss"] = f"{best:.4f}"
    for when in ("before", "after"):
        score = exact_match([s.prompt for s in samples], [getattr(s, when) for s in samples])
        if score is not None:
            figures[f"exact match {when}"] = f"{100 * score:.1f} %"
    return (
        '<div class="figures">' + "".join(f"<div><b>{v}</b>{k}</div>" for k, v in figures.items()) + "</div>"
    )


def _gguf_table(run: Run) -> str:
    """The exported files with their sizes and what they lose, empty if there are none."""
    if not run.quality.is_file():
        return ""
    files = json.loads(run.quality.read_text(encoding="utf-8"))["files"]
    rows = ""
    for name, entry in sorted(files.items(), key=lambda item: int(item[1]["nbytes"])):
        measured = (f"{entry['kl']:.2g}", f"{entry['top1']:.1%}") if "kl" in entry else ("-", "-")
        cells = (name, size_text(entry["nbytes"]), *measured)
        rows += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    head = "<tr><th>file</th><th>size</th><th>KL, nats</th><th>same next token</th></tr>"
    return f"<h2>GGUF files</h2><table>{head}{rows}</table>"


def _samples_table(samples: list[Sample]) -> str:
    if not samples:
        return ""
    rows = "".join(
        "<tr>"
        + "".join(f"<td><pre>{escape(text)}</pre></td>" for text in (s.prompt.prompt, s.before, s.after))
        + "</tr>"
        for s in samples[:SHOWN_SAMPLES]
    )
    return (
        f"<h2>Before and after</h2><table><tr><th>prompt</th><th>base</th><th>tuned</th></tr>{rows}</table>"
    )
