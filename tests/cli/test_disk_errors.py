"""What a file system refuses is one message on the command line, before anything was loaded."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mamba_sft import disk
from mamba_sft.cli import app
from mamba_sft.training import fine_tuning


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The exit code of a command, and what it said."""
    monkeypatch.setattr(sys, "argv", ["mamba-sft", *words])
    with pytest.raises(SystemExit) as caught:
        app.main()
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.fixture
def settings(recipe: Any, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe().to_yaml())
    return path


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_train_says_what_was_refused_before_the_weights(
    settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dry: list[str],
    code: int,
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(disk.tempfile, "NamedTemporaryFile", fail)
    monkeypatch.setattr(fine_tuning, "load_model", lambda section: pytest.fail("loaded"))
    exit_code, said = run(monkeypatch, capsys, "train", str(settings), *dry)
    assert exit_code == 1
    assert said.count("error:") == 1
    assert "cannot write to" in said
    assert "hint:" in said
    assert not (settings.parent / "run").exists()


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_a_file_in_the_way_of_a_parent(
    settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    file = settings.parent / "chats.jsonl"
    words = {
        "train": ["train", str(settings), f"output_dir={file}/a/b", "--dry-run"],
        "generate": ["generate", str(settings.parent), "--prompt", "x", "--output", f"{file}/a/b.jsonl"],
    }
    exit_code, said = run(monkeypatch, capsys, *words[verb])
    assert exit_code in (1, 2)
    assert "chats.jsonl` is a file" in "".join(said.split("\n"))


def test_a_full_disk_anywhere_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(code: int, *name: str) -> None:
        def call() -> None:
            raise OSError(code, os.strerror(code), *name)

        monkeypatch.setattr(app, "app", call)

    fail(errno.ENOSPC, "/cache/x")
    exit_code, said = run(monkeypatch, capsys)
    assert exit_code == 1
    assert "error: `/cache/x`: its disk is full" in said
    fail(errno.EROFS)
    assert "a file cannot be read or written: its file system is read-only" in run(monkeypatch, capsys)[1]
    fail(errno.ENOENT, "ours")
    with pytest.raises(FileNotFoundError):
        app.main()
