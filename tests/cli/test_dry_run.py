"""`train` touches nothing in the output directory, nor near it, before the run starts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft import Run
from mamba_sft.cli.app import app
from mamba_sft.errors import AdapterError, TrainingError
from mamba_sft.planning import fitting
from mamba_sft.planning.gpus import Accelerator
from mamba_sft.training import fine_tuning
from mamba_sft.training.fine_tuning import RunInterruptedError, train, train_prepared
from mamba_sft.training.preparation import prepare
from tests.training.test_fine_tuning import SignalAt

SKIP = "data.on_bad_row=skip"


@pytest.fixture
def settings(recipe: Any, chats: Path, tmp_path: Path) -> Path:
    """A recipe's file, one of whose rows is bad and skipped."""
    add_bad_row(chats, "usr")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(SKIP).to_yaml())
    return path


def add_bad_row(chats: Path, role: str) -> None:
    with chats.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": [{"role": role, "content": "hello"}]}) + "\n")


def tree(root: Path) -> dict[str, tuple[int, str]]:
    """Everything below a directory: when it was last written, and the checksum of what a file holds."""
    return {
        str(path.relative_to(root)): (
            path.stat().st_mtime_ns,
            "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in (root, *root.rglob("*"))
    }


def command(settings: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["train", str(settings), *words])


def refused_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Accelerator("a small one", 10**8, 10**8, multiprocessors=2, type="cpu")
    monkeypatch.setattr(fitting, "recognized", lambda facts: device)


def reasons(run: Run) -> list[str]:
    return [json.loads(line)["reason"] for line in run.rejected.read_text().splitlines()]


def test_a_dry_run_makes_nothing(settings: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    checked = command(settings, "--dry-run")
    assert checked.exit_code == 0, checked.output
    assert "4 steps; all is well" in checked.output
    assert tree(tmp_path) == before
    assert not (tmp_path / "run").exists()


def test_a_dry_run_changes_nothing_of_a_finished_run(
    settings: Path, recipe: Any, chats: Path, tmp_path: Path
) -> None:
    run = train(recipe(SKIP))
    assert len(reasons(run)) == 1
    add_bad_row(chats, "assistent")
    before = tree(tmp_path)
    assert command(settings, "--dry-run").exit_code == 0
    assert command(settings, "--dry-run", "--overwrite").exit_code == 0
    assert command(settings).exception.message.endswith("holds a finished run")
    assert tree(tmp_path) == before


def test_a_dry_run_changes_nothing_of_a_run_to_resume(settings: Path, recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(recipe(SKIP)), callbacks=[SignalAt(2)])
    before = tree(tmp_path)
    checked = command(settings, "--resume", "--dry-run")
    assert checked.exit_code == 0, checked.output
    assert tree(tmp_path) == before
    run = train(recipe(SKIP), resume=True)
    assert len(reasons(run)) == 1


def test_a_run_refused_for_memory_leaves_nothing(
    settings: Path, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for there in (False, True):
        if there:
            train(recipe(SKIP))
        with monkeypatch.context() as patch:
            refused_for_memory(patch)
            before = tree(tmp_path)
            for words in ([], ["--dry-run"], ["--overwrite"]):
                refused = command(settings, *words)
                assert isinstance(refused.exception, TrainingError), refused.output
            assert "a small one has 95.4 MiB" in refused.exception.message
            assert tree(tmp_path) == before


def test_a_run_that_cannot_attach_its_adapter_leaves_nothing(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: Any, **more: Any) -> None:
        raise AdapterError("no such layer")

    monkeypatch.setattr(fine_tuning, "attach_adapter", refuse)
    before = tree(tmp_path)
    with pytest.raises(AdapterError, match="no such layer"):
        train(recipe())
    after = tree(tmp_path)
    del before["."], after["."]  # the run's directory was there for its lock, and is gone
    assert after == before


def test_a_real_run_lists_the_rows_it_rejected_and_only_those(recipe: Any, chats: Path) -> None:
    add_bad_row(chats, "usr")
    run = train(recipe(SKIP, "train.max_steps=1"))
    assert reasons(run) == ["turn 1: unknown role 'usr'; did you mean `user`?"]
    lines = chats.read_text().splitlines(keepends=True)
    chats.write_text("".join(lines[:-1]))
    train(recipe(SKIP, "train.max_steps=1"), overwrite=True)
    assert not run.rejected.exists()
    add_bad_row(chats, "assistent")
    train(recipe(SKIP, "train.max_steps=1"), overwrite=True)
    assert reasons(run) == ["turn 1: unknown role 'assistent'; did you mean `assistant`?"]
