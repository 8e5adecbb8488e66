"""A damaged run still has a report, and the report says what of it could not be read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mamba_sft.evaluation.report import write_report
from mamba_sft.evaluation.run_facts import read_facts
from mamba_sft.recipe.builtin import builtin_recipes
from mamba_sft.run import Run

GOOD = {"step": 2, "loss": 1.0, "num_tokens": 10}
SAMPLE = {"prompt": "a", "answer": "b", "system": None, "before": "c", "after": "b"}
STEP_SAMPLE = {"step": 1, "prompt": "a", "answer": "b", "system": None, "given": "c"}
DATA = {
    "sources": [{"path": "x.jsonl", "formats": {"x.jsonl": "messages"}, "read": 1, "bad": 0, "kept": 1,
                 "weight": 1.0, "train_rows": 1}],
    "train_rows": 1, "validation_rows": 0, "train_tokens": 5, "trained_share": 0.5, "warnings": [],
    "lengths": {"median": 5, "percentile_95": 5, "longest": 5}, "packed": None, "changes": [],
    "length": {"steps": 3, "accumulation": 1, "batch_size": 1, "tokens_per_step": 5}, "start": None,
    "rows": [{"where": "x.jsonl:1", "text": "t", "trained_text": "u"}],
}  # fmt: skip
ENVIRONMENT = {"packages": {"mamba-sft": "1"}, "device": {"name": "d"}, "seconds": 1.0, "steps": 3}
QUALITY = {"files": {"a.gguf": {"nbytes": 10, "kl": 0.1, "top1": 0.9}}}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.export.mkdir(parents=True)
    run.recipe.write_bytes(builtin_recipes()["quickstart"].read_bytes())
    run.environment.write_text(json.dumps(ENVIRONMENT))
    run.metrics_file.write_text(json.dumps(GOOD) + "\n")
    run.data.write_text(json.dumps(DATA))
    run.samples_file.write_text(json.dumps(SAMPLE) + "\n")
    run.step_samples.write_text(json.dumps(STEP_SAMPLE) + "\n")
    run.quality.write_text(json.dumps(QUALITY))
    return run


def test_a_whole_run_has_nothing_to_tell(run: Run) -> None:
    assert write_report(run) == []
    assert "Could not be read" not in run.report.read_text()
    assert "Could not be read" not in run.report_text.read_text()


LINES = ["metrics_file", "samples_file", "step_samples"]
OBJECTS = ["environment", "data", "quality"]


@pytest.mark.parametrize("name", [*LINES, *OBJECTS, "recipe"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[" * 100_000, b"null", b"[1]", b'"x"', b"7"])
def test_a_damaged_file_is_named_and_the_rest_is_there(run: Run, name: str, content: bytes) -> None:
    path: Path = getattr(run, name)
    path.write_bytes(content)
    problems = write_report(run)
    assert problems
    assert all(path.name in problem for problem in problems), problems
    page = run.report.read_text()
    assert "Could not be read" in page
    assert path.name in page
    assert path.name in run.report_text.read_text()
    assert ("nats per token" in page) is (name != "metrics_file")
    assert ("x.jsonl" in page) is (name != "data")


@pytest.mark.parametrize("name", [*LINES, *OBJECTS, "recipe"])
def test_a_directory_in_its_place_is_named_too(run: Run, name: str) -> None:
    path: Path = getattr(run, name)
    path.unlink()
    path.mkdir()
    assert any(path.name in problem for problem in write_report(run))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics_file", '{"step": "2", "loss": 1.0}'), ("metrics_file", '{"loss": 1.0}'),
        ("metrics_file", '{"step": true}'),
        ("metrics_file", '{"step": 3, "loss": [1]}'), ("metrics_file", '{"step": 3, "loss": "1"}'),
        ("metrics_file", '{"step": -1}'), ("metrics_file", '{"step": 1' + "0" * 400 + "}"),
        ("metrics_file", '{"step": 3, "loss": 1' + "0" * 400 + "}"), ("metrics_file", '{"step": 3, "lo'),
        ("samples_file", '{"prompt": "a"}'), ("samples_file", '{"prompt": 7, "before": "", "after": ""}'),
        ("samples_file", '{"prompt": "a", "answer": [], "before": "", "after": ""}'),
        ("samples_file", '{"prompt": "a", "before": null, "after": ""}'),
        ("step_samples", '{"step": 1.5, "prompt": "a", "given": "b"}'), ("step_samples", '{"step": 1}'),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_and_the_good_ones_are_kept(run: Run, name: str, line: str) -> None:
    path: Path = getattr(run, name)
    good = path.read_text()
    path.write_text(good + line + "\n" + good + line + "\n")
    [problem] = write_report(run)
    assert problem.startswith(f"`{path.name}` cannot be read in full: line 2: ")
    assert problem.endswith(", and 1 more")
    facts = read_facts(run)
    assert [len(facts.metrics), len(facts.samples), len(facts.step_samples)] == [
        2 if name == one else 1 for one in LINES
    ]


def test_numbers_that_are_none_do_not_end_it(run: Run) -> None:
    odd = ['{"step": 3, "loss": NaN}', '{"step": 4, "loss": Infinity, "num_tokens": Infinity}',
           '{"step": 5, "loss": 1e308, "eval_loss": NaN, "epoch": null}']  # fmt: skip
    run.metrics_file.write_text("\n".join(odd) + "\n")
    assert write_report(run) == []


def mutated(value: object, chance: random.Random) -> object:
    """The same JSON with something in it replaced."""
    odd: list[object] = [None, -1, 1e400, "x", [], {}, [[]], {"a": None}, True, "\ud800", 10**30]
    if chance.random() < 0.15:
        return chance.choice(odd)
    if isinstance(value, dict):
        return {key: mutated(item, chance) for key, item in value.items() if chance.random() > 0.05}
    if isinstance(value, list):
        return [mutated(item, chance) for item in value]
    return value


@pytest.mark.parametrize("seed", range(60))
def test_whatever_the_files_hold_there_is_a_report(run: Run, seed: int) -> None:
    chance = random.Random(seed)
    files = {
        run.environment: ENVIRONMENT, run.data: DATA, run.quality: QUALITY,
        run.metrics_file: GOOD, run.samples_file: SAMPLE, run.step_samples: STEP_SAMPLE,
    }  # fmt: skip
    for path, value in files.items():
        path.write_text(json.dumps(mutated(value, chance)) + "\n")
    write_report(run)
    assert "</html>" in run.report.read_text()
    assert "## Recipe" in run.report_text.read_text()
