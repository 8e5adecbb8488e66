"""Tables of a model card: what evaluation measured, and what the GGUF files are and lose."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from mamba_sft.run import Run
from mamba_sft.wording import size_text

RESULTS_NAME = "results.json"


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def quantization_table(run: Run) -> str:
    """Returns the sizes and the quality of the model's GGUF files, empty if there are none."""
    if not run.quality.is_file():
        return ""
    files = json.loads(run.quality.read_text(encoding="utf-8"))["files"]
    rows = [
        (f"`{name}`", entry["method"], size_text(entry["nbytes"]), *_quality(entry))
        for name, entry in sorted(files.items(), key=lambda item: item[1]["nbytes"])
        if entry["method"] != "LoRA" and entry.get("of") != "base" and (run.export / name).is_file()
    ]
    if not rows:
        return ""
    titles = ["file", "method", "size", "KL (nats)", "same next token"]
    note = "KL divergence and agreement are against this model in float32, on held-out text, in llama.cpp.\n"
    return "## GGUF Files\n\n" + table(titles, rows) + "\n" + note


def evaluation_table(run: Run) -> str:
    """Returns what the run's evaluation measured, task by task, empty if there was none."""
    path = run.eval / RESULTS_NAME
    if not path.is_file():
        return ""
    results = json.loads(path.read_text(encoding="utf-8")).get("results", {})
    rows = [
        (task, metric.partition(",")[0], f"{value:.4f}")
        for task, metrics in results.items()
        if isinstance(metrics, dict)
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    ]
    return "## Results\n\n" + table(["task", "metric", "value"], rows) if rows else ""


def _quality(entry: dict[str, Any]) -> tuple[str, str]:
    if "kl" not in entry:
        return "not measured", "not measured"
    return f"{entry['kl']:.2g}", f"{entry['top1']:.1%}"


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
