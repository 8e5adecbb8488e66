"""One writer in a directory: held, refused, taken over, and safe between processes that start at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mamba_sft import processes
from mamba_sft.errors import LockedError
from mamba_sft.processes import Process
from mamba_sft.run import Run, write_atomically
from mamba_sft.run_contents import mark
from mamba_sft.run_lock import Holder, hold_output, hold_run, refuse_if_held

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from pathlib import Path
from mamba_sft.run import Run
from mamba_sft.run_lock import hold_run
with hold_run(Run(Path(sys.argv[1])), "merge"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_holds(run: Run) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        try:
            yield other
        finally:
            other.kill()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "runs" / "x")
    run.path.mkdir(parents=True)
    mark(run)
    return run


def take(run: Run, verb: str = "train") -> None:
    with hold_run(run, verb):
        pass


def leave(run: Run, **changes: Any) -> Holder:
    """Leaves a lock as a process of this host would that has ended."""
    process = replace(Process.own(), birth="12345678")
    holder = replace(Holder.own("train"), **{"process": process.name} | changes)
    write_atomically(run.lock, json.dumps(asdict(holder)))
    return holder


def test_a_lock_is_held_while_the_block_writes(run: Run) -> None:
    with hold_run(run, "train"):
        holder = json.loads(run.lock.read_text())
        assert (holder["verb"], holder["pid"]) == ("train", os.getpid())
    assert not run.lock.exists()


def test_a_directory_that_nothing_was_written_into_does_not_stay(tmp_path: Path) -> None:
    with hold_run(Run(tmp_path / "a" / "b" / "run"), "train"):
        assert (tmp_path / "a" / "b" / "run").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_second_one_is_refused_with_all_that_is_known_of_the_first(run: Run) -> None:
    with another_holds(run) as other:
        for attempt in (lambda: take(run), lambda: refuse_if_held(run.lock, run.path)):
            with pytest.raises(LockedError) as caught:
                attempt()
            host, started = os.uname().nodename, time.strftime("%Y-%m-%d", time.gmtime())
            assert caught.value.message.startswith(
                f"`{run.path}` is being written by `mamba-sft merge`: process {other.pid} on `{host}`,"
                f" since {started} "
            )
            assert caught.value.hint == f"wait until it is done, or stop it: `kill {other.pid}`"
        assert Holder.read(run.lock)


def test_the_lock_of_a_killed_process_is_taken_over_and_told(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with another_holds(run) as other:
        other.kill()
        while Process.own().runs and Holder.read(run.lock).runs:  # type: ignore[union-attr]
            time.sleep(0.01)
        assert other.returncode is None, "nobody has waited for it: it is a zombie"
        refuse_if_held(run.lock, run.path)
        with hold_run(run, "train"):
            assert Holder.read(run.lock).pid == os.getpid()  # type: ignore[union-attr]
    assert f"took over the lock of `{run.path}`: process {other.pid} on " in caplog.text
    assert "`mamba-sft merge` since 20" in caplog.text
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_a_stopped_process_still_holds_it(run: Run) -> None:
    with another_holds(run) as other:
        os.kill(other.pid, signal.SIGSTOP)
        with pytest.raises(LockedError, match=f"process {other.pid} on"):
            take(run)


def test_a_process_id_that_is_used_again_is_not_the_holder(run: Run) -> None:
    leave(run)  # this process's id, started at another time
    take(run)


def test_the_lock_of_another_host_is_the_users_to_remove(run: Run) -> None:
    process = replace(Process.own(), space="0" * 8)
    leave(run, host="node17", process=process.name)
    with pytest.raises(LockedError, match=r"`mamba-sft train`: process \d+ on `node17`") as caught:
        take(run, "export")
    assert caught.value.hint is not None
    assert caught.value.hint.endswith(f"if it does not, remove its lock: `rm {run.lock}`")
    run.lock.unlink()
    take(run, "export")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"pid": 1}', "\xff", "[" * 100_000, '{"token": "../../x"}']
)
def test_a_lock_that_cannot_be_read_is_not_judged(
    run: Run, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mamba_sft.run_lock.PATIENCE", 0.1)
    run.lock.write_text(text, encoding="latin-1")
    with pytest.raises(LockedError, match=r"has a lock that cannot be read: `.*lock\.json`"):
        take(run)
    assert run.lock.exists()


def test_a_lock_that_is_a_link_is_not_followed(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mamba_sft.run_lock.PATIENCE", 0.1)
    run.lock.symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(LockedError, match="cannot be read"):
        take(run)
    assert not (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("token", ["/../../x", "ABCDEFGH", "1234567"])
def test_a_token_is_no_path(run: Run, token: str) -> None:
    leave(run, token=token)
    assert Holder.read(run.lock) is None


def test_a_place_that_cannot_be_written_is_one_message(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LockedError, match=r"cannot write into `.*file/run`: .*file` is a file"):
        take(Run(tmp_path / "file" / "run"))

    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mamba_sft.run_lock.os.open", refuse)
    with pytest.raises(LockedError, match=r"cannot write into `.*x`: this user has no permission"):
        take(run)


def test_a_disk_that_is_full_leaves_no_lock(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "its disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("mamba_sft.run_lock.os.fsync", full)
        with pytest.raises(LockedError, match="its disk is full"):
            take(run)
    assert not run.lock.exists()


def test_outputs_in_a_run_are_the_runs(run: Run, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(run.path)
    with another_holds(run):
        for output in (run.merged, run.export / "hf", run.path / "deep" / "er", link / "merged", run.path):
            with pytest.raises(LockedError), hold_output(output, "merge"):
                pass
    unmarked = Run(tmp_path / "copied")
    with hold_output(unmarked.merged, "merge", unmarked):
        assert unmarked.lock.is_file()


def test_outputs_elsewhere_have_a_lock_of_their_own(run: Run, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with hold_output(one, "merge", run), hold_output(two, "merge", run):
        assert not run.lock.exists()
        assert not one.exists(), "it is replaced as a whole, so its lock is beside it"
        with pytest.raises(LockedError, match=f"`{one}` is being written"), hold_output(one, "export"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


STARTERS = """
import sys, time
from pathlib import Path
from mamba_sft.errors import LockedError
from mamba_sft.run import Run
from mamba_sft.run_lock import hold_run
run, until = Run(Path(sys.argv[1])), float(sys.argv[2])
inside, taken, refused = run.path / "inside", 0, 0
time.sleep(max(0, until - 2 - time.time()))
while time.time() < until:
    try:
        with hold_run(run, "train"):
            inside.open("x").close()  # fails if another is inside
            taken += 1
            inside.unlink()
    except LockedError:
        refused += 1
