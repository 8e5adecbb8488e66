"""Training runs on a tiny model: what must be equal is equal, and what must stop stops."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mamba_sft import Recipe, Run
from mamba_sft.errors import AdapterError, MambaSFTError, RecipeError, TrainingError
from mamba_sft.planning.extent import run_length
from mamba_sft.training.fine_tuning import RunInterruptedError, train, train_prepared
from mamba_sft.training.preparation import prepare
from mamba_sft.training.resuming import differences, newest_resume_point
from mamba_sft.training.trainer import Trainer


def losses(run: Run) -> list[float]:
    """The training loss of every step."""
    return [
        line["loss"] for line in map(json.loads, run.metrics_file.read_text().splitlines()) if "loss" in line
    ]


def adapter(run: Run) -> dict[str, torch.Tensor]:
    """The adapter's tensors."""
    return load_file(run.adapter / "adapter_model.safetensors")


def assert_same_adapter(left: Run, right: Run, tolerance: float) -> None:
    ours, theirs = adapter(left), adapter(right)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_run_learns_and_writes_everything(recipe: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello 3", "answer": "quick 3 fox"}\n{"prompt": "hello"}\n')
    run = train(
        recipe(
            "train.max_steps=8",
            "data.validation=0.2",
            "eval.eval_steps=2",
            f"eval.prompts={prompts}",
            "eval.max_new_tokens=4",
        )
    )
    assert losses(run)[-1] < losses(run)[0]
    for path in (
        run.recipe,
        run.environment,
        run.metrics_file,
        run.samples_file,
        run.report,
        run.adapter / "base.json",
    ):
        assert path.is_file(), path
    assert Recipe.load(run.recipe).train.max_steps == 8
    assert any("eval_loss" in line for line in run.metrics_file.read_text().splitlines())
    assert [json.loads(line)["prompt"] for line in run.samples_file.read_text().splitlines()] == [
        "hello 3",
        "hello",
    ]
    assert not list(run.path.rglob("adapter_model.bin")), "weights are safetensors"
    assert not list(run.path.rglob("*.partial"))


def test_every_adapter_tensor_moves(recipe: Any) -> None:
    run = train(recipe("train.max_steps=3"))
    for name, tensor in adapter(run).items():
        assert tensor.dtype == torch.float32, name
        if "lora_B" in name:
            assert tensor.abs().max() > 0, f"{name} still is what it was"


def test_2n_steps_equal_n_and_resume_n(recipe: Any) -> None:
    whole = train(recipe("train.save_total_limit=5", name="whole"))
    halves = recipe("train.save_total_limit=5", name="halves")
    with pytest.raises(RunInterruptedError, match="stopped at step 2 of 4"):
        train_prepared(prepare(halves), callbacks=[SignalAt(2)])
    run = train(halves, resume=True)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
    assert_same_adapter(whole, run, 1e-6)


class SignalAt(TrainerCallback):
    """Sends SIGINT to this process at the start of a step's work."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGINT):
        self.step = step
        self.number = number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            signal.raise_signal(self.number)


def test_an_interruption_saves_and_says_how_to_go_on(recipe: Any) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RunInterruptedError) as caught:
        train_prepared(prepare(recipe()), callbacks=[SignalAt(1, signal.SIGTERM)])
    assert caught.value.exit_code == 130
    assert "checkpoint-1" in caught.value.message
    assert "--resume" in (caught.value.hint or "")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("packing", ["true", "false"])
def test_batch_4x1_equals_1x4(recipe: Any, packing: str) -> None:
    common = ("train.max_steps=2", f"data.packing={packing}")
    wide = train(
        recipe(
            *common, "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1", name="wide"
        )
    )
    long = train(
        recipe(
            *common, "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4", name="long"
        )
    )
    assert losses(wide) == pytest.approx(losses(long), rel=1e-4)


def test_packed_equals_unpacked(recipe: Any) -> None:
    """The whole data set in one step: the same tokens, so the same loss and the same first update."""
    whole = (
        "train.max_steps=1",
        "train.gradient_accumulation_steps=1",
        "train.per_device_train_batch_size=48",
    )
    packed = train(recipe(*whole, "data.packing=true", name="packed"))
    plain = train(recipe(*whole, "data.packing=false", name="plain"))
    assert losses(packed) == pytest.approx(losses(plain), rel=1e-5)
    one, other = (json.loads(run.metrics_file.read_text().splitlines()[0]) for run in (packed, plain))
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("policy", ["block", "mamba"])
def test_checkpointing_changes_nothing(recipe: Any, policy: str) -> None:
    on = train(recipe(f"train.checkpointing={policy}", "train.max_steps=2", name="on"))
    off = train(recipe("train.checkpointing=none", "train.max_steps=2", name="off"))
    assert losses(on) == pytest.approx(losses(off), rel=1e-6)


def test_a_masked_prompt_gives_no_gradient(recipe: Any) -> None:
    preparation = prepare(recipe("data.packing=false"))
    row = preparation.data.train_rows[0]
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    text = preparation.setup.tokenizer.decode(trained)
    assert text.startswith("quick")
    assert text.rstrip().endswith("<|im_end|>")
    assert "hello" not in text


def test_nan_stops_with_the_step_and_the_batch(recipe: Any, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(
        TrainingError, match=r"is not a number at step \d; the last good checkpoint is"
    ) as caught:
        train_prepared(prepare(recipe("train.max_steps=6")), callbacks=[Poison(4)])
    assert newest_resume_point(run) == run.checkpoints / "checkpoint-2"
    batch = json.loads((run.path / "nan-batch-step-4.json").read_text())
    assert "input_ids" in batch
    assert "/chats.jsonl:" in batch["where"][0][0], batch["where"]
    assert f"its rows: `{batch['where'][0][0]}`" in caught.value.message
    assert "--resume" in (caught.value.hint or "")


class Poison(TrainerCallback):
    """Puts a NaN into the adapter before a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            trained = next(p for n, p in model.named_parameters() if "lora_A" in n)
            trained.data.fill_(float("nan"))


def test_a_gradient_that_is_not_a_number_stops_before_it_reaches_the_weights(
    recipe: Any, tmp_path: Path
) -> None:
    run, poison = Run(tmp_path / "run"), PoisonedGradient(2)
    with pytest.raises(TrainingError, match="gradient is not a number at step 2"):
        train_prepared(prepare(recipe()), callbacks=[poison])
    assert (run.path / "nan-batch-step-2.json").is_file()
    assert all(torch.isfinite(tensor).all() for tensor in poison.trained)


class PoisonedGradient(TrainerCallback):
    """Leaves the loss as it is and makes a gradient NaN, as an overflow in a backward pass does."""

    def __init__(self, step: int):
        self.step = step
        self.factor = float("nan")
        self.trained: list[torch.Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.trained = [p for p in model.parameters() if p.requires_grad]
            self.trained[0].register_hook(lambda gradient: gradient * self.factor)


@pytest.mark.parametrize("more", [(), ("train.stream_tokens=16",), ("train.auto_batch=true",)])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_the_micro_batch_whose_gradient_is_no_number_is_found(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, more: tuple[str, ...]
) -> None:
    """Among three that are added up, however they are run: they are run again to find it."""
    seen: list[list[list[int]]] = []
    poison, take = PoisonedGradient(1), Trainer.take_micro_batch

    def watched(trainer: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        rows = inputs["input_ids"].tolist()
        seen.extend([rows] if rows not in seen else [])
        poison.factor = float("nan") if seen.index(rows) == bad else 1.0
        return take(trainer, model, inputs, *args, **options)

    monkeypatch.setattr(Trainer, "take_micro_batch", watched)
    three = ("data.packing=false", "train.gradient_accumulation_steps=3",
             "train.per_device_train_batch_size=1", *more)  # fmt: skip
    with pytest.raises(TrainingError, match="gradient is not a number at step 1"):
        train_prepared(prepare(recipe(*three)), callbacks=[poison])
    kept = json.loads((tmp_path / "run" / "nan-batch-step-1.json").read_text())
    assert len(seen) == 3
    assert kept["input_ids"] == seen[bad]


def test_an_adapter_that_cannot_learn_stops_the_run(recipe: Any) -> None:
    with pytest.raises(AdapterError, match=r"no gradient reaches .*\n.*x_proj"):
        train_prepared(prepare(recipe()), callbacks=[Bypass()])


class Bypass(TrainerCallback):
    """Makes one projection skip its adapter, as a kernel that reads `.weight` would."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layer = model.get_base_model().backbone.layers[0].mixer.x_proj
        layer.forward = layer.base_layer.forward


def test_dry_run_needs_no_weights(recipe: Any, tiny_base: Path, tmp_path: Path) -> None:
    (tiny_base / "model.safetensors").unlink()
    preparation = prepare(recipe())
    assert preparation.max_steps == 4
    assert len(preparation.data.train_rows) > 0
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_lost(recipe: Any) -> None:
    run = train(recipe("train.max_steps=1"))
    with pytest.raises(TrainingError, match="holds a finished run") as caught:
        train(recipe("train.max_steps=1"))
    assert "--overwrite" in (caught.value.hint or "")
    with pytest.raises(TrainingError, match="is finished"):
        train(recipe("train.max_steps=1"), resume=True)
    before = run.environment.stat().st_mtime_ns
    train(recipe("train.max_steps=1"), overwrite=True)
    assert run.environment.stat().st_mtime_ns != before


def test_overwrite_loses_nothing_when_the_new_run_cannot_start(recipe: Any) -> None:
    run = train(recipe("train.max_steps=1"))
    before = adapter(run)
    with pytest.raises(AdapterError, match=r"layers\.9"):  # only the model can tell
        train(recipe("adapter.target_modules=[layers.9.mixer.in_proj]"), overwrite=True)
    assert adapter(run).keys() == before.keys()


def test_a_foreign_directory_is_not_touched(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(TrainingError, match="exists and is not a run"):
            prepare(recipe(), overwrite=overwrite)


def test_resume_refuses_another_recipe(recipe: Any) -> None:
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(recipe()), callbacks=[SignalAt(1)])
    with pytest.raises(RecipeError, match=r"`train.learning_rate` was 0.01, now 0.5"):
        prepare(recipe("train.learning_rate=0.5"), resume=True)
    assert prepare(recipe("train.logging_steps=2"), resume=True).resume_point is not None


def test_resume_with_less_memory(recipe: Any) -> None:
    """After running out of memory, what saves memory may change: the run is the same one."""
    whole = train(recipe(name="whole"))
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(recipe()), callbacks=[SignalAt(2)])
    less = ("train.stream_tokens=16", "train.checkpointing=mamba", "train.auto_batch=true")
    assert losses(train(recipe(*less), resume=True)) == pytest.approx(losses(whole), rel=1e-4)


def test_half_a_checkpoint_is_not_resumed_from(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(recipe()), callbacks=[SignalAt(3)])
    run = Run(tmp_path / "run")
    (run.checkpoints / "checkpoint-9").mkdir()
    (run.checkpoints / "checkpoint-10").mkdir()
    (run.checkpoints / "checkpoint-10" / "trainer_state.json").write_text('{"global_')
    assert newest_resume_point(run) == run.checkpoints / "checkpoint-3"


def test_trainer_arguments_reach_the_trainer(recipe: Any) -> None:
    assert prepare(recipe("train.trainer_arguments={adam_beta2: 0.95}")).arguments.adam_beta2 == 0.95


def test_a_logger_that_is_not_installed_is_named(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.training.arguments.find_spec", lambda name: None)
    with pytest.raises(
        TrainingError, match=r"`train\.report_to` names `trackio`, which is not installed"
    ) as caught:
        prepare(recipe("train.report_to=[trackio]"))
    assert caught.value.hint == "pip install 'mamba-sft[trackio]'"


def test_early_stopping_and_the_best_checkpoint(recipe: Any) -> None:
    """At this learning rate the validation loss soon rises: the run stops and keeps the best adapter."""
    run = train(
        recipe(
            "data.validation=0.3", "train.max_steps=40", "train.learning_rate=0.3", "eval.eval_steps=1",
            "eval.early_stopping_patience=2", "train.save_steps=1",
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(held_out) < 40
    assert json.loads(run.environment.read_text())["best_validation_loss"] == pytest.approx(min(held_out))
    best = run.checkpoints / f"checkpoint-{1 + held_out.index(min(held_out))}"
    saved = load_file(best / "adapter_model.safetensors")
    for name, tensor in adapter(run).items():
        torch.testing.assert_close(tensor, saved[name])


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"])
def test_optimizers(recipe: Any, optim: str) -> None:
    run = train(recipe(f"train.optim={optim}", "train.max_steps=3"))
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_bases_train(recipe: Any, quantization: str) -> None:
    run = train(recipe(f"model.quantization={quantization}", "train.max_steps=6"))
    assert losses(run)[-1] < losses(run)[0]
    assert all(tensor.dtype == torch.float32 for tensor in adapter(run).values())


def test_nf4_trains_alike_on_a_cpu_that_packs_weights(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX512-BF16 bitsandbytes packs 4-bit weights at the first evaluation, here the sample answers."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello 3"}\n')
    options = ("model.quantization=nf4", "data.validation=6", "eval.eval_steps=2", "eval.max_new_tokens=4",
               f"eval.prompts={tmp_path / 'prompts.jsonl'}")  # fmt: skip
    runs = []
    for name, packs in (("plain", False), ("packing", True)):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda packs=packs: packs)
        runs.append(train(recipe(*options, name=name)))
    assert losses(runs[0]) == losses(runs[1])
    assert_same_adapter(*runs, tolerance=0)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_sixteen_bits_train(recipe: Any, dtype: str) -> None:
    run = train(recipe(f"model.dtype={dtype}", "train.max_steps=6"))
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear", "constant"])
def test_schedules(recipe: Any, schedule: str) -> None:
    run = train(recipe(f"train.lr_scheduler_type={schedule}", "train.max_steps=5", "train.warmup_steps=1"))
    rates = [
        line["learning_rate"]
        for line in map(json.loads, run.metrics_file.read_text().splitlines())
        if "loss" in line
    ]
    assert rates[:2] == pytest.approx([0.5e-2, 1e-2])
    assert min(rates) > 0
    assert (rates[-1] < 1e-2) == (schedule in {"cosine", "linear"}) or schedule == "wsd"


def test_float16_on_a_cpu_is_refused_before_the_weights(recipe: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA card")
    with pytest.raises(MambaSFTError, match="float16"):
        prepare(recipe("model.dtype=float16"))


def test_steps_are_counted_as_the_trainer_counts_them(recipe: Any) -> None:
    preparation = prepare(recipe("train.max_steps=-1", "train.num_train_epochs=2", "data.packing=false"))
    run = train_prepared(preparation)
    assert json.loads(run.environment.read_text())["steps"] == preparation.max_steps
    assert preparation.max_steps == run_length(preparation.recipe, rows=48, tokens=480).steps == 24


def test_differences_name_the_field() -> None:
    text = "output_dir: x\nmodel: {base: b}\ndata: {sources: [{path: p}]}\n"
    one, two = Recipe.from_text(text), Recipe.from_text(text, overrides=["adapter.r=8"])
    assert differences(one, two) == [("adapter.r", 16, 8)]
