"""The suite `heldout` equals what training logs, and scores what it is given row by row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.errors import MambaSFTError, UsageError
from mamba_sft.evaluation.heldout import ACCURACY, LOSS, NAME, Heldout
from mamba_sft.evaluation.measuring import find_subjects, start
from mamba_sft.evaluation.normalisation import figure
from mamba_sft.evaluation.results import Results
from mamba_sft.evaluation.scores import TaskScores
from mamba_sft.evaluation.settings import Settings
from mamba_sft.evaluation.table import settings_text
from mamba_sft.inference.chat_model import ChatModel, load_chat_model, split_chat_model
from mamba_sft.inference.model_places import find_place
from mamba_sft.run import Run
from mamba_sft.training.fine_tuning import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run whose validation rows fit into one batch."""
    from mamba_sft import Recipe
    from tests.conftest import build_model, build_tokenizer

    place = tmp_path_factory.mktemp("heldout")
    build_model().save_pretrained(place / "base")
    build_tokenizer().save_pretrained(place / "base")
    rows = [
        {"messages": [
            {"role": "user", "content": "hello " * (1 + i % 3) + str(i)},
            {"role": "assistant", "content": f"quick {i} fox" + " jumps" * (i % 4)},
        ]}
        for i in range(40)
    ]  # fmt: skip
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"""
output_dir: {place / "run"}
model: {{base: {place / "base"}, dtype: float32}}
chat: {{system: be brief}}
data: {{sources: [{{path: {place / "chats.jsonl"}, id: chats}}], validation: 8, max_length: 96}}
adapter: {{r: 4}}
train:
  max_steps: 4
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 1
  learning_rate: 0.02
  warmup_steps: 0
eval: {{eval_steps: 4, per_device_eval_batch_size: 64}}
"""
    train(Recipe.from_text(text, "test.yaml"))
    return Run(place / "run")


@pytest.fixture(scope="module")
def chat_model(run: Run) -> ChatModel:
    return load_chat_model(run)


def measured(where: Any, chat_model: ChatModel, **settings: Any) -> TaskScores:
    suite, place = Heldout(), find_place(where)
    chosen = Settings(**settings)
    assert suite.problems(place, chosen) == []
    tasks = suite.prepare(place, chosen)
    told: list[int] = []
    (scores,) = suite.measure(chat_model, tasks, chosen, lambda name, done, total: told.append(done))
    assert told == list(range(1, suite.facts()["rows"] + 1))
    return scores


