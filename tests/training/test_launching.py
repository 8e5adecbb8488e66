"""What is asked for, and what is told of processes that ended, without starting any."""

from __future__ import annotations

import json
import logging
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mamba_sft.cli.launched import leave_report
from mamba_sft.errors import DataError, UsageError
from mamba_sft.run import Run
from mamba_sft.training.launching import (
    Launch,
    LaunchedError,
    _as_launcher,
    _Ended,
    asked_launch,
    refuse_impossible,
)


def test_what_is_asked_for() -> None:
    assert asked_launch(None, None, None, None) is None
    assert asked_launch(8, None, None, None) == Launch(8)
    assert asked_launch(8, 1, 0, None) == asked_launch(8, 1, 0, "node0:29500") == Launch(8)
    several = asked_launch(8, 4, 3, "node0:29500")
    assert several == Launch(8, 4, 3, "node0", 29500)
    words = ["--processes", "8", "--nodes", "4", "--rank", "3", "--master", "node0:29500"]
    assert several.options == words
    six = asked_launch(1, 2, 0, "[fd00::1]:1")
    assert six is not None
    assert (six.host, six.port, six.options[-1]) == ("fd00::1", 1, "[fd00::1]:1")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ((None, 4, None, None), "`--nodes` goes with `--processes`"),
        ((None, None, None, "a:1"), "`--master` goes with `--processes`"),
        ((0, None, None, None), "`--processes` takes at least one, not 0"),
        ((2, 0, 0, "a:1"), "`--nodes` takes at least one, not 0"),
        ((2, 4, 0, None), "`--nodes 4` needs `--master`"),
        ((2, 4, None, "a:1"), "`--nodes 4` needs `--rank`"),
        ((2, 4, 4, "a:1"), "`--nodes 4` and `--rank 4`"),
        ((2, 4, -1, "a:1"), "`--nodes 4` and `--rank -1`"),
        ((2, 4, 0, "a"), "`--master a` is no HOST:PORT"),
        ((2, 4, 0, "a:0"), "`--master a:0` is no HOST:PORT"),
        ((2, 4, 0, "a:65536"), "`--master a:65536` is no HOST:PORT"),
        ((2, 4, 0, "fd00::1:5"), "is no HOST:PORT"),
        ((2, None, None, "a:1"), "are for several machines"),
        ((2, None, 0, None), "are for several machines"),
        ((2, 1, 1, "a:1"), "`--nodes 1` and `--rank 1`"),
    ],
)
def test_what_does_not_go_together(asked: Any, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        asked_launch(*asked)
    assert told in caught.value.message
    assert caught.value.hint


def test_a_process_that_torchrun_started_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="a launcher has started this process already"):
        asked_launch(2, None, None, None)


