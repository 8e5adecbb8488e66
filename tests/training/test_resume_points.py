"""Resume points: whole or not there, damage is found whichever file it hits, and the one before is used."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from mamba_sft import Recipe, Run
from mamba_sft.cli.app import app
from mamba_sft.errors import TrainingError, UsageError
from mamba_sft.training import fine_tuning, resume_points, sample_answers
from mamba_sft.training.fine_tuning import RunInterruptedError, train, train_prepared
from mamba_sft.training.preparation import prepare
from mamba_sft.training.resume_points import COUNTS, MANIFEST, fault_of, find_good, rotate, write_whole
from tests.training.test_fine_tuning import SignalAt, adapter

DROPOUT = "adapter.lora_dropout=0.2"


@pytest.fixture
def stopped(recipe: Any, tmp_path: Path) -> Run:
    """A run with resume points after its second and third step, of four."""
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(recipe()), callbacks=[SignalAt(3)])
    return Run(tmp_path / "run")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def test_damage_to_any_file_is_found_and_the_one_before_is_used(
    stopped: Run, recipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    newest, before = (stopped.checkpoints / f"checkpoint-{step}" for step in (3, 2))
    assert find_good(stopped) == (newest, [])
    names = sorted(path.name for path in newest.iterdir())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", COUNTS, MANIFEST,
            "adapter_model.safetensors"} <= set(names)  # fmt: skip
    ways: list[Callable[[Path], None]] = [truncate, flip, Path.unlink]
    for name in names:
        whole = (newest / name).read_bytes()
        for damage in ways:
            damage(newest / name)
            found, faults = find_good(stopped)
            assert found == before, (name, damage)
            assert len(faults) == 1
            assert f"`{name}`" in faults[0], (name, damage, faults)
            (newest / name).write_bytes(whole)
    assert fault_of(newest) is None
    flip(newest / "optimizer.pt")
    with caplog.at_level(logging.WARNING, "mamba_sft"):
        assert prepare(recipe(), resume=True).resume_point == before
    said = [line for line in caplog.messages if "optimizer.pt" in line]
    assert len(said) == 1
    assert "\n" not in said[0]


def test_every_bit_of_a_manifest_counts(stopped: Run) -> None:
    newest = stopped.checkpoints / "checkpoint-3"
    whole = (newest / MANIFEST).read_bytes()
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 1 << (place % 8)
        (newest / MANIFEST).write_bytes(bytes(data))
        assert fault_of(newest) is not None, place


def test_none_that_is_good_is_one_message(stopped: Run, recipe: Any) -> None:
    for point in resume_points.saved_points(stopped):
        truncate(point / "adapter_model.safetensors")
    with pytest.raises(TrainingError, match="no checkpoint that is what was written") as caught:
        prepare(recipe(), resume=True)
    assert caught.value.message.count("`adapter_model.safetensors` has") == 2
    assert "--overwrite" in (caught.value.hint or "")


def test_those_of_earlier_versions_go_on_and_it_is_said(
    stopped: Run, recipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    newest = stopped.checkpoints / "checkpoint-3"
    for name in (MANIFEST, COUNTS):
        (newest / name).unlink()
    with caplog.at_level(logging.WARNING, "mamba_sft"):
        run = train(recipe(), resume=True)
    assert "saved by an earlier version" in caplog.text
    assert [line["step"] for line in run.read_metrics() if "loss" in line] == [1, 2, 3, 4]
    assert json.loads(run.environment.read_text())["tokens"] > 0


class Bomb:
    """What runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("bombed",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_is_unpickled(
    stopped: Run, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    newest = stopped.checkpoints / "checkpoint-3"
    torch.save({"state": Bomb()}, newest / name)
    (newest / MANIFEST).unlink()
    resume_points._seal(newest)
    with pytest.raises(TrainingError, match=f"`{newest}` cannot be loaded"):
        train(recipe(), resume=True)
    assert not (tmp_path / "bombed").exists()


def write_half(partial: Path) -> None:
    (partial / "a").write_text("two")
    raise OSError(errno.ENOSPC, "full")


def write_one(partial: Path) -> None:
    (partial / "a").write_text("one")


def meet(refusal: OSError | None) -> None:
    if refusal is not None:
        raise refusal


def test_a_failure_in_the_middle_of_writing_leaves_what_was_there(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-1"
    write_whole(final, write_one, by_us=True, meet=meet)
    with pytest.raises(OSError, match="full"):
        write_whole(final, write_half, by_us=True, meet=meet)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (final / "a").read_text() == "one"


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3, 4, 10, 20):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    rotate(run, newest=run.checkpoints / "checkpoint-10", best=run.checkpoints / "checkpoint-1", limit=3)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "checkpoint-1", "checkpoint-10", "checkpoint-4",
    ]  # fmt: skip


class DieAt(TrainerCallback):
    """Fails like a machine that goes away, at a step's begin."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            raise OSError("gone")


def lines(run: Run) -> list[dict[str, Any]]:
    """The logged lines without what is measured by the clock."""
    timed = ("runtime", "second", "memory")
    return [
        {name: value for name, value in line.items() if not any(part in name for part in timed)}
        for line in run.read_metrics()
    ]


def assert_same(left: Run, right: Run) -> None:
    """Metrics and adapter, to the last bit."""
    assert lines(left) == lines(right)
    ours, theirs = adapter(left), adapter(right)
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    facts = [json.loads(run.environment.read_text()) for run in (left, right)]
    assert facts[0]["tokens"] == facts[1]["tokens"]


def test_what_it_came_to_is_counted_over_all_sessions(recipe: Any) -> None:
    """Saved between two logged steps, so that losses, tokens and averages are taken up half-way."""
    options = (DROPOUT, "train.max_steps=8", "train.save_steps=2", "train.logging_steps=3")
    whole = train(recipe(*options, name="whole"))
    for step in (4, 7):
        with pytest.raises(OSError, match="gone"):
            train_prepared(prepare(recipe(*options), resume=step > 4), callbacks=[DieAt(step)])
    run = train(recipe(*options), resume=True)
    assert_same(whole, run)
    sessions = json.loads(run.environment.read_text())["sessions"]
    assert [(s["first_step"], s["last_step"]) for s in sessions] == [(0, 2), (2, 6), (6, 8)]
    assert sum(s["tokens"] for s in sessions) == json.loads(run.environment.read_text())["tokens"]
    total = sum(s["train_seconds"] for s in sessions)
    assert run.read_metrics()[-1]["train_runtime"] == pytest.approx(total, abs=0.01)


def test_a_run_that_died_after_its_last_step_takes_no_step_more(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello 3\n")
    options = ("train.max_steps=6", "train.lr_scheduler_type=constant", "eval.max_new_tokens=4",
               "data.validation=6", "eval.eval_steps=2", f"eval.prompts={prompts}")  # fmt: skip
    whole = train(recipe(*options, name="whole"))
    answer = sample_answers._answer
    asked: list[str] = []

    def failing(preparation: Any, trainer: Any, when: str) -> list[str]:
        asked.append(when)
        if asked.count("after") == 1:
            raise OSError("gone")
        return answer(preparation, trainer, when)

    monkeypatch.setattr(sample_answers, "_answer", failing)
    with pytest.raises(OSError, match="gone"):
        train(recipe(*options))
    saved = sorted(path.name for path in Run(tmp_path / "run").checkpoints.iterdir())
    asked.clear()
    asked.append("after")
    with caplog.at_level(logging.INFO, "mamba_sft"):
        run = train_prepared(prepare(recipe(*options), resume=True), callbacks=[DieAt(7)])
    assert asked == ["after", "after"], "the answers before training were kept"
    assert "going on from step 6 of 6: training is done" in caplog.text
    assert saved == sorted(path.name for path in run.checkpoints.iterdir())
    assert_same(whole, run)
    assert run.samples_file.read_text() == whole.samples_file.read_text()
    assert not run.answers_before.exists()


def test_a_run_that_died_between_its_last_files_is_not_finished(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("hello 3\n")
    options = ("eval.max_new_tokens=4", f"eval.prompts={tmp_path / 'prompts.txt'}")
    whole, run = train(recipe(*options, name="whole")), Run(tmp_path / "run")

    def gone(*args: Any) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning, "write_samples", gone)
        with pytest.raises(OSError, match="gone"):
            train(recipe(*options))
    assert run.adapter.is_dir()
    assert_same(whole, train(recipe(*options), resume=True))
    assert run.samples_file.read_text() == whole.samples_file.read_text()
    assert run.report.is_file()


def test_early_stopping_is_taken_up(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its patience is counted over the sessions, and once it has ended a run, no step is taken."""
    options = ("data.validation=0.3", "train.max_steps=40", "train.learning_rate=0.3", "eval.eval_steps=1",
               "eval.early_stopping_patience=3", "train.save_steps=1",
               "train.save_total_limit=40")  # fmt: skip
    whole = train(recipe(*options, name="whole"))
    end = json.loads(whole.environment.read_text())["steps"]
    assert end < 40
    with pytest.raises(OSError, match="gone"):
        train_prepared(prepare(recipe(*options)), callbacks=[DieAt(end)])  # one evaluation is left
    run = train(recipe(*options), resume=True)
    assert_same(whole, run)
    shutil.rmtree(run.adapter)
    again = train_prepared(prepare(recipe(*options), resume=True), callbacks=[DieAt(end + 1)])
    assert_same(whole, again)


def test_a_start_that_was_killed_begins_again(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("hello 3\n")
    options = (DROPOUT, "eval.max_new_tokens=4", f"eval.prompts={tmp_path / 'prompts.txt'}")
    whole = train(recipe(*options, name="whole"))
    with pytest.raises(OSError, match="gone"):
        train_prepared(prepare(recipe(*options)), callbacks=[DieAt(2)])
    run = Run(tmp_path / "run")
    kept = json.loads(run.answers_before.read_text())
    run.answers_before.write_text(json.dumps(kept | {"answers": ["kept"]}))
    assert_same(whole, train(recipe(*options), resume=True))
    assert json.loads(run.samples_file.read_text())["before"] == "kept"


def test_kept_answers_that_are_damaged_are_asked_again(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("hello 3\n")
    options = ("eval.max_new_tokens=4", f"eval.prompts={tmp_path / 'prompts.txt'}")
    whole = train(recipe(*options, name="whole"))
    with pytest.raises(OSError, match="gone"):
        train_prepared(prepare(recipe(*options)), callbacks=[DieAt(3)])
    truncate(Run(tmp_path / "run").answers_before)
    run = train(recipe(*options), resume=True)
    assert run.samples_file.read_text() == whole.samples_file.read_text()


def test_a_run_that_was_moved_goes_on(
    recipe: Any, tiny_base: Path, chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Directory, base, rows and prompts, all of them elsewhere; the best resume point is found there too."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello 3\n")
    options = ("data.validation=6", "eval.eval_steps=1", "train.save_steps=1", "train.learning_rate=0.3",
               "train.max_steps=6", "eval.max_new_tokens=4")  # fmt: skip
    at_first = (*options, f"eval.prompts={prompts}")
    whole = train(recipe(*at_first, name="whole"))
    with pytest.raises(OSError, match="gone"):
        train_prepared(prepare(recipe(*at_first)), callbacks=[DieAt(6)])
    there = tmp_path / "mounted" / "elsewhere"
    there.mkdir(parents=True)
    for path in (tmp_path / "run", tiny_base, chats, prompts):
        shutil.move(path, there / path.name)
    moved = [
        f"model.base={there / tiny_base.name}", f"data.sources.0.path={there / chats.name}",
        f"eval.prompts={there / prompts.name}",
    ]  # fmt: skip
    with caplog.at_level(logging.INFO, "mamba_sft"):
        done = CliRunner().invoke(app, ["train", str(there / "run" / "recipe.yaml"), *moved, "--resume"])
    assert done.exit_code == 0, done.output
    run = Run(there / "run")
    assert Recipe.load(run.recipe).output_dir == str(run.path)
    assert_same(whole, run)
    best = json.loads(run.environment.read_text())["best_validation_loss"]
    assert best < [line["eval_loss"] for line in run.read_metrics() if "eval_loss" in line][-1]
    shutil.rmtree(run.adapter)
    again = Run(Path(shutil.move(run.path, tmp_path / "once-more")))
    done = CliRunner().invoke(app, ["train", str(again.recipe), "--resume"])
    assert done.exit_code == 0, done.output
    assert_same(whole, again)


def test_another_base_in_the_same_place_is_refused(recipe: Any, stopped: Run, tiny_base: Path) -> None:
    weights = load_file(tiny_base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tiny_base / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(TrainingError, match="was started on another base"):
        train(recipe(), resume=True)


class Slow(TrainerCallback):
    """Sends SIGTERM in a step, after whose first micro-batch the time for it is over."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = state.global_step == self.step - 1

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.now:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("how", [(), ("train.stream_tokens=16", "train.carry_state=true")])
def test_a_step_that_takes_too_long_is_given_up(recipe: Any, tmp_path: Path, how: tuple[str, ...]) -> None:
    options = (DROPOUT, "train.logging_steps=3", *how)
    whole = train(recipe(*options, name="whole"))
    with pytest.raises(RunInterruptedError, match=r"stopped at step 1 of 4; saved .*checkpoint-1`"):
        train_prepared(prepare(recipe(*options, "train.grace_seconds=0")), callbacks=[Slow(2)])
    assert_same(whole, train(recipe(*options), resume=True))


@pytest.mark.parametrize("best", [False, True])
def test_a_stopped_run_can_be_finished_where_it_is(
    recipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, best: bool
) -> None:
    """No step more: the adapter is that of the newest checkpoint, or of the best one where that is kept."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello 3\n")
    options = ("train.max_steps=8", "eval.max_new_tokens=4", f"eval.prompts={prompts}", "data.validation=6",
               "eval.eval_steps=2", "train.save_steps=2",
               *(["eval.load_best_model_at_end=true"] if best else []))  # fmt: skip
    with pytest.raises(OSError, match="gone"):
        train_prepared(prepare(recipe(*options)), callbacks=[DieAt(1)])
    with pytest.raises(TrainingError, match="no checkpoint yet that it could be finished from"):
        train(recipe(*options), resume=True, finish=True)
    with pytest.raises(RunInterruptedError) as stopped:
        train_prepared(prepare(recipe(*options), resume=True), callbacks=[SignalAt(4)])
    assert stopped.value.hint is not None
    assert stopped.value.hint.endswith("--resume --finish`")
    run = Run(tmp_path / "run")
    newest = run.checkpoints / "checkpoint-4"
    chosen = json.loads((newest / "trainer_state.json").read_text())["best_global_step"] if best else 4
    wanted = load_file(run.checkpoints / f"checkpoint-{chosen}" / "adapter_model.safetensors")
    with caplog.at_level(logging.INFO, "mamba_sft"):
        assert train(recipe(*options), resume=True, finish=True).path == run.path
    assert "finishing the run at step 4 of 8" in caplog.text
    found = adapter(run)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert json.loads(run.environment.read_text())["steps"] == 4
    assert "| steps | 4 of 8 |" in run.path.joinpath("report.md").read_text()
    assert len(run.samples()) == 1
    with pytest.raises(TrainingError, match="is finished"):
        train(recipe(*options), resume=True)


def test_only_a_stopped_run_is_finished(recipe: Any) -> None:
    with pytest.raises(UsageError, match="`--finish` goes with `--resume`"):
        train(recipe(), finish=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_while_answering_stops_at_once(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    (tmp_path / "prompts.txt").write_text("hello 3\n")
    options = ("eval.max_new_tokens=4", f"eval.prompts={tmp_path / 'prompts.txt'}")
    whole, answer = train(recipe(*options, name="whole")), sample_answers._answer

    def stopped(preparation: Any, trainer: Any, now: str) -> list[str]:
        if now == when:
            signal.raise_signal(signal.SIGTERM)
        return answer(preparation, trainer, now)

    with monkeypatch.context() as patch:
        patch.setattr(sample_answers, "_answer", stopped)
        with pytest.raises(RunInterruptedError, match=f"stopped {when} training") as caught:
            train(recipe(*options))
    assert (caught.value.exit_code, caught.value.heading) == (130, "stopped")
    assert "--resume" in (caught.value.hint or "")
    assert_same(whole, train(recipe(*options), resume=True))


def test_a_second_signal_stops_at_once(recipe: Any, tmp_path: Path) -> None:
    whole = train(recipe(name="whole"))
    with pytest.raises(RunInterruptedError, match=r"stopped at step 2 of 4; saved .*checkpoint-2`"):
        train_prepared(prepare(recipe()), callbacks=[SignalAt(3), SignalAt(3)])
    assert_same(whole, train(recipe(), resume=True))


class AtEvaluation(TrainerCallback):
    """Sends SIGTERM in the evaluation after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (2, ("eval.eval_steps=2",)),
        (4, ("eval.eval_steps=2",)),
        (1, ("eval.eval_steps=1", "train.save_steps=3", "eval.load_best_model_at_end=false")),
    ],
)
def test_an_evaluation_that_takes_too_long_is_made_up_for(
    recipe: Any, step: int, more: tuple[str, ...]
) -> None:
    options = (DROPOUT, "data.validation=6", *more)
    whole = train(recipe(*options, name="whole"))
    late = recipe(*options, "train.grace_seconds=0")
    with pytest.raises(RunInterruptedError, match=f"stopped at step {step} of 4"):
        train_prepared(prepare(late), callbacks=[AtEvaluation(step)])
    assert_same(whole, train(recipe(*options), resume=True))
