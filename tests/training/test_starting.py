"""A run that starts from the adapter of another goes on where that one ended, if it can."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from mamba_sft import Run, merge
from mamba_sft.cli.app import app
from mamba_sft.errors import AdapterError, RecipeError, TrainingError
from mamba_sft.inference.chat_model import load_chat_model
from mamba_sft.planning.plan import make_plan
from mamba_sft.training.fine_tuning import RunInterruptedError, train, train_prepared
from mamba_sft.training.preparation import prepare
from tests.conftest import build_model
from tests.training.test_fine_tuning import SignalAt, adapter, losses
from tests.training.test_learning import UNDERFLOW, recipes_take_any_rate  # noqa: F401


@pytest.fixture
def first(recipe: Any) -> Run:
    """A finished run, in which all that is trained has moved."""
    return train(recipe(name="first"))


class Start(TrainerCallback):
    """Keeps what is trained as it is before the first step."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.tensors = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def saved_as(name: str) -> str:
    """The name that PEFT saves a parameter under."""
    return name.replace(".default", "").replace("base_model.model.base_model.model", "base_model.model")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_it_starts_from_the_saved_values_to_the_last_bit(recipe: Any, first: Run, quantization: str) -> None:
    start = Start()
    preparation = prepare(recipe(f"model.adapter={first.path}", f"model.quantization={quantization}"))
    train_prepared(preparation, callbacks=[start])
    saved = adapter(first)
    matched = {saved_as(name): tensor for name, tensor in start.tensors.items()}
    assert len(saved) == len(matched)
    for name, tensor in saved.items():
        assert torch.equal(matched[name], tensor), name


@pytest.mark.parametrize("where", ["run", "adapter"])
def test_it_goes_on_where_the_other_ended(recipe: Any, first: Run, where: str) -> None:
    path = first.path if where == "run" else first.adapter
    second = train(recipe(f"model.adapter={path}", name="second"))
    assert losses(second)[0] < 0.9 * losses(first)[0]
    assert losses(second)[-1] < losses(first)[-1]
    assert Run.open(second).read_data()["start"] == str(path)


def test_merge_chat_and_plan_of_such_a_run(recipe: Any, first: Run, tmp_path: Path) -> None:
    settings = recipe(f"model.adapter={first.path}", name="second")
    second = train(settings)
    assert merge(second).check.same_next_token
    assert load_chat_model(second).model.peft_config
    assert make_plan(settings).work == make_plan(recipe()).work
    third = train(recipe(f"model.base={second.merged}", name="third"))
    assert losses(third)[0] < losses(second)[0]


def test_it_resumes_like_any_other(recipe: Any, first: Run) -> None:
    more = ("train.save_total_limit=5", f"model.adapter={first.path}")
    whole = train(recipe(*more, name="whole"))
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(recipe(*more, name="halves")), callbacks=[SignalAt(2)])
    halves = train(recipe(*more, name="halves"), resume=True)
    assert losses(halves) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.usefixtures("recipes_take_any_rate")
def test_a_start_that_nothing_moved_is_nothing_learned(recipe: Any, first: Run) -> None:
    with pytest.raises(TrainingError, match="nothing was learned"):
        train(recipe(f"model.adapter={first.path}", UNDERFLOW, name="second"))


def test_answers_before_are_not_the_base_model_s(recipe: Any, first: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello 3"}\n')
    path = tmp_path / "second.yaml"
    more = (f"model.adapter={first.path}", f"eval.prompts={prompts}", "eval.max_new_tokens=2")
    path.write_text(recipe(*more, name="second").to_yaml())
    shown = CliRunner().invoke(app, ["train", str(path)])
    assert shown.exit_code == 0, shown.output
    title = next(line for line in shown.output.splitlines() if "prompt" in line and "┃" in line)
    assert "before" in title
    assert "base" not in title


def refused(recipe: Any, *overrides: str) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        prepare(recipe(*overrides, name="second"))
    return caught.value


def test_another_shape_is_refused_with_the_fields_to_take(recipe: Any, first: Run) -> None:
    error = refused(
        recipe, f"model.adapter={first.path}", "adapter.r=8", "adapter.use_dora=true",
        "adapter.target_modules=[in_proj]",
    )  # fmt: skip
    assert "`adapter.r` is 8, and 4 there" in error.message
    assert error.hint is not None
    fields = shlex.split(error.hint.partition(": ")[2])  # as a shell takes them
    assert "adapter.target_modules='[" in error.hint  # brackets are a pattern of file names to some shells
    assert fields == [
        "adapter.r=4",
        "adapter.use_dora=false",
        "adapter.target_modules=[in_proj,out_proj,x_proj]",
    ]
    assert prepare(recipe(f"model.adapter={first.path}", *fields, name="second")).start == first.adapter


def test_dropout_and_training_may_differ(recipe: Any, first: Run) -> None:
    free = ("adapter.lora_dropout=0.1", "train.learning_rate=1e-3", "data.packing=false")
    run = train(recipe(f"model.adapter={first.path}", *free, name="second"))
    assert json.loads((run.adapter / "adapter_config.json").read_text())["lora_dropout"] == 0.1


def test_another_base_is_refused(recipe: Any, first: Run, tiny_base: Path, tmp_path: Path) -> None:
    build_model(initializer_range=0.5).save_pretrained(tmp_path / "other")
    shutil.copy(tiny_base / "tokenizer.json", tmp_path / "other")
    shutil.copy(tiny_base / "tokenizer_config.json", tmp_path / "other")
    error = refused(recipe, f"model.adapter={first.path}", f"model.base={tmp_path / 'other'}")
    assert "is not the base that" in error.message
    assert f"`model.base={tiny_base}`" in (error.hint or "")


def test_another_vocabulary_is_refused(recipe: Any, first: Run) -> None:
    error = refused(recipe, f"model.adapter={first.path}", "chat.special_tokens=add")
    assert "trained the vocabulary's rows" in error.message


def test_what_is_not_there_or_not_whole_is_named(recipe: Any, first: Run, tmp_path: Path) -> None:
    assert "neither a run nor an adapter" in refused(recipe, "model.adapter=runs/nope").message
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(recipe(name="stopped")), callbacks=[SignalAt(2)])
    unfinished = refused(recipe, f"model.adapter={tmp_path / 'stopped'}")
    assert "has no adapter yet" in unfinished.message
    assert "--resume" in (unfinished.hint or "")
    checkpoint = refused(recipe, f"model.adapter={tmp_path / 'stopped' / 'checkpoints' / 'checkpoint-2'}")
    assert "base.json" in checkpoint.message
    weights = first.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    assert "its checksum is another" in refused(recipe, f"model.adapter={first.path}").message


def test_an_adapter_of_another_kind_is_refused(recipe: Any, first: Run) -> None:
    path = first.adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, told in (
        ({"peft_type": "IA3"}, "is IA3, not LORA"),
        ({"rank_pattern": {"in_proj": 8}}, "uses `rank_pattern`"),
        ({"bias": "all"}, "uses `bias`"),
    ):
        path.write_text(json.dumps(config | change))
        assert told in refused(recipe, f"model.adapter={first.path}").message


def test_a_run_does_not_write_over_its_own_start(recipe: Any, first: Run) -> None:
    before = adapter(first)
    with pytest.raises(RecipeError, match="which this run would write anew"):
        train(recipe(f"model.adapter={first.path}", name="first"), overwrite=True)
    assert adapter(first).keys() == before.keys()
