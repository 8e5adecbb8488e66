"""A run in which nothing was learned, or that got worse, says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft import Run
from mamba_sft.cli.app import app
from mamba_sft.errors import TrainingError
from mamba_sft.planning.extent import ENOUGH
from mamba_sft.training.fine_tuning import RunInterruptedError, train, train_prepared
from mamba_sft.training.preparation import prepare
from tests.training.test_fine_tuning import SignalAt, adapter

UNDERFLOW = "train.learning_rate=1e-60"
"""So small that a step changes nothing in float32."""


@pytest.fixture(autouse=True)
def recipes_take_any_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe refuses such a rate; other causes of a run that learns nothing are harder to make."""
    monkeypatch.setattr("mamba_sft.recipe.fields.NEAREST_TO_0", 0.0)


def command(path: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["train", str(path), *words])


def test_an_adapter_that_is_what_it_was_is_an_error(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing was learned: after 4 steps") as caught:
        train(recipe(UNDERFLOW))
    assert caught.value.exit_code == 1
    assert "raise `train.learning_rate`" in (caught.value.hint or "")
    run = Run(tmp_path / "run")
    assert not run.adapter.exists()
    assert "ended early: nothing was learned" in run.report.read_text()  # and not as if it were finished
    assert run.metrics_file.is_file()
    assert list(run.checkpoints.glob("checkpoint-*/adapter_model.safetensors")), "files to look at"


def test_resumption_does_not_hide_it(recipe: Any) -> None:
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(recipe(UNDERFLOW)), callbacks=[SignalAt(2)])
    with pytest.raises(TrainingError, match="nothing was learned: after 4 steps"):
        train(recipe(UNDERFLOW), resume=True)


def test_what_was_learned_before_an_interruption_counts(recipe: Any) -> None:
    """No step is left to do after it, so nothing changes any more."""
    cut = ("train.lr_scheduler_type=linear", "train.max_steps=3")
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(recipe(*cut)), callbacks=[SignalAt(3)])
    assert train(recipe(*cut), resume=True).adapter.is_dir()


def test_one_step_is_enough_to_learn(recipe: Any, tmp_path: Path) -> None:
    """The default schedule and warm-up, in the shortest run there is."""
    run = train(recipe("train.max_steps=1", "train.warmup_steps=0.03", "train.learning_rate=2e-4"))
    rates = [line["learning_rate"] for line in run.read_metrics() if "loss" in line]
    assert rates == pytest.approx([1e-4])
    assert any(tensor.any() for name, tensor in adapter(run).items() if "lora_B" in name)


def test_the_command_says_error_and_not_trained(recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(UNDERFLOW).to_yaml())
    failed = command(path)
    assert isinstance(failed.exception, TrainingError)
    assert "trained:" not in failed.output
    merged = CliRunner().invoke(app, ["merge", str(tmp_path / "run")])
    assert "no adapter in" in str(merged.exception)


def test_a_loss_that_rose_is_in_the_summary(recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe("train.learning_rate=1", "train.max_grad_norm=100", "train.max_steps=6").to_yaml())
    done = command(path)
    assert done.exit_code == 0, done.output
    assert "well above the" in " ".join(done.output.split())
    assert "train.learning_rate=0.1" in done.output


def test_the_accumulation_that_was_chosen_is_in_the_run(recipe: Any, tmp_path: Path) -> None:
    small = ("train.gradient_accumulation_steps=null", "train.max_steps=-1", "train.num_train_epochs=2",
             "data.packing=false", "train.per_device_train_batch_size=1")  # fmt: skip
    preparation = prepare(recipe(*small))
    assert preparation.max_steps >= ENOUGH
    assert preparation.recipe.train.gradient_accumulation_steps == 5
    assert preparation.course.sizes.max() == 5
    with pytest.raises(RunInterruptedError):
        train_prepared(preparation, callbacks=[SignalAt(2)])
    assert "gradient_accumulation_steps: 5\n" in Run(tmp_path / "run").recipe.read_text()
    assert prepare(recipe(*small), resume=True).recipe.train.gradient_accumulation_steps == 5
