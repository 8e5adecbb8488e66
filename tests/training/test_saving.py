"""Disks that fill up while a run trains: it goes on, and what can be saved is."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl

from mamba_sft import Run, disk
from mamba_sft.errors import TrainingError
from mamba_sft.planning import storage
from mamba_sft.planning.storage import checkpoints_at_once, run_sizes
from mamba_sft.run_contents import mark
from mamba_sft.training import fine_tuning, live_report, preparation, saving
from mamba_sft.training.callbacks import Interruption
from mamba_sft.training.fine_tuning import train, train_prepared
from mamba_sft.training.preparation import prepare
from mamba_sft.training.resuming import newest_resume_point
from mamba_sft.training.saving import Lines
from mamba_sft.training.trainer import Trainer
from tests.training.test_fine_tuning import SignalAt, adapter, assert_same_adapter, losses

FULL = "No space left on device"


def at_step(steps: set[int], error: Exception) -> Callable[..., Any]:
    """A part of saving that fails at some steps; it has written something by then."""

    def fail(method: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(self: Trainer, *arguments: Any, **more: Any) -> Any:
            done = method(self, *arguments, **more)
            if self.state.global_step in steps:
                raise error
            return done

        return replaced

    return fail


ERRORS = [
    ("save_model", SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)")),
    ("save_model", Exception(f"{FULL} (os error 28)")),
    ("_save_optimizer_and_scheduler", RuntimeError("[enforce fail at inline_container.cc:668] . unexpected")),
    ("_save_rng_state", OSError(errno.EDQUOT, "Disk quota exceeded")),
    ("_save_rng_state", OSError(errno.EROFS, "Read-only file system")),
]


@pytest.mark.parametrize(("part", "error"), ERRORS)
def test_a_checkpoint_that_cannot_be_written_stops_nothing(
    recipe: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    part: str,
    error: Exception,
) -> None:
    settings = "train.save_steps=1", "train.save_total_limit=9"
    undisturbed = train(recipe(*settings, name="undisturbed"))
    monkeypatch.setattr(Trainer, part, at_step({2, 3}, error)(getattr(Trainer, part)))
    with caplog.at_level(logging.INFO, "mamba_sft"):
        run = train(recipe(*settings))
    assert_same_adapter(undisturbed, run, 0)
    assert losses(run) == losses(undisturbed)
    assert {path.name for path in run.checkpoints.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    told = [record.getMessage() for record in caplog.records]
    paused = [text for text in told if "is not saved" in text]
    assert [text.split()[4] for text in paused] == ["2", "3"]
    assert all("checkpoint-1`" in text for text in paused)
    assert sum("written again: step 4" in text for text in told) == 1


def test_a_bug_in_saving_is_no_full_disk(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fail = at_step({2}, RuntimeError("shapes differ"))
    monkeypatch.setattr(Trainer, "_save_rng_state", fail(Trainer._save_rng_state))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(recipe())


def test_a_best_checkpoint_that_is_not_saved_is_not_loaded(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = "data.validation=0.2", "eval.eval_steps=1", "train.save_steps=1"
    undisturbed = train(recipe(*settings, name="undisturbed"))
    steps = [line["step"] for line in undisturbed.read_metrics() if "eval_loss" in line]
    best = min(undisturbed.read_metrics(), key=lambda line: line.get("eval_loss", 99))["step"]
    assert best == steps[-1], "the last step is the best, so it is what the run ends with"
    error = OSError(errno.ENOSPC, FULL)
    monkeypatch.setattr(Trainer, "_save_rng_state", at_step({4}, error)(Trainer._save_rng_state))
    assert_same_adapter(undisturbed, train(recipe(*settings)), 0)


def test_a_stop_says_that_its_checkpoint_is_not_there(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ENOSPC, FULL)
    monkeypatch.setattr(Trainer, "_save_rng_state", at_step({3}, error)(Trainer._save_rng_state))
    monkeypatch.setattr(saving, "STOP_PAUSE", 0.01)
    with pytest.raises(fine_tuning.RunInterruptedError, match=r"stopped at step 3 .*the newest .*-2`"):
        train_prepared(prepare(recipe("train.grace_seconds=2")), callbacks=[SignalAt(3)])


def test_the_checkpoint_of_a_stop_is_tried_again(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    real = Trainer._save_rng_state

    def refuse(self: Trainer, directory: str) -> None:
        real(self, directory)
        tries.append(directory)
        if len(tries) < 4:
            raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(Trainer, "_save_rng_state", refuse)
    monkeypatch.setattr(saving, "STOP_PAUSE", 0.01)
    with pytest.raises(fine_tuning.RunInterruptedError, match=r"saved `.*checkpoint-1`"):
        train_prepared(prepare(recipe()), callbacks=[SignalAt(1)])
    assert len(tries) == 4


class TwoProcesses:
    """What the trainer knows of its processes, as the first of two sees it."""

    num_processes, is_main_process = 2, True


class State:
    global_step, best_model_checkpoint = 7, None


class OneOfTwo:
    accelerator, state, interruption = TwoProcesses(), State(), Interruption(20)
    control = TrainerControl()


def test_processes_agree_before_they_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None begins where there is no room, and what the disk refuses later ends no run."""
    saves, written = saving.CheckpointSaves(Run(tmp_path), [1000]), []
    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    saves.save(OneOfTwo(), lambda: written.append(1))  # type: ignore[arg-type]
    assert not written
    assert "a checkpoint takes" in caplog.text
    monkeypatch.undo()
    saves.save(OneOfTwo(), lambda: written.append(1))  # type: ignore[arg-type]
    assert written
    caplog.clear()
    saves.save(OneOfTwo(), lambda: (_ for _ in ()).throw(OSError(errno.EDQUOT, "Disk quota exceeded")))  # type: ignore[arg-type]
    assert "your quota on its disk is used up" in caplog.text, "which all of them were told"


