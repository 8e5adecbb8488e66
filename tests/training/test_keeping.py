"""The adapter of a run whose disk is full at the end: nothing that can be saved is lost."""

from __future__ import annotations

import errno
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_sft import Run
from mamba_sft.errors import TrainingError
from mamba_sft.training import keeping
from mamba_sft.training.fine_tuning import train
from mamba_sft.training.keeping import Unsaved, save_surely
from tests.training.test_fine_tuning import adapter, assert_same_adapter

SCRIPT = """
import errno, resource, sys
from pathlib import Path
from mamba_sft.cli import app
from mamba_sft.training import fine_tuning, keeping, sample_answers
keeping.RETRY_PAUSE = 0.2
keeping.RETRY_SECONDS = {seconds}
answer, save = sample_answers._answer, fine_tuning.save_trained
def limit(preparation, trainer, when):
    if when == "after" and {limited}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    return answer(preparation, trainer, when)
def refuse(model, directory, **more):
    if {refused} and Path({run!r}) in directory.parents:
        (directory / "half").write_text("x")
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    save(model, directory, **more)
sample_answers._answer, fine_tuning.save_trained = limit, refuse
sys.argv = ["mamba-sft", "train", {recipe!r}]
app.main()
"""


@pytest.fixture
def child(recipe: Any, tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """Starts `mamba-sft train` as a process of its own, with a disk that refuses the adapter."""

    def start(
        *, limited: bool = False, refused: bool = False, seconds: float = 600, **streams: Any
    ) -> subprocess.Popen[bytes]:
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe().to_yaml())
        script = SCRIPT.format(
            seconds=seconds, limited=limited, refused=refused, run=str(tmp_path / "run"), recipe=str(path)
        )
        return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, **streams)

    return start


def read_until(descriptor: int, words: str, seconds: float = 120) -> str:
    """What a process says up to some words."""
    text, end = "", time.monotonic() + seconds
    while words not in text:
        assert time.monotonic() < end, text
        if select.select([descriptor], [], [], 1)[0]:
            try:
                piece = os.read(descriptor, 65536).decode(errors="replace")
            except OSError:
                piece = ""
            assert piece, f"it ended without saying {words!r}: {text}"
            text += piece
    return text


