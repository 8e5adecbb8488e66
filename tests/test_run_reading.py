"""Files of a run that were changed since: ignored with a word, never followed out of their directory."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.disk import is_file_name
from mamba_sft.evaluation.prompts import read_samples, read_step_samples
from mamba_sft.exporting.gguf.files import record_quality
from mamba_sft.exporting.hub.card import _environment, _quantizations, _results
from mamba_sft.planning.speed import measured
from mamba_sft.run import Run, write_atomically
from mamba_sft.run_contents import mark, strangers
from mamba_sft.run_lock import Holder
from mamba_sft.run_reading import read_object, read_quality
from mamba_sft.training.resume_points import MANIFEST, STATE, fault_of
from mamba_sft.training.resuming import _is_finished

DAMAGED = (
    *("", "[" * 100_000, "[]", "3", "null", "{", "\0" * 9),
    *('{"files": 3}', '{"files": [1]}', '{"files": {"a": 1}}'),
)
GOOD = {"method": "Q4_K_M", "nbytes": 3, "kl": 0.1, "top1": 0.9}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.export.mkdir(parents=True)
    mark(run)
    return run


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_files_are_ignored(run: Run, content: str) -> None:
    run.eval.mkdir()
    for path in (run.quality, run.environment, run.data, run.metrics, run.samples, run.eval / "results.json"):
        path.write_text(content)
    assert read_quality(run.quality) == {}
    assert list(_quantizations(run)) == list(_results(run)) == []
    assert "steps" not in _environment(run)
    assert not _is_finished(run)
    assert read_samples(run.samples) == read_step_samples(run.samples) == []
    assert "sources" not in run.read_data()
    assert all("step" not in line for line in run.read_metrics())
    record_quality(run.quality, [], {})
    assert json.loads(run.quality.read_text()) == {"files": {}}


def test_damage_is_told(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    run.quality.write_text("{")
    assert read_object(run.quality) == {}
    assert f"`{run.quality}` is damaged and ignored: Expecting" in caplog.text
    run.metrics.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    assert run.read_metrics() == [{"step": 1}, {"step": 3}]
    assert f"1 damaged lines of `{run.metrics}`" in caplog.text


@pytest.mark.parametrize(
    "record",
    [
        {"sources": {}}, {"sources": [1]}, {"sources": [{"path": 1, "kept": 2}]}, {"prompts": 3},
        {"base": []}, {"prompts": {"digest": 1, "rows": 2}}, {"changes": [{"after_step": "x", "what": []}]},
        {"changes": 1},
    ],
)  # fmt: skip
def test_a_record_of_the_data_with_other_values(run: Run, record: dict[str, Any]) -> None:
    run.data.write_text(json.dumps(record))
    assert run.read_data() == {}
    run.data.write_text(json.dumps({"sources": [{"path": "a", "kept": 3}], "changes": []}))
    assert run.read_data()


def test_names_lead_nowhere_else(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"abc")
    names = ("../../out.gguf", str(tmp_path / "out.gguf"), "..", "hf/../../x", "\0")
    assert not any(map(is_file_name, names))
    run.quality.write_text(json.dumps({"files": dict.fromkeys((*names, "own.gguf"), GOOD)}))
    assert list(read_quality(run.quality)) == ["own.gguf"]
    assert list(_quantizations(run)) == []


def test_a_name_in_quality_json_is_no_pattern_and_claims_no_other_kind_of_file(run: Run) -> None:
    """What is listed there is deleted by `--overwrite`."""
    names = ("*", "*.gguf", "thesis.docx", "[o]wn.gguf", "own.gguf")
    run.quality.write_text(json.dumps({"files": dict.fromkeys(names, GOOD)}))
    for name in ("thesis.docx", "own.gguf", "other.gguf"):
        (run.export / name).write_text("x")
    assert strangers(run) == ["export/other.gguf", "export/thesis.docx"]


@pytest.mark.parametrize(
    "change", [{"pid": -1}, {"pid": 0}, {"pid": True}, {"pid": "1"}, {"host": 3}, {"x": 1}]
)
def test_an_odd_lock_is_nobodys(run: Run, change: dict[str, Any]) -> None:
    holder = {name: getattr(Holder.own("train"), name) for name in Holder.__dataclass_fields__}
    write_atomically(run.lock, json.dumps(holder))
    assert Holder.read(run.lock) is not None
    write_atomically(run.lock, json.dumps(holder | change))
    assert Holder.read(run.lock) is None


def test_samples_whose_texts_are_none(run: Run) -> None:
    good = {"prompt": "p", "answer": None, "system": None, "before": "b", "after": "a"}
    odd = [good | {"prompt": 1}, good | {"answer": []}, good | {"after": None}, {}]
    run.samples.write_text("".join(json.dumps(row) + "\n" for row in (*odd, good)))
    assert [sample.after for sample in read_samples(run.samples)] == ["a"]


def test_a_manifest_does_not_lead_out_of_its_checkpoint(run: Run) -> None:
    point = run.checkpoints / "checkpoint-2"
    point.mkdir(parents=True)
    (point / STATE).write_text('{"global_step": 2}')
    (run.path / "x").write_bytes(b"")
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    for name, known in (("../../x", False), (str(run.path / "x"), False), ("x", True)):
        files = {name: {"size": 0, "sha256": nothing}}
        (point / "x").write_bytes(b"")
        (point / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
        assert (fault_of(point) is None) == known


def test_a_run_beside_that_is_damaged_has_no_rate(run: Run, recipe: Any) -> None:
    run.recipe.write_text(recipe().to_yaml())
    for facts in ({"sessions": 3}, {"sessions": [3]}, {"device": []}, {}, {"sessions": [{"device": "x"}]}):
        run.environment.write_text(json.dumps(facts))
        assert measured(recipe(), "x") is None