def test_the_loss_is_the_one_that_training_logged(run: Run, chat_model: ChatModel) -> None:
    logged = [line for line in run.read_metrics() if "eval_loss" in line][-1]
    scores = measured(run, chat_model)
    assert len(scores.documents) == 8
    assert scores.metrics[LOSS].mean == pytest.approx(logged["eval_loss"], rel=1e-4)
    assert scores.metrics[ACCURACY].mean == pytest.approx(logged["eval_mean_token_accuracy"], abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_batch_changes_a_row(run: Run, chat_model: ChatModel, batch_size: int) -> None:
    whole = measured(run, chat_model, batch_size=8)
    some = measured(run, chat_model, batch_size=batch_size)
    assert some.metrics[LOSS].totals == pytest.approx(whole.metrics[LOSS].totals, rel=1e-4)
    assert some.metrics[ACCURACY] == whole.metrics[ACCURACY]
    assert some.documents == whole.documents


def test_base_and_tuned_are_scored_on_the_same_rows(run: Run, chat_model: ChatModel) -> None:
    base, tuned = split_chat_model(chat_model)
    before, after = measured(run, base), measured(run, tuned)
    assert before.documents == after.documents
    assert after.metrics[LOSS].mean < before.metrics[LOSS].mean


def test_the_columns_are_loss_perplexity_and_accuracy(run: Run, chat_model: ChatModel) -> None:
    from math import exp

    scores = measured(run, chat_model)
    figures = {column.title: figure(column, {NAME: scores}) for column in Heldout().columns()}
    assert list(figures) == ["loss", "perplexity", "token accuracy"]
    loss, perplexity, accuracy = (figures[title] for title in figures)
    assert loss is not None
    assert perplexity is not None
    assert accuracy is not None
    assert perplexity.value == pytest.approx(exp(loss.value))
    assert accuracy.value == pytest.approx(100 * scores.metrics[ACCURACY].mean)
    assert loss.n == 8


def test_a_file_of_prompts_with_answers_is_scored(run: Run, chat_model: ChatModel, tmp_path: Path) -> None:
    """The same file is a task for `instructions`: its answers are what is scored, nothing else."""
    names = {"answer.jsonl": "answer", "expected.jsonl": "expected"}
    for name, key in names.items():
        rows = [{"prompt": f"hello {i}", key: f"quick {i} fox", "checks": {"stops": True}} for i in range(5)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = (measured(run, chat_model, rows=str(tmp_path / name)) for name in names)
    assert one.documents == other.documents
    assert len(one.documents) == 5
    assert one.metrics[LOSS].totals == pytest.approx(other.metrics[LOSS].totals)
    answer = len(chat_model.tokenizer.encode("quick 0 fox"))
    assert one.metrics[LOSS].weights[0] == answer + 1  # and the stop token


def test_a_source_of_the_recipe_is_named_by_its_id(run: Run, chat_model: ChatModel) -> None:
    scores = measured(run, chat_model, rows="chats", limit=6)
    assert len(scores.documents) == 6
    assert len(measured(run, chat_model, rows="chats").documents) == 40


def test_a_model_of_no_run_scores_a_file(run: Run, tmp_path: Path) -> None:
    base = find_place(run).section.base
    (tmp_path / "texts.jsonl").write_text('{"text": "the quick brown fox"}\n{"text": "hello world"}\n')
    (tmp_path / "chats.jsonl").write_text('{"prompt": "hello", "answer": "the quick brown fox"}\n')
    model = load_chat_model(base, needs_template=False)
    texts = measured(base, model, rows=str(tmp_path / "texts.jsonl"))
    chats = measured(base, model, rows=str(tmp_path / "chats.jsonl"))
    assert len(texts.documents) == 2
    assert len(chats.documents) == 1


def test_an_adapter_that_was_moved_away_from_its_run(run: Run, chat_model: ChatModel, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run.adapter, tmp_path / "moved")
    rows = tmp_path / "chats.jsonl"
    rows.write_text(
        json.dumps({"messages": [
            {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello 1"},
            {"role": "assistant", "content": "quick 1 fox"},
        ]}) + "\n"
    )  # fmt: skip
    moved = measured(tmp_path / "moved", load_chat_model(tmp_path / "moved"), rows=str(rows))
    assert moved.metrics == measured(run, chat_model, rows=str(rows)).metrics


def test_what_is_missing_is_told_before_weights(run: Run, tmp_path: Path) -> None:
    base = find_place(find_place(run).section.base)
    (problem,) = Heldout().problems(base, Settings())
    assert "belongs to no run" in problem.message
    assert problem.hint == "name rows with `--data FILE`"
    (problem,) = Heldout().problems(find_place(run), Settings(rows="absent.jsonl"))
    assert "no file `absent.jsonl`" in problem.message
    (tmp_path / "x.zip").write_text("")
    (problem,) = Heldout().problems(base, Settings(rows=str(tmp_path / "x.zip")))
    assert "x.zip" in problem.message


def test_without_a_model_a_file_is_still_looked_for() -> None:
    assert Heldout().problems(None, Settings()) == []
    (problem,) = Heldout().problems(None, Settings(rows="absent.jsonl"))
    assert "no file `absent.jsonl`" in problem.message


def test_a_run_without_validation_rows_is_told(run: Run, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run.path, tmp_path / "none")
    recipe = tmp_path / "none" / "recipe.yaml"
    text = re.sub(r"validation: 8\S*", "validation: 0", recipe.read_text())
    recipe.write_text(text.replace("load_best_model_at_end: true", "load_best_model_at_end: false"))
    (problem,) = Heldout().problems(find_place(tmp_path / "none"), Settings())
    assert "`data.validation` is 0" in problem.message


def test_rows_that_cannot_be_read_are_told_when_they_are_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(MambaSFTError, match=r"bad\.jsonl"):
        Heldout().prepare(find_place(run), Settings(rows=str(tmp_path / "bad.jsonl")))


def test_a_model_with_other_tokens_is_refused_before_weights(run: Run, tmp_path: Path) -> None:
    from tests.test_tiny_base import BASE  # which has another vocabulary

    suite = Heldout()
    subjects, _ = find_subjects(run, BASE)
    tasks = suite.prepare(find_place(run), Settings())
    with pytest.raises(UsageError, match=f"`{BASE}` has other tokens"):
        start(suite, tasks, subjects, Settings(), tmp_path, resume=False, overwrite=False)
    subjects, _ = find_subjects(run, "auto")
    start(suite, tasks, subjects, Settings(), tmp_path, resume=False, overwrite=False)


def test_the_length_that_is_told_is_the_one_that_rows_are_cut_at(run: Run) -> None:
    suite = Heldout()
    suite.prepare(find_place(run), Settings())
    settings = Settings().facts() | {"suite": suite.facts()}
    assert "at most 96 tokens" in settings_text(Results("heldout", {}, settings))
