"""The run directory: found, refused, and never half-written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.errors import UsageError
from mamba_sft.processes import Process
from mamba_sft.run import Run, atomic_directory, write_atomically


def make_run(path: Path, age: float) -> Run:
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text("output_dir: x\n")
    os.utime(path / "recipe.yaml", (age, age))
    return Run(path)


def test_newest_run_is_the_youngest_recipe(tmp_path: Path) -> None:
    old, new = make_run(tmp_path / "b", 1000), make_run(tmp_path / "a", 2000)
    assert Run.newest(tmp_path) == new
    os.utime(old.recipe, (3000, 3000))
    assert Run.newest(tmp_path) == old


def test_a_run_takes_its_path_as_text(tmp_path: Path) -> None:
    assert Run(str(tmp_path)) == Run(tmp_path)  # type: ignore[arg-type]
    assert Run(str(tmp_path)).metrics.empty  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, 5, ["runs/x"]])
def test_what_is_no_path_is_no_run(wrong: Any) -> None:
    with pytest.raises(UsageError, match=f"and this is a `{type(wrong).__name__}`"):
        Run.open(wrong)


def test_no_run_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run under") as caught:
        Run.newest(tmp_path)
    assert "mamba-sft train quickstart" in (caught.value.hint or "")


def test_open_refuses_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a run directory: it has no `recipe\.yaml`"):
        Run.open(tmp_path)
    with pytest.raises(UsageError, match="no run at"):
        Run.open(tmp_path / "absent")
    run = make_run(tmp_path / "run", 1)
    assert Run.open(str(run.path)) == run
    assert Run.open(run) is run


def test_atomic_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "merged"
    with atomic_directory(final) as partial:
        (partial / "a").write_text("first")
        assert not final.exists()
    assert (final / "a").read_text() == "first"

    def fail_halfway() -> None:
        with atomic_directory(final) as partial:
            (partial / "a").write_text("second, half")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        fail_halfway()
    assert (final / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]

    with atomic_directory(final) as partial:
        (partial / "b").write_text("third")
    assert [path.name for path in final.iterdir()] == ["b"]


def test_a_directory_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, synced = tmp_path / "merged", []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, final.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with atomic_directory(final) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "b").write_text("b")
        (partial / "a").write_text("a")
    parts = [final / "a", final / "sub", final / "sub" / "b", final]
    assert {path.stat().st_ino for path in parts} == {number for number, there in synced if not there}
    assert synced[-1] == (tmp_path.stat().st_ino, True)

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    def replace() -> None:
        with atomic_directory(final) as partial:
            (partial / "a").write_text("another")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="full"):
        replace()
    assert (final / "a").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def dead() -> Process:
    """A process of this host that has ended."""
    done = subprocess.run(
        [sys.executable, "-c", "from mamba_sft.processes import Process; print(Process.own().name)"],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    process = Process.from_name(done.stdout.strip())
    assert process is not None
    return process


@pytest.mark.parametrize("elsewhere", [False, True])
def test_leftovers_of_a_killed_process_do_not_stay(tmp_path: Path, elsewhere: bool) -> None:
    process = replace(dead(), space="0" * 8) if elsewhere else dead()
    (tmp_path / f"merged.{process.name}.partial").mkdir()
    (tmp_path / f"merged.{process.name}.partial" / "half").write_text("x")
    for name in ("merged.partial", "merged.old", "merged.mine.old", f"merging.{process.name}.partial"):
        (tmp_path / name).mkdir()  # somebody's own, or of another name
    (tmp_path / f"report.html.{process.name}.partial").write_text("half")
    with atomic_directory(tmp_path / "merged") as partial:
        assert not list(partial.iterdir())
    write_atomically(tmp_path / "report.html", "whole")  # no lock: what may still be written is left alone
    left = {f"report.html.{process.name}.partial"} if elsewhere else set()
    assert {path.name for path in tmp_path.iterdir()} == left | {
        "merged", "report.html", "merged.partial", "merged.old", "merged.mine.old",
        f"merging.{process.name}.partial",
    }  # fmt: skip


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PAUSE], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        name = other.stdout.readline().strip()
        half = tmp_path / f"merged.{name}.partial"
        half.mkdir()
        with atomic_directory(tmp_path / "merged"):
            assert half.is_dir()
        other.kill()
    with atomic_directory(tmp_path / "merged"):
        assert not half.exists()


PAUSE = """
import time
from mamba_sft.processes import Process
print(Process.own().name, flush=True)
time.sleep(60)
"""


def test_a_directory_that_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    old = tmp_path / f"merged.{dead().name}.old"
    old.mkdir()
    (old / "a").write_text("the only copy")

    def fail() -> None:
        with atomic_directory(tmp_path / "merged"):
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        fail()
    assert (tmp_path / "merged" / "a").read_text() == "the only copy"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_write_atomically_makes_parents_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, "é")
    write_atomically(path, "ü")
    assert path.read_text(encoding="utf-8") == "ü"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