class FillAt(TrainerCallback):
    """Fills a disk at the start of a step and frees it at the start of a later one."""

    def __init__(self, disk: Path, fill: int, free: int):
        self.file, self.fill, self.free = disk / "filler", fill, free

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.fill - 1:
            with self.file.open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        break
        if state.global_step == self.free - 1:
            self.file.unlink()


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real one of 4 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    monkeypatch.setattr(disk, "_SPARE", 0)
    monkeypatch.setattr(storage, "FILES", 0)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full_for_some_steps(recipe: Any, small_disk: Path) -> None:
    settings = "train.max_steps=6", "train.save_steps=1", "train.save_total_limit=2"
    undisturbed = train(recipe(*settings, name="undisturbed"))
    here = f"output_dir={small_disk / 'run'}"
    run = train_prepared(prepare(recipe(*settings, here)), callbacks=[FillAt(small_disk, 3, 6)])
    assert_same_adapter(undisturbed, run, 0)
    steps = [line["step"] for line in run.read_metrics()]
    assert steps == [line["step"] for line in undisturbed.read_metrics()], "each line once, none cut off"
    assert {path.name for path in run.checkpoints.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}


def test_what_training_cannot_read_names_the_newest_checkpoint(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(errno.EIO, "Input/output error", "/data/rows.arrow")
    monkeypatch.setattr(Trainer, "training_step", at_step({3}, error)(Trainer.training_step))
    with pytest.raises(TrainingError, match=r"at step 3: `/data/rows.arrow`: .*checkpoint-2`") as caught:
        train(recipe())
    assert "--resume" in (caught.value.hint or "")
    monkeypatch.setattr(Trainer, "training_step", at_step({0}, error)(Trainer.training_step))
    with pytest.raises(TrainingError, match=r"at step 0: .*; there is no checkpoint") as caught:
        train(recipe(name="other"))
    assert "--overwrite" in (caught.value.hint or "")


def test_what_a_run_can_do_without_is_left_out(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, FULL)

    (tmp_path / "prompts.txt").write_text("hello\n")
    monkeypatch.setattr(live_report, "write_report", full)
    monkeypatch.setattr(fine_tuning, "write_samples", full)
    run = train(recipe(f"eval.prompts={tmp_path / 'prompts.txt'}", "eval.max_new_tokens=2"))
    assert adapter(run)
    told = [record.getMessage() for record in caplog.records if "written" in record.getMessage()]
    assert len(told) == 2, told
    assert "steps" in json.loads(run.environment.read_text())


def test_lines_wait_and_are_never_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines = Lines(tmp_path / "log")
    lines.append("one")
    real = Path.open

    class Short:
        """A file on a disk with three bytes left."""

        def __init__(self, file: Any):
            self.file, self.left = file, 3

        def __enter__(self) -> Short:
            return self

        def __exit__(self, *exception: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, FULL)
            self.left -= (count := self.file.write(data[: self.left]))
            return int(count)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(Path, "open", lambda self, *words, **more: Short(real(self, *words, **more)))
    lines.append("two")
    lines.append("three")
    assert (tmp_path / "log").read_text() == "one\n"
    assert sum("wait in memory" in record.getMessage() for record in caplog.records) == 1
    monkeypatch.undo()
    lines.append("four")
    assert (tmp_path / "log").read_text() == "one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("validation", [0, 0.2])
def test_the_plan_has_room_for_what_is_written(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, limit: int, validation: float
) -> None:
    """Held against the most that lies there at any save, and it is no wild guess either."""
    seen, together = [], []
    real = Trainer._save_rng_state

    def look(self: Trainer, directory: str) -> None:
        real(self, directory)
        seen.append(size_of(self.run.path))
        together.append(len(list(self.run.checkpoints.glob("checkpoint-*"))))

    monkeypatch.setattr(Trainer, "_save_rng_state", look)
    settings = f"train.save_total_limit={limit}", f"data.validation={validation}", "eval.eval_steps=1"
    made = recipe(*settings, "train.save_steps=1")
    prepared = prepare(made)
    run = train_prepared(prepared)
    sizes = run_sizes(made, prepared.trained, steps=4, keeps_best=bool(validation))
    count = checkpoints_at_once(made.train, steps=4, keeps_best=bool(validation))
    assert max(*seen, size_of(run.path)) <= sum(sizes)
    weights = (run.adapter / "adapter_model.safetensors").stat().st_size
    assert weights == pytest.approx(sizes[0], rel=0.3)
    assert (newest_resume_point(run) / "optimizer.pt").stat().st_size == pytest.approx(2 * weights, rel=0.3)
    assert count == max(limit, 2 if validation else 1) + 1
    assert max(together) <= count
    assert max(together) == limit + 1


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_a_disk_too_small_is_said_before_the_weights(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = disk.shutil.disk_usage(tmp_path)
    needed = 64 * 2**20 + sum(run_sizes(recipe(), prepare(recipe()).trained, steps=4, keeps_best=False))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    prepare(recipe())
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(TrainingError, match="adapter and checkpoints take") as caught:
        prepare(recipe())
    assert "save_total_limit" in (caught.value.hint or "")
    assert not Run(tmp_path / "run").path.exists()
    (tmp_path / "run").mkdir()
    mark(Run(tmp_path / "run"))
    (tmp_path / "run" / "recipe.yaml").write_text("#" * 1000)  # what is replaced is room
    prepare(recipe(), overwrite=True)


def test_what_stays_is_no_room(recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that goes on has its checkpoints already; a merged model in it takes what it takes."""
    with pytest.raises(fine_tuning.RunInterruptedError):
        train_prepared(prepare(recipe()), callbacks=[SignalAt(1)])
    asked: list[int] = []
    monkeypatch.setattr(storage, "require_space", lambda path, sizes, *more: asked.append(sum(sizes)))
    prepare(recipe(), resume=True)
    (tmp_path / "run" / "merged").mkdir()
    (tmp_path / "run" / "merged" / "model.safetensors").write_bytes(bytes(1 << 20))
    (tmp_path / "run" / "checkpoints" / "more").write_bytes(bytes(1 << 20))
    os.link(tmp_path / "run" / "checkpoints" / "more", tmp_path / "run" / "checkpoints" / "same")
    prepare(recipe(), resume=True)
    assert asked[0] - asked[1] == 1 << 20


@pytest.mark.parametrize("resume", [False, True])
def test_a_place_that_cannot_be_written_to_is_said_before_the_data_is_read(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resume: bool
) -> None:
    monkeypatch.setattr(preparation, "read_corpus", lambda recipe: pytest.fail("read too early"))
    (tmp_path / "file").write_text("x")
    for place, words in (("file", "is a file"), ("file/run", "is a file")):
        with pytest.raises(TrainingError, match=words) as caught:
            prepare(recipe(name=place), resume=resume)
        assert "output_dir" in (caught.value.hint or "")


def test_a_disk_that_is_full_when_the_run_begins(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(fine_tuning, "write_atomically", full)
    with pytest.raises(TrainingError, match="is full: the run cannot begin"):
        train(recipe())