print(taken, refused)
"""


def test_of_many_starters_one_is_inside(run: Run) -> None:
    command = [sys.executable, "-c", STARTERS, str(run.path), str(time.time() + 4)]
    others = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(4)
    ]
    taken = refused = 0
    for other in others:
        output, errors = other.communicate()
        assert other.returncode == 0, errors
        taken, refused = (sum(pair) for pair in zip((taken, refused), map(int, output.split()), strict=True))
    assert taken > 10
    assert refused > 0, "they must have met"


TAKE_OVER = """
import json, os, random, sys, time
from dataclasses import asdict, replace
from pathlib import Path
from mamba_sft.errors import LockedError
from mamba_sft.processes import Process
from mamba_sft.run import Run
from mamba_sft.run_lock import Holder, hold_run
run, until = Run(Path(sys.argv[1])), float(sys.argv[2])
inside, taken = run.path / "inside", 0
dead = replace(Process.own(), birth="12345678").name
judge = Holder.runs.fget
def judge_slowly(holder):  # what was seen is old by the time that it is acted on, as on a network disk
    runs = judge(holder)
    time.sleep(0.01 * random.random())
    return runs
Holder.runs = property(judge_slowly)
time.sleep(max(0, until - 2 - time.time()))
while time.time() < until:
    try:
        with hold_run(run, "train"):
            inside.open("x").close()
            taken += 1
            inside.unlink()
            # What is left is the lock of a dead process, as if this one had been killed here.
            left = run.lock.with_name("left")
            left.write_text(json.dumps(asdict(replace(Holder.own("train"), process=dead))))
            os.replace(left, run.lock)
    except LockedError:
        pass
print(taken)
"""


def test_of_many_that_take_over_one_is_inside(run: Run) -> None:
    command = [sys.executable, "-c", TAKE_OVER, str(run.path), str(time.time() + 4)]
    others = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(4)
    ]
    taken = 0
    for other in others:
        output, errors = other.communicate()
        assert other.returncode == 0, errors
        taken += int(output)
    assert taken > 10
    with hold_run(run, "train"):
        assert {path.name for path in run.path.iterdir()} == {"run.json", "lock.json"}


def test_a_successor_that_was_killed_is_succeeded(run: Run) -> None:
    first = leave(run)
    second = replace(first, token="aaaaaaaa")
    run.lock.with_name(f"lock.json.{first.token}").write_text(json.dumps(asdict(second)))
    third = replace(first, token="bbbbbbbb")
    run.lock.with_name(f"lock.json.{first.token}.{second.token}").write_text(json.dumps(asdict(third)))
    run.lock.with_name("lock.json.cccccccc").write_text(json.dumps(asdict(third)))
    with hold_run(run, "train"):
        assert {path.name for path in run.path.iterdir()} == {"run.json", "lock.json"}


def test_a_process_is_known_by_its_start() -> None:
    own = Process.own()
    assert own.runs is True
    assert Process.from_name(own.name) == own
    assert replace(own, birth="12345678").runs is False
    assert replace(own, space="12345678").runs is None
    assert replace(own, pid=2**22 + 1).runs is False  # beyond the largest id that Linux gives
    for name in ("", "x", "12345678-0-", f"{own.name}0", f"{own.name}\n", own.name.replace("-", "_")):
        assert Process.from_name(name) is None


def test_a_process_is_known_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    own = Process.own()
    assert own.runs is True
    assert replace(own, birth="12345678").runs is False
    assert replace(own, pid=2**22 + 1).runs is False


def test_a_process_that_is_hidden_is_taken_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "stat").touch()
    own = Process.own()
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    monkeypatch.setattr(processes, "_space", lambda: own.space)
    assert own.runs is True
    assert replace(own, pid=2**22 + 1).runs is False
