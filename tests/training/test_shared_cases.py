"""Runs that people really started, and what each is to say; skipped where they are not beside us."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft import Recipe, Run
from mamba_sft.cli.app import app
from mamba_sft.training.fine_tuning import RunInterruptedError, train_prepared
from mamba_sft.training.preparation import prepare
from tests.training.test_fine_tuning import SignalAt, adapter

CASES = Path(__file__).parents[3] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the collected cases are not beside this checkout")


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a verb on a recipe of the cases, in a directory that holds its files."""
    monkeypatch.chdir(tmp_path)

    def call(verb: str, recipe: str, *words: str) -> Any:
        for path in CASES.glob(f"{recipe.partition('-')[0]}-*"):
            shutil.copy(path, tmp_path)
        return CliRunner().invoke(app, [verb, recipe, *words])

    return call


def test_six_chats_teach_something_and_their_run_is_too_short(case: Any) -> None:
    recipe = "01-one-step-at-rate-zero.yaml"
    for verb, words in (("data", ()), ("plan", ()), ("train", ("--dry-run",)), ("train", ())):
        shown = case(verb, recipe, *words)
        assert shown.exit_code == 0, shown.output
        assert "1 step, too few to learn much" in " ".join(shown.output.split()), verb
        assert "train.num_train_epochs=20" in shown.output
    run = Run(Path("runs/case"))
    rates = [line["learning_rate"] for line in run.read_metrics() if "loss" in line]
    assert len(rates) == 1
    assert rates[0] > 0
    assert all(tensor.any() for name, tensor in adapter(run).items() if "lora_B" in name)


def test_a_run_does_not_go_on_with_other_rows(recipe: Any, chats: Path, tmp_path: Path) -> None:
    assert (CASES / "18-resume-after-data-changed.txt").is_file()
    path, rows = tmp_path / "recipe.yaml", chats.read_text()
    path.write_text(recipe("train.max_steps=12").to_yaml())
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(Recipe.load(path)), callbacks=[SignalAt(9)])
    for changed in (rows.replace("quick", "slow"), "".join(rows.splitlines(keepends=True)[::2])):
        chats.write_text(changed)
        refused = CliRunner().invoke(app, ["train", str(path), "--resume"])
        assert refused.exit_code != 0
        assert f"`{chats}`" in refused.exception.message  # type: ignore[union-attr]
    went_on = CliRunner().invoke(app, ["train", str(path), "--resume", "--allow-changed-data"])
    assert went_on.exit_code == 0, went_on.output
    assert "48 rows then, 24 now" in Run(tmp_path / "run").report.read_text()
