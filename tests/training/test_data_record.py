"""A run knows its data: other rows are refused, named, and gone on with only if that is asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft import Run
from mamba_sft.cli.app import app
from mamba_sft.errors import DataError, RecipeError, TrainingError
from mamba_sft.training.fine_tuning import RunInterruptedError, train, train_prepared
from mamba_sft.training.preparation import prepare
from tests.training.test_fine_tuning import SignalAt


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hello 3", "answer": "quick 3 fox"}\n')
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A second source."""
    path = tmp_path / "other.jsonl"
    path.write_text('{"prompt": "hello", "completion": "world"}\n' * 3)
    return path


@pytest.fixture
def stopped(recipe: Any, chats: Path, other: Path, prompts: Path) -> Any:
    """The recipe of a run of two sources that was stopped after its second step."""
    sources = f"data.sources=[{{path: {chats}}}, {{path: {other}}}]"
    made = recipe(sources, f"eval.prompts={prompts}", "eval.max_new_tokens=2", "train.max_steps=6")
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(made), callbacks=[SignalAt(2)])
    return made


def change_answers(path: Path) -> None:
    path.write_text(path.read_text().replace("quick", "lazy"))


def halve(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[::2]))


def test_the_same_rows_go_on_wherever_the_file_came_from(stopped: Any, chats: Path) -> None:
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    chats.write_text("\n\n".join(json.dumps(row, indent=None, separators=(", ", ":  ")) for row in rows))
    assert prepare(stopped, resume=True).record["changes"] == []


def test_changed_answers_are_refused_and_the_source_named(stopped: Any, chats: Path, other: Path) -> None:
    change_answers(chats)
    with pytest.raises(DataError, match="was started with other data") as caught:
        prepare(stopped, resume=True)
    assert f"`{chats}`: 48 rows as then, but not the same ones" in caught.value.message
    assert str(other) not in caught.value.message
    assert "--allow-changed-data" in (caught.value.hint or "")


def test_deleted_rows_are_refused(stopped: Any, chats: Path) -> None:
    halve(chats)
    with pytest.raises(DataError, match=r"`.*chats.jsonl`: 48 rows then, 24 now"):
        prepare(stopped, resume=True)


def test_rows_in_another_order_are_other_rows(stopped: Any, chats: Path) -> None:
    chats.write_text("".join(reversed(chats.read_text().splitlines(keepends=True))))
    with pytest.raises(DataError, match="not the same ones"):
        prepare(stopped, resume=True)


def test_each_source_and_the_prompts_are_known(stopped: Any, chats: Path, other: Path, prompts: Path) -> None:
    change_answers(chats)
    other.write_text('{"prompt": "hello", "completion": "fox"}\n' * 3)
    prompts.write_text('{"prompt": "hello 4"}\n' * 2)
    with pytest.raises(DataError) as caught:
        prepare(stopped, resume=True)
    assert caught.value.message.count("\n") == 3
    assert f"`{other}`: 3 rows as then, but not the same ones" in caught.value.message
    assert f"`{prompts}` (`eval.prompts`): 1 prompt then, 2 now" in caught.value.message


def test_a_changed_answer_to_a_prompt_is_seen(stopped: Any, prompts: Path) -> None:
    prompts.write_text('{"prompt": "hello 3", "answer": "quick 4 fox"}\n')
    with pytest.raises(DataError, match=r"`eval\.prompts`"):
        prepare(stopped, resume=True)


def test_it_goes_on_if_asked_and_the_run_says_so(
    stopped: Any, chats: Path, caplog: pytest.LogCaptureFixture
) -> None:
    halve(chats)
    with caplog.at_level(logging.WARNING, "mamba_sft"):
        preparation = prepare(stopped, resume=True, allow_changed_data=True)
    assert "going on after step 2 with other data" in caplog.text
    told = [{"after_step": 2, "what": [f"`{chats}`: 48 rows then, 24 now"]}]
    with pytest.raises(RunInterruptedError):
        train_prepared(preparation, callbacks=[SignalAt(4)])
    run = Run(Path(stopped.output_dir))
    assert run.read_data()["changes"] == told
    train(stopped, resume=True)  # what it went on with is what it now knows
    assert run.read_data()["changes"] == told
    assert "48 rows then, 24 now" in run.report.read_text()


def test_a_run_that_kept_no_digests_goes_on(
    stopped: Any, chats: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Run(Path(stopped.output_dir)).data.unlink()
    change_answers(chats)
    with caplog.at_level(logging.WARNING, "mamba_sft"):
        prepare(stopped, resume=True)
    assert "whether it is the same is not known" in caplog.text


def test_what_data_shows_is_kept_in_the_run(recipe: Any, tmp_path: Path) -> None:
    path, held_out = tmp_path / "recipe.yaml", ("data.validation=0.1", "eval.eval_steps=2")
    path.write_text(recipe(*held_out).to_yaml())
    shown = json.loads(CliRunner().invoke(app, ["data", str(path), "--json"]).stdout)
    run = train(recipe(*held_out))
    kept = run.read_data()
    rows, kept_rows = shown.pop("rows"), kept.pop("rows")
    assert kept["packed"]["rows"] == shown["packed"]["rows"] > 0
    assert {name: kept[name] for name in shown} == shown
    assert [row["trained_text"] for row in kept_rows] == [row["trained_text"] for row in rows]
    assert sum(kept["lengths"]["counts"]) == kept["train_rows"] == 43
    assert f"{kept['train_rows']} to train on, 5 to validate on" in run.report.read_text()


def test_allowing_it_needs_a_run_to_resume(recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe().to_yaml())
    refused = CliRunner().invoke(app, ["train", str(path), "--allow-changed-data"])
    assert "goes with `--resume`" in str(refused.exception)


@pytest.mark.parametrize("more", ["train.max_steps=8", "train.num_train_epochs=9"])
def test_more_steps_have_a_way(recipe: Any, more: str) -> None:
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(recipe()), callbacks=[SignalAt(2)])
    with pytest.raises(RecipeError, match="was started with another recipe") as unfinished:
        prepare(recipe(more), resume=True)
    assert (unfinished.value.hint or "").startswith("finish it first, with")
    run = train(recipe(), resume=True)
    with pytest.raises(RecipeError) as finished:
        prepare(recipe(more), resume=True)
    with pytest.raises(TrainingError, match="is finished") as over:
        prepare(recipe(), resume=True)
    for hint in (finished.value.hint or "", over.value.hint or ""):
        assert "finish it first" not in hint
        assert f"model.adapter={run.path}" in hint
        assert f"`mamba-sft merge {run.path}`, then `model.base={run.merged}" in hint
