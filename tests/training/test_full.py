"""Runs without an adapter: every weight is trained, exactly, and what is left is a whole model."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from mamba_sft import Run
from mamba_sft.errors import AdapterError, RecipeError, TrainingError
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model.checksums import file_checksum
from mamba_sft.model.shape import find_shape
from mamba_sft.planning.gpus import Accelerator
from mamba_sft.planning.memory import Work, planned_parts
from mamba_sft.planning.storage import checkpoint_sizes, result_bytes
from mamba_sft.run_contents import strangers
from mamba_sft.training import fine_tuning
from mamba_sft.training.fine_tuning import RunInterruptedError, train, train_prepared
from mamba_sft.training.preparation import prepare
from mamba_sft.training.resume_points import fault_of
from tests.training.test_fine_tuning import SignalAt, losses

FULL = ("adapter=none", "train.learning_rate=1.0e-3")


@pytest.fixture
def full(recipe: Any) -> Callable[..., Any]:
    """Makes a recipe of four short steps of all weights."""
    return lambda *words, name="run": recipe(*FULL, *words, name=name)


def model_of(run: Run) -> dict[str, torch.Tensor]:
    """The final model's tensors."""
    return load_file(run.model / "model.safetensors")


class Look(TrainerCallback):
    """Keeps what a callback is handed at the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = kwargs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_leaves_a_model_that_plain_transformers_loads(full: Any, tiny_base: Path, dtype: str) -> None:
    run = train(full(f"model.dtype={dtype}"))
    assert run.result == run.model
    assert not run.adapter.exists()
    assert strangers(run) == []
    assert losses(run)[-1] < losses(run)[0]
    model, base = (AutoModelForCausalLM.from_pretrained(place) for place in (run.model, tiny_base))
    assert model.dtype == getattr(torch, dtype)
    assert AutoTokenizer.from_pretrained(run.model).chat_template
    before = base.state_dict()
    same = [name for name, tensor in model.state_dict().items() if torch.equal(tensor.float(), before[name])]
    assert same == []
    ids = torch.randint(0, 512, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    difference = install(model, "reference")(ids).logits - expected
    assert difference.norm() < (1e-5 if dtype == "float32" else 2e-2) * expected.norm()
    facts = json.loads((run.model / "training.json").read_text())
    assert facts["base"] == str(tiny_base)
    assert "all weights, without an adapter" in run.report.read_text()
    assert "mamba-sft merge" not in run.report.read_text()


@pytest.mark.parametrize("more", [(), ("model.dtype=bfloat16",), ("train.optim=adamw_torch_fused",
                                  "train.stream_tokens=32", "train.carry_state=true")])  # fmt: skip
def test_2n_steps_equal_n_and_resume_n_bit_for_bit(full: Any, more: tuple[str, ...]) -> None:
    whole = train(full(*more, "train.weight_decay=0.1", name="whole"))
    halves = full(*more, "train.weight_decay=0.1", name="halves")
    with pytest.raises(RunInterruptedError, match="stopped at step 3 of 4"):
        train_prepared(prepare(halves), callbacks=[SignalAt(3)])
    point = Run(Path(halves.output_dir)).checkpoints / "checkpoint-3"
    assert fault_of(point) is None
    assert {tensor.dtype for tensor in load_file(point / "model.safetensors").values()} == {torch.float32}
    run = train(halves, resume=True)
    assert losses(run) == losses(whole)
    name = "model/model.safetensors"
    assert file_checksum(run.path / name) == file_checksum(whole.path / name)


def test_damage_to_a_weight_is_found_and_the_one_before_is_used(full: Any) -> None:
    made = full()
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(made), callbacks=[SignalAt(3)])
    newest = Run(Path(made.output_dir)).checkpoints / "checkpoint-3" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(bytes(data))
    point = prepare(made, resume=True).resume_point
    assert point is not None
    assert point.name == "checkpoint-2"


def test_decay_reaches_matrices_alone(full: Any) -> None:
    look = Look()
    train_prepared(prepare(full("train.weight_decay=0.1", "train.max_steps=1")), callbacks=[look])
    names = {id(parameter): name for name, parameter in look.seen["model"].named_parameters()}
    groups = {group["weight_decay"]: group["params"] for group in look.seen["optimizer"].param_groups}
    decayed, rest = ({names[id(parameter)] for parameter in groups[decay]} for decay in (0.1, 0.0))
    assert decayed | rest == set(names.values())
    mixer = "backbone.layers.0.mixer."
    assert {f"{mixer}in_proj.weight", f"{mixer}conv1d.weight", "lm_head.weight",
            "backbone.embeddings.weight"} <= decayed  # fmt: skip
    assert {name.removeprefix(mixer) for name in rest if name.startswith(mixer)} == {
        "A_log", "D", "conv1d.bias", "dt_proj.bias",
    }  # fmt: skip
    assert {"backbone.norm_f.weight", "backbone.layers.0.norm.weight"} <= rest


@pytest.mark.parametrize(
    "way",
    [
        ("train.checkpointing=none",),
        ("train.stream_tokens=16",),
        ("train.auto_batch=true",),
        ("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1"),
        ("model.kernels=reference", "train.max_steps=2"),
    ],
    ids=str,
)
def test_memory_and_kernels_change_no_weight(full: Any, way: tuple[str, ...]) -> None:
    steps = [word for word in way if "max_steps" in word]
    plain, other = train(full(*steps, name="plain")), train(full(*way, name="other"))
    theirs = model_of(other)
    for name, tensor in model_of(plain).items():
        difference = (theirs[name] - tensor).abs().max()
        assert difference < 2e-4, name  # Adam turns rounding of a gradient near 0 into part of a step


def test_the_best_model_is_kept(full: Any) -> None:
    words = ("train.learning_rate=0.3", "data.validation=8", "eval.eval_steps=1", "train.save_steps=1")
    run = train(full(*words))
    evaluated = [line["eval_loss"] for line in run.read_metrics() if "eval_loss" in line]
    best = 1 + evaluated.index(min(evaluated))
    assert best < 4, "the rate is so high that the first steps are the best"
    kept = load_file(run.checkpoints / f"checkpoint-{best}" / "model.safetensors")
    for name, tensor in model_of(run).items():
        assert torch.equal(kept[name], tensor), name


def test_a_run_that_learned_nothing_fails(full: Any) -> None:
    words = ("train.learning_rate=1.0e-12", "train.lr_scheduler_type=constant")
    run = full(*words)
    with pytest.raises(TrainingError, match="the model is what it was at the start, to the last bit"):
        train_prepared(prepare(run), callbacks=[NoStep()])
    assert Run(Path(run.output_dir)).result is None


class NoStep(TrainerCallback):
    """Takes the gradients away after they were looked at, as a broken optimizer would."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in kwargs["model"].parameters():
            parameter.grad = None