def test_there_are_as_many_gpus_as_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_impossible(Launch(64), 20.0)  # without a GPU they share the processor
    for count, told in ((4, "there are 4 GPUs"), (1, "there is 1 GPU")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        refuse_impossible(Launch(count), 20.0)
        with pytest.raises(UsageError, match=told):
            refuse_impossible(Launch(count + 1), 20.0)


def test_the_machine_of_rank_0_is_known() -> None:
    refuse_impossible(Launch(2, 2, 1, "127.0.0.1", 29500), 20.0)
    with pytest.raises(UsageError, match=r"`no-such-host\.invalid` is not known here"):
        refuse_impossible(Launch(2, 2, 1, "no-such-host.invalid", 29500), 20.0)


def test_an_older_torch_gives_no_longer_grace_than_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.training.launching._has_timeout", lambda config: False)
    refuse_impossible(Launch(2), 30.0)
    with pytest.raises(UsageError, match="grace_seconds: 31"):
        refuse_impossible(Launch(2), 31.0)


class Left:
    """What processes of a machine leave behind, and what is told of it."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch):
        self.place = place
        self.monkeypatch = monkeypatch
        self.launch = launch
        self.run = Run(place / "run")

    def error(self, local: int, error: BaseException, at: float) -> None:
        directory = self.place / "attempt_0" / str(local)
        directory.mkdir(parents=True, exist_ok=True)
        self.monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(directory / "error.json"))
        self.monkeypatch.setattr("mamba_sft.cli.launched.time.time", lambda: at)
        assert leave_report(error) is False  # our launcher did not start this process

    def output(self, local: int, text: str) -> None:
        directory = self.place / "attempt_0" / str(local)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "stderr.log").write_text(text)

    def told(self, **failures: tuple[int, float]) -> LaunchedError:
        """What is told, given the exit code of each rank and when the agent saw it, in order."""
        seen: Any = {
            int(rank[1:]): SimpleNamespace(
                exitcode=code,
                pid=1000 + int(rank[1:]),
                timestamp=int(at),
                signal_name=lambda code=code: signal.Signals(-code).name,
            )
            for rank, (code, at) in failures.items()
        }
        return _Ended(self.launch, self.run, self.place).by_failure(seen)


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Left:
    return Left(tmp_path, monkeypatch, Launch(3))


def test_the_one_that_was_killed_is_told_and_not_those_that_lost_it(left: Left) -> None:
    left.error(0, RuntimeError("connection closed by peer"), 101.0)
    left.output(1, "Fatal Python error: Segmentation fault\n")
    told = left.told(r1=(-signal.SIGKILL, 102), r0=(1, 101), r2=(-signal.SIGKILL, 132))
    assert told.message == (
        "rank 1 (process 1001) was killed by SIGKILL, which ended the run; it left no traceback, and last "
        "wrote:\n  Fatal Python error: Segmentation fault"
    )
    assert told.exit_code == 1
    assert "want of memory" in (told.hint or "")
    late = left.told(r0=(1, 101), r2=(-signal.SIGKILL, 132))  # by the agent, half a minute later
    assert late.message.startswith("rank 0 failed, which ended the run: RuntimeError: connection closed")


def test_the_first_traceback_is_told(left: Left) -> None:
    left.error(0, RuntimeError("connection closed by peer"), 101.2)
    left.error(2, ValueError("a bug"), 101.1)
    told = left.told(r0=(1, 101), r2=(1, 101), r1=(-signal.SIGTERM, 102))
    assert told.message == "rank 2 failed, which ended the run: ValueError: a bug\nValueError: a bug"
    assert (told.exit_code, told.heading, told.hint) == (1, "error", None)


def test_what_all_say_is_told_as_one_process_would(left: Left) -> None:
    for local in range(3):
        left.error(local, UsageError("a field is wrong", hint="mend it"), 101.0 + local)
    told = left.told(r0=(2, 101), r1=(2, 102), r2=(2, 103))
    assert (told.message, told.hint, told.exit_code) == ("a field is wrong", "mend it", 2)


def test_what_one_says_is_told_with_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = Left(tmp_path, monkeypatch, Launch(2, 4, 3, "a", 1))
    left.error(1, DataError("a row is bad"), 101.0)
    assert left.told(r7=(1, 101), r6=(-signal.SIGTERM, 102)).message == "rank 7: a row is bad"


def test_a_signal_to_one_of_them_stops_all_and_is_no_error(left: Left) -> None:
    for local in range(3):
        left.error(local, KeyboardInterrupt(), 101.0)
    told = left.told(r1=(130, 101), r0=(130, 101), r2=(130, 101))
    assert (told.message, told.exit_code, told.heading) == ("by a signal", 130, "stopped")


def test_one_that_says_nothing_is_told_by_its_exit_code(left: Left) -> None:
    told = left.told(r1=(3, 101), r0=(-signal.SIGTERM, 102))
    assert told.message.startswith("rank 1 (process 1001) ended with exit code 3, which ended the run")


def test_a_report_cut_off_is_no_report(left: Left) -> None:
    left.error(0, ValueError("a bug"), 101.0)
    path = left.place / "attempt_0" / "0" / "error.json"
    path.write_text(path.read_text()[:40])
    assert "exit code 1" in left.told(r0=(1, 101)).message


def test_what_was_not_logged_before_is_not_logged_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    with _as_launcher(Launch(2), ["train", "quickstart"]):
        assert logging.root.manager.disable == logging.CRITICAL
    assert logging.root.manager.disable == logging.CRITICAL


def test_torchrun_can_read_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    before = int(time.time())
    leave_report(DataError("a row is bad", hint="mend it"))
    failure = ProcessFailure(local_rank=1, pid=5, exitcode=1, error_file=str(path))
    assert failure.timestamp >= before
    content: Any = failure.message
    assert content["extraInfo"]["py_callstack"] == "a row is bad\nhint: mend it"
    assert json.loads(path.read_text())["mamba_sft"]["exit_code"] == 1