def test_the_adapter_is_saved_when_there_is_room_again(
    recipe: Any, tmp_path: Path, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """No file may be larger than 100 bytes when training ends; then another process lifts that."""
    process = child(limited=True, stderr=subprocess.PIPE)
    assert process.stderr is not None
    told = read_until(process.stderr.fileno(), "free some space")
    assert "the adapter cannot be written" in told
    assert "tried again for 10 min" in told
    assert not list(Run(tmp_path / "run").path.glob("adapter*/adapter_model.safetensors"))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr.decode()
    assert b"trained: " in stdout
    run = Run(tmp_path / "run")
    assert run.report.is_file()
    assert_same_adapter(train(recipe(name="undisturbed")), run, 0)


def test_sigterm_is_a_last_try_and_says_what_there_is(
    tmp_path: Path, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = child(limited=True, stderr=subprocess.PIPE)
    assert process.stderr is not None
    read_until(process.stderr.fileno(), "free some space")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    said = stderr.decode()
    assert process.returncode == 1, said
    assert "Traceback" not in said
    assert "the adapter cannot be written" in said
    assert "checkpoint-4`" in said
    assert "--resume" in said
    assert not list((tmp_path / "run").glob("adapter*"))


def test_a_person_gives_another_directory(
    recipe: Any, tmp_path: Path, child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    ours, theirs = pty.openpty()
    other = tmp_path / "elsewhere"
    (other / "run-adapter").mkdir(parents=True)
    (other / "run-adapter" / "thesis").write_text("mine")
    process = child(refused=True, stdin=theirs, stderr=theirs)
    os.close(theirs)
    told = read_until(ours, "type another directory")
    assert "quota" in told
    assert "bytes" in told
    os.write(ours, b"/proc/nowhere\n")
    assert "/proc/nowhere/run-adapter" in read_until(ours, "type another directory")
    os.write(ours, f"{other}\n".encode())
    said = read_until(ours, "mv ")
    assert process.wait(timeout=120) == 1
    assert "Traceback" not in said
    moved = Run(tmp_path / "run")
    (other / "run-adapter2").rename(moved.adapter)
    assert (other / "run-adapter" / "thesis").read_text() == "mine"
    assert moved.report.is_file()
    assert_same_adapter(train(recipe(name="undisturbed")), moved, 0)
    os.close(ours)


class Disk:
    """A disk that refuses some tries."""

    def __init__(self, refusals: int, code: int = errno.ENOSPC):
        self.refusals, self.code = refusals, code
        self.tried: list[Path] = []

    def write(self, place: Path) -> None:
        self.tried.append(place)
        if len(self.tried) <= self.refusals:
            raise OSError(self.code, os.strerror(self.code))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "RETRY_PAUSE", 0.01)
    monkeypatch.setattr(keeping, "RETRY_SECONDS", 0.1)


def test_a_disk_that_never_takes_it(tmp_path: Path) -> None:
    never = Disk(10**9)
    started = time.monotonic()
    said = r"takes 1,234,567 bytes \(1\.18 MiB\), and [\d,]+ are free; there is no checkpoint"
    with pytest.raises(TrainingError, match=said):
        save_surely(never.write, Run(tmp_path / "run"), 1_234_567, None)
    assert time.monotonic() - started >= 0.1
    assert len(never.tried) > 2


def test_a_disk_that_takes_it_later(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert save_surely(Disk(3).write, run, 1, None) == run.adapter


def test_a_bug_is_not_tried_again(tmp_path: Path) -> None:
    def bug(place: Path) -> None:
        raise KeyError(place)

    with pytest.raises(KeyError):
        save_surely(bug, Run(tmp_path), 1, None)


def test_who_gives_up_gets_a_last_try(tmp_path: Path) -> None:
    def give_up(unsaved: Unsaved, seconds: float) -> None:
        raise KeyboardInterrupt

    assert save_surely(Disk(1).write, Run(tmp_path), 1, give_up)
    twice = Disk(9)
    with pytest.raises(TrainingError):
        save_surely(twice.write, Run(tmp_path), 1, give_up)
    assert len(twice.tried) == 2


@pytest.mark.parametrize("gone", [EOFError(), OSError(errno.EIO, "Input/output error")])
def test_a_terminal_that_goes_away_is_waited_for_no_more(tmp_path: Path, gone: Exception) -> None:
    asked = []

    def ask(unsaved: Unsaved, seconds: float) -> None:
        asked.append(unsaved)
        raise gone

    assert save_surely(Disk(4).write, Run(tmp_path), 1, ask)
    assert len(asked) == 1


def test_a_hangup_does_not_end_it(tmp_path: Path) -> None:
    def ask(unsaved: Unsaved, seconds: float) -> None:
        signal.raise_signal(signal.SIGHUP)

    assert save_surely(Disk(2).write, Run(tmp_path), 1, ask)


def test_sigterm_while_it_is_written_does_not_break_it(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    disk = Disk(1)

    def write(place: Path) -> None:
        signal.raise_signal(signal.SIGTERM)
        disk.write(place)

    with pytest.raises(TrainingError):
        save_surely(write, Run(tmp_path), 1, None)
    disk = Disk(0)
    assert save_surely(write, Run(tmp_path), 1, None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_name_of_a_copy_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "mine-adapter").symlink_to("nowhere")
    place = save_surely(Disk(1).write, Run(tmp_path / "mine"), 1, lambda unsaved, seconds: tmp_path)
    assert place == tmp_path / "mine-adapter2"


def test_an_adapter_is_whole_or_not_there(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mamba_sft.training import fine_tuning

    real, tries = fine_tuning.save_trained, []

    def refuse(model: Any, directory: Path, **more: Any) -> None:
        real(model, directory, **more)
        tries.append(sorted(path.name for path in (tmp_path / "run").glob("adapter*")))
        if len(tries) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fine_tuning, "save_trained", refuse)
    run = train(recipe())
    assert adapter(run)
    assert len(tries) == 2
    assert "adapter" not in {name for names in tries for name in names}
