"""The run report."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mamba_sft.evaluation.prompts import Prompt, pair, write_samples
from mamba_sft.evaluation.report import loss_plot, write_report
from mamba_sft.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "my <run>")
    run.path.mkdir()
    run.recipe.write_text("output_dir: x  # <b>\n")
    run.environment.write_text(
        json.dumps(
            {"packages": {"mamba-sft": "1.2.3"}, "seconds": 3725, "steps": 40, "best_validation_loss": 1.25}
        )
    )
    lines = [
        {"step": i + 1, "loss": 3 / (i + 1), "learning_rate": 1e-3, "num_tokens": 100 * i} for i in range(40)
    ]
    lines.insert(20, {"step": 20, "eval_loss": 1.25})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_samples(run.samples, pair([Prompt("<script>", "yes")], ["no"], ["yes"]))
    return run


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def test_the_report_holds_everything_and_nothing_from_outside(run: Run) -> None:
    write_report(run)
    page = run.report.read_text()
    tags = Tags()
    tags.feed(page)
    assert "svg" in tags.seen
    assert "script" not in tags.seen, "a prompt is text, not markup"
    for text in ("62 min", "1.2500", "exact match before", "0.0 %", "100.0 %", "&lt;script&gt;", "3,900"):
        assert text in page, text
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


def test_text_of_a_run_is_text_on_the_page(run: Run) -> None:
    """Names, answers, recipes and file names come from anywhere; nothing of them may become markup."""
    hostile = "<img src=x onerror=alert(1)>\"'&</pre>{{ 7*7 }}"
    write_samples(run.samples, pair([Prompt(hostile, "yes")], [hostile], [hostile]))
    run.recipe.write_text(hostile)
    facts = {"packages": {"mamba-sft": hostile}, "device": {"name": hostile}}
    run.environment.write_text(json.dumps(facts))
    run.export.mkdir()
    run.quality.write_text(json.dumps({"files": {hostile: {"nbytes": 1, "method": "Q8_0"}}}))
    write_report(run)
    page = run.report.read_text()
    tags = Tags()
    tags.feed(page)
    assert "img" not in tags.seen
    assert page.count("&lt;img src=x") == 8
    assert page.count("{{ 7*7 }}") == 8


def test_a_plot_of_one_step_and_of_none(run: Run) -> None:
    assert loss_plot([{"step": 1, "loss": 2.0}]).startswith("<svg")
    assert loss_plot([]).startswith("<svg")


def test_a_run_without_samples_or_metrics_still_has_a_report(run: Run) -> None:
    run.samples.unlink()
    run.metrics.unlink()
    assert run.read_metrics() == []
    write_report(run)
    assert "<h2>Loss" not in run.report.read_text()


DATA = {
    "sources": [
        {"path": "my <chats>.jsonl", "formats": {"a": "messages", "b": "messages"}, "read": 60, "bad": 1,
         "kept": 59, "weight": 2.0, "train_rows": 110},
    ],
    "train_rows": 110, "validation_rows": 4, "train_tokens": 5_500, "trained_share": 0.4,
    "lengths": {"width": 8, "counts": [1], "median": 50, "percentile_95": 61, "longest": 64},
    "packed": {"rows": 12, "max_length": 512, "fill": 0.9},
    "length": {"steps": 24, "accumulation": 3, "batch_size": 2, "tokens_per_step": 917},
    "rows": [{"where": "my <chats>.jsonl:7", "text": "hello", "trained_text": "world"}],
    "warnings": ["columns not used: `note`"],
    "changes": [{"after_step": 9, "what": ["`my <chats>.jsonl`: 60 rows then, 30 now"]}],
}  # fmt: skip


def test_the_report_has_what_was_seen_of_the_data(run: Run) -> None:
    write_report(run)
    assert "<h2>Data" not in run.report.read_text()
    run.data.write_text(json.dumps(DATA))
    write_report(run)
    page = run.report.read_text()
    cells = ("messages", "60", "1", "59", "2.0", "110")
    for text in (
        "my &lt;chats&gt;.jsonl</td>" + "".join(f"<td>{cell}</td>" for cell in cells),
        "110 to train on, 4 to validate on", "12 rows of 512 tokens, 90.0% full",
        "5,500, 40.0% of them trained",
        "24, 3 micro-batches of 2 in each, 917 tokens in the mean", "columns not used: `note`",
        "after step 9 the run went on with other data", "60 rows then, 30 now", "<pre>world</pre>",
        "median 50, 95% at most 61, longest 64",
    ):  # fmt: skip
        assert text in page, text


def test_a_run_without_packing_has_a_data_section_too(run: Run) -> None:
    run.data.write_text(json.dumps(DATA | {"packed": None, "lengths": {}, "warnings": [], "changes": []}))
    write_report(run)
    page = run.report.read_text()
    assert "<h2>Data" in page
    assert "packed into" not in page
    assert "Worth a look" not in page
