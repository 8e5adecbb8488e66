"""Several runs on one page, and the verb that writes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mamba_sft.cli import app
from mamba_sft.evaluation.prompts import Prompt, pair, write_samples
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    made = []
    for name, rate in (("a", 1e-3), ("<b>", 2e-3)):
        run = Run(tmp_path / name)
        run.path.mkdir()
        recipe = Recipe.load("quickstart", overrides=[f"train.learning_rate={rate}", f"output_dir={name}"])
        run.recipe.write_text(recipe.to_yaml())
        run.environment.write_text(json.dumps({"steps": 9, "seconds": 60}))
        lines = [{"step": i, "loss": rate * i, "eval_loss": 1.0} for i in range(1, 10)]
        run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        prompts = [Prompt(f"same {i}", "yes") for i in range(13)] + [Prompt("apart", "yes")]
        after = ["yes"] * 13 + ["yes" if name == "a" else "no"]
        write_samples(run.samples_file, pair(prompts, ["no"] * 14, after))
        made.append(run)
    return made


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mamba-sft", "report", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return int(stop.value.code or 0)


def test_two_runs_beside_each_other(runs: list[Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert call(monkeypatch, *(run.path for run in runs)) == 0
    assert all(run.report.is_file() and run.report_text.is_file() for run in runs)
    page = (tmp_path / "comparison.html").read_text()
    assert "<b>" not in page.split("</style>")[1].replace("<b>training loss</b>", "").replace(
        "<b>validation loss</b>", ""
    )
    fields = page.split("<h2>Recipes</h2>")[1].split("<h2>Answers</h2>")[0]
    for cell in ("train.learning_rate", "0.001", "0.002", "output_dir"):
        assert f"<code>{cell}</code>" in fields
    assert "lora_alpha" not in fields
    answers = page.split("<h2>Answers</h2>")[1]
    assert answers.index("apart") < answers.index("same 0")
    assert "12 of 14 shown" in answers
    svg = page.split("<svg")[1]
    assert 'class="c0"' in svg
    assert 'class="c1"' in svg
    assert call(monkeypatch, *(run.path for run in runs)) == 0, "an earlier comparison is replaced"


def test_a_file_of_somebody_is_not_replaced(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "comparison.html").write_text("my thesis")
    assert call(monkeypatch, *(run.path for run in runs)) == 2
    assert "is no earlier comparison" in capsys.readouterr().err
    assert (tmp_path / "comparison.html").read_text() == "my thesis"
    assert call(monkeypatch, *(run.path for run in runs), "--output", tmp_path) == 2
    assert call(monkeypatch, *(run.path for run in runs), "--output", tmp_path / "x" / "c.html") == 0


def test_what_makes_no_sense_is_refused(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, runs[0].path, runs[0].path) == 2
    assert call(monkeypatch, runs[0].path, "--output", "x.html") == 2
    assert call(monkeypatch, tmp_path / "absent") == 2
    assert "no run at" in capsys.readouterr().err
    runs[0].report.mkdir()
    assert call(monkeypatch, runs[0].path) == 1
    assert "cannot write the report" in capsys.readouterr().err


def test_a_damaged_run_is_compared_too(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs[1].metrics_file.write_text("{")
    runs[1].recipe.write_text("[")
    assert call(monkeypatch, *(run.path for run in runs)) == 0
    assert "metrics.jsonl" in capsys.readouterr().err
    page = (tmp_path / "comparison.html").read_text()
    assert "&lt;b&gt;: `metrics.jsonl` cannot be read in full" in page
    assert "not read, so nothing is known of it: &lt;b&gt;" in page