class Kill(TrainerCallback):
    """Keeps gradients from one weight."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].backbone.layers[1].mixer.D.register_hook(torch.zeros_like)


def test_a_weight_that_cannot_learn_ends_the_run(full: Any) -> None:
    with pytest.raises(AdapterError, match="no gradient reaches 1 tensor of the model") as caught:
        train_prepared(prepare(full()), callbacks=[Kill()])
    assert "backbone.layers.1.mixer.D" in caught.value.message


class Poison(TrainerCallback):
    """Makes a weight infinite."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kwargs["model"].backbone.layers[0].mixer.D.data[0] = float("inf")


def test_a_number_that_is_none_stops_the_run(full: Any) -> None:
    made = full()
    with pytest.raises(TrainingError, match="is not a number at step 3") as caught:
        train_prepared(prepare(made), callbacks=[Poison()])
    assert "checkpoint-2" in caught.value.message


def test_a_finished_run_says_how_to_train_on(full: Any) -> None:
    made = full("train.max_steps=1", "train.save_steps=1")
    run = train(made)
    with pytest.raises(TrainingError, match="is finished") as caught:
        prepare(made, resume=True)
    assert f"model.base={run.model}" in (caught.value.hint or "")
    assert "merge" not in (caught.value.hint or "")
    again = train(full("train.max_steps=1", "train.save_steps=1", f"model.base={run.model}", name="more"))
    assert again.model.is_dir()


def test_float16_is_refused_where_it_would_come_of_another_word(
    full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mamba_sft.training.arguments.resolve_dtype", lambda section: torch.float16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    from mamba_sft.training.arguments import trainer_arguments

    with pytest.raises(RecipeError, match="`adapter: none` cannot train here"):
        trainer_arguments(full("model.dtype=auto"), Run(Path("x")), steps=1, has_validation=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_stays_in_memory_is_what_is_planned(full: Any, dtype: str) -> None:
    """16 bytes a weight: the weight, its gradient and the two moments of Adam, all in float32."""
    look, made = Look(), full(f"model.dtype={dtype}", "train.max_steps=1")
    train_prepared(prepare(made), callbacks=[look])
    parameters = list(look.seen["model"].parameters())
    states = [
        tensor
        for state in look.seen["optimizer"].state_dict()["state"].values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    ]
    shape, _ = find_shape(made.model)
    work = Work.of(made, shape, Accelerator("", 0, 0, type="cpu"), length=96, trained_rows=2)
    parts = planned_parts(work)
    assert parts["weights"] == sum(parameter.nbytes for parameter in parameters)
    assert parts["optimizer"] == sum(state.nbytes for state in states)
    assert parts["gradients"] == parts["weights"]
    assert parts["adapter"] == 0
    assert sum(parts[name] for name in ("weights", "gradients", "optimizer")) == 16 * shape.parameters  # type: ignore[index]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_was_planned_for(full: Any, dtype: str) -> None:
    made = full(f"model.dtype={dtype}")
    trained = prepare(made).trained
    run = train(made)
    point = run.checkpoints / "checkpoint-4"
    weights, optimizer = checkpoint_sizes(trained, made.train.optim)
    assert (point / "model.safetensors").stat().st_size == pytest.approx(weights, rel=0.02)
    assert (point / "optimizer.pt").stat().st_size == pytest.approx(optimizer, rel=0.1)
    size = (run.model / "model.safetensors").stat().st_size
    assert size == pytest.approx(result_bytes(made, trained), rel=0.02)


def test_8_bit_optimizer_states_train_all_weights(full: Any) -> None:
    pytest.importorskip("bitsandbytes")
    run = train(full("train.optim=adamw_8bit"))
    assert losses(run)[-1] < losses(run)[0]


def test_a_full_run_is_no_adapter_to_start_from(full: Any, recipe: Any) -> None:
    run = train(full("train.max_steps=1"))
    with pytest.raises(AdapterError, match="that run has no adapter, it trained all weights") as caught:
        prepare(recipe(f"model.adapter={run.path}", name="next"))
    assert f"model.base={run.model}" in (caught.value.hint or "")


def test_a_disk_that_is_full_keeps_the_model_in_memory(full: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = full("train.max_steps=1")
    asked: list[str] = []
    save = fine_tuning.save_trained

    def refuse_once(*args: Any, **kwargs: Any) -> None:
        if not asked:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **kwargs)

    def ask(unsaved: Any, seconds: float) -> Path | None:
        asked.append(unsaved.text)
        return None

    monkeypatch.setattr(fine_tuning, "save_trained", refuse_once)
    run = train_prepared(prepare(made), ask=ask)
    assert run.model.is_dir()
    assert asked[0].startswith(f"the model cannot be written to `{run.model}`")


class Casts(TrainerCallback):
    """Keeps how the products of a layer are cast."""

    def __init__(self) -> None:
        self.seen: set[tuple[bool, bool]] = set()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def look(*_: Any) -> None:
            self.seen.add((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))

        kwargs["model"].backbone.layers[0].mixer.register_forward_pre_hook(look)


def test_products_are_cast_and_no_16_bit_weights_pile_up(full: Any) -> None:
    """Two bytes for each weight of the model, kept until the forward ends, which the plan does not count."""
    casts = Casts()
    train_prepared(prepare(full("model.dtype=bfloat16", "train.max_steps=1")), callbacks=[casts])
    assert casts.seen == {(True, False)}
