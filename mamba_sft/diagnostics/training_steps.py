"""What `bench train` times: optimizer steps of a recipe, ours and those of stock transformers with PEFT.

Both take the same rows, in the same order and micro-batches, in the same number format, with the same
optimizer. Each runs in a process of its own and tells seconds, tokens, memory and loss of every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mamba_sft.data.packing import PADDING, Collator
from mamba_sft.data.preparing import read_corpus
from mamba_sft.diagnostics.benched_recipe import is_data_here, peer_targets
from mamba_sft.diagnostics.measured_process import Moment
from mamba_sft.model.adapter import lora_config
from mamba_sft.model.checkpoint import resolve_base
from mamba_sft.model.full_weights import in_float32
from mamba_sft.model.loading import apply_setup, load_config, load_setup, resolve_dtype
from mamba_sft.model.quantization import UNQUANTIZED, bitsandbytes_config, misfits
from mamba_sft.model.shape import find_shape
from mamba_sft.planning.course import Course, plan_course
from mamba_sft.planning.environment import describe_device
from mamba_sft.planning.extent import run_length, with_accumulation
from mamba_sft.planning.settling import settle
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from mamba_sft.training.arguments import trainer_arguments
from mamba_sft.training.callbacks import Interruption
from mamba_sft.training.counts import Counts
from mamba_sft.training.fine_tuning import load_trainer
from mamba_sft.training.pace import peak_memory, wait_for
from mamba_sft.training.preparation import Preparation
from mamba_sft.training.starting import find_start

if TYPE_CHECKING:
    from mamba_sft.data.preparing import PreparedData
    from mamba_sft.diagnostics.measured_process import Tell
    from mamba_sft.model.chat_template import TemplateSetup
    from mamba_sft.planning.extent import RunLength

SMALL_RATE = 1e-6
"""Learning rate of the steps that are timed: nobody keeps what they learn."""
MADE_UP = 512
"""Rows that are made up, at most."""
_SHORT, _LONG = 37, 1500  # tokens of the sequences in a packed row that is made up
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Steps:
    """The first optimizer steps of a recipe.

    Args:
        recipe: With its accumulation settled, and without what is done beside training.
        setup: Its tokenizer.
        rows: The training rows.
        course: Which of them each step takes.
        length: What the rows come to.
        made_up: Whether the rows are made up, because those of the recipe are not on this machine.
    """

    recipe: Recipe
    setup: TemplateSetup
    rows: Any
    course: Course
    length: RunLength
    made_up: bool


def first_steps(recipe: Recipe, count: int) -> Steps:
    """Returns the first optimizer steps of a recipe, or all of them where there are fewer.

    Args:
        recipe: What would be trained.
        count: How many.
    """
    if is_data_here(recipe):
        setup, data = read_corpus(recipe)
        settled = settle(recipe, data)
        rows, course, length, settled_recipe = (
            settled.data.train_rows, settled.course, settled.length, settled.recipe,
        )  # fmt: skip
    else:
        setup = load_setup(recipe.model, recipe.chat)
        rows, lengths = made_up_rows(recipe, load_config(recipe.model).vocab_size)
        length = run_length(recipe, rows=len(lengths), tokens=int(lengths.sum()), lengths=lengths)
        settled_recipe = with_accumulation(recipe, length.accumulation)
        course = plan_course(settled_recipe.train, lengths, seed=recipe.seed)
    return Steps(
        _training_alone(settled_recipe, count), setup, rows, _cut(course, count), length,
        made_up=not is_data_here(recipe),
    )  # fmt: skip


def made_up_rows(recipe: Recipe, vocabulary: int) -> tuple[Any, np.ndarray]:
    """Returns rows of random tokens as long as the recipe's, all of them trained, and their lengths.

    Where the recipe packs, each holds sequences of 37 to 1,500 tokens.
    """
    from datasets import Dataset

    length, rng = recipe.data.max_length or _DEFAULT_LENGTH, np.random.default_rng(recipe.seed)
    rows = []
    for _ in range(MADE_UP):
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        cuts = np.cumsum(rng.integers(_SHORT, _LONG, length // _SHORT + 1))
        inside = np.diff([0, *cuts[cuts < length], length]) if recipe.data.packing else np.array([length])
        rows.append({"input_ids": ids, "labels": ids, "seq_lengths": inside.astype(np.int32)})
    return Dataset.from_list(rows).with_format("numpy"), np.full(len(rows), length)


def _training_alone(recipe: Recipe, count: int) -> Recipe:
    """The recipe with nothing to answer, report or keep; how fast it learns changes no time."""
    train = recipe.train.model_copy(
        update={
            "max_steps": count, "learning_rate": SMALL_RATE, "lr_scheduler_type": "constant",
            "warmup_steps": 0, "stable_steps": None, "decay": None, "decay_steps": None, "logging_steps": 1,
            "report_to": [], "on_spike": "warn",
        }
    )  # fmt: skip
    evaluation = recipe.eval.model_copy(update={"prompts": None, "sample_steps": None})
    return recipe.model_copy(update={"train": train, "eval": evaluation})


def _cut(course: Course, count: int) -> Course:
    starts = course.starts[: count + 1]
    return Course(course.order[: starts[-1]], starts, course.tokens[:count], course.epochs[:count])


# --- ours ---------------------------------------------------------------------------------------------------


def take_our_steps(tell: Tell, recipe: Recipe, count: int, place: str) -> None:
    """Trains some steps as `train` does, in an empty directory, and tells each of them.

    Args:
        tell: Takes `step`, `seconds`, `cpu_seconds`, `tokens` and `peak_bytes` of each, then its `loss`.
        recipe: What would be trained.
        count: Optimizer steps, warm-up included.
        place: The directory.
    """
    steps = first_steps(recipe.model_copy(update={"output_dir": place}), count)
    run = Run(Path(place))
    arguments = trainer_arguments(steps.recipe, run, steps=steps.course.steps, has_validation=False)
    arguments.set_save("no")
    preparation = Preparation(
        recipe=steps.recipe, run=run, setup=steps.setup,
        data=cast("PreparedData", _OnlyRows(steps.rows)), arguments=arguments,
        course=steps.course, prompts=[], length=replace(steps.length, steps=steps.course.steps),
        start=find_start(recipe), resumed=False, resume_point=None, finish=False,
        record={}, trained=0, seen=frozenset(),
    )  # fmt: skip
    clock = _Clock(tell, steps.course)
    counts = Counts(describe_device()["name"])
    trainer = load_trainer(preparation, counts, Interruption(recipe.train.grace_seconds), [clock])
    trainer.fit(None)


class _OnlyRows:
    """Rows to train on, where a run has prepared data."""

    validation_rows = None
    rejected = None

    def __init__(self, train_rows: Any):
        self.train_rows = train_rows


class _Clock(TrainerCallback):
    """Times every step, from its begin until the device has done it."""

    shows_progress = True  # so that the trainer's own bar is off

    def __init__(self, tell: Tell, course: Course):
        self.tell = tell
        self.course = course
        self.started = Moment.now()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        wait_for(args.device)
        self.started = Moment.now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        wait_for(args.device)
        tokens = int(self.course.tokens[state.global_step - 1])
        self.tell({"step": state.global_step} | self.started.facts(tokens, peak_memory(args.device)))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self.tell({"step": state.global_step, "loss": float(logs["loss"])})


# --- stock transformers and PEFT ----------------------------------------------------------------------------


def take_stock_steps(tell: Tell, recipe: Recipe, count: int) -> None:
    """Takes the same steps with transformers and PEFT as they come.

    They know no packing: the sequences of a packed row become rows of their own, padded to the longest.

    Args:
        tell: Takes what `take_our_steps` tells, and the same of each micro-batch, with its number, `batch`:
            since the begin of the step, but for the tokens, which are its own.
        recipe: What would be trained.
        count: Optimizer steps, warm-up included.
    """
    steps = first_steps(recipe, count)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    model = _stock_model(steps, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(steps, model)
    dtype = resolve_dtype(steps.recipe.model)
    collate = Collator(steps.setup.tokenizer.pad_token_id)
    for step in range(1, steps.course.steps + 1):
        batches = [_on_device(batch, device) for batch in _stock_batches(steps, step - 1, collate)]
        labels = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        wait_for(device)
        started, loss = Moment.now(), torch.zeros((), device=device)
        tell({"step": step, "next_tokens": int(batches[0]["attention_mask"].sum())})
        for number, batch in enumerate(batches):
            loss += _backward(model, batch, dtype, labels)
            wait_for(device)
            tokens = int(batch["attention_mask"].sum())
            tell({"step": step, "batch": number} | started.facts(tokens, peak_memory(device)))
        torch.nn.utils.clip_grad_norm_(trained, steps.recipe.train.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        wait_for(device)
        tell({"step": step} | started.facts(int(steps.course.tokens[step - 1]), peak_memory(device)))
        tell({"step": step, "loss": float(loss)})


def _stock_model(steps: Steps, device: torch.device) -> Any:
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import FalconMambaForCausalLM

    recipe = steps.recipe
    section = recipe.model if recipe.adapter is not None else in_float32(recipe.model)
    dtype, quantization = resolve_dtype(section), None
    if section.quantization != "none":
        left_out = misfits(find_shape(section)[0], section.quantization)
        quantization = bitsandbytes_config(section.quantization, dtype, (*UNQUANTIZED, *left_out))
    model = FalconMambaForCausalLM.from_pretrained(
        resolve_base(section.base, section.revision), dtype=dtype, device_map={"": device},
        quantization_config=quantization, use_safetensors=True, local_files_only=True,
    )  # fmt: skip
    apply_setup(model, steps.setup)
    checkpoints = recipe.train.checkpointing != "none"
    if quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpoints)
    if recipe.adapter is not None:
        section_of_peer = recipe.adapter.model_copy(
            update={"target_modules": peer_targets(recipe.adapter.target_modules)}
        )
        config = lora_config(model, section_of_peer, trained_token_ids=steps.setup.trained_token_ids)
        model = get_peft_model(model, config)
    if checkpoints:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.config.use_cache = False
    return model.train()


def _optimizer(steps: Steps, model: Any) -> Any:
    """The optimizer that transformers makes of the recipe's `train.optim`."""
    from transformers import Trainer

    arguments = trainer_arguments(steps.recipe, Run(Path("unwritten")), steps=1, has_validation=False)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return kind([parameter for parameter in model.parameters() if parameter.requires_grad], **settings)


def _stock_batches(steps: Steps, step: int, collate: Collator) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of a step, a sequence a row, with a mask over the padding."""
    numbers, size = steps.course.rows(step), steps.recipe.train.per_device_train_batch_size
    for start in range(0, len(numbers), size):
        rows = steps.rows.__getitems__([int(number) for number in numbers[start : start + size]])
        batch = collate([piece for row in rows for piece in sequences(row)])
        mask = batch["seq_idx"] != PADDING  # type: ignore[operator]
        yield {
            "input_ids": batch["input_ids"], "labels": batch["labels"], "attention_mask": mask.long(),
        }  # type: ignore[dict-item, union-attr, unused-ignore]  # fmt: skip


def sequences(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the sequences that a row was packed of, as rows."""
    ends = np.cumsum(row.get("seq_lengths", [len(row["input_ids"])]))
    starts = [0, *ends[:-1]]
    return [
        {"input_ids": row["input_ids"][start:end], "labels": row["labels"][start:end]}
        for start, end in zip(starts, ends, strict=True)
    ]


def _on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def _backward(model: Any, batch: dict[str, Tensor], dtype: torch.dtype, labels: int) -> Tensor:
    """Adds a micro-batch's part to the gradients; returns its part of the step's loss."""
    device = batch["input_ids"].device.type
    mixed: Callable[[], Any] = contextlib.nullcontext
    if dtype != torch.float32:
        mixed = lambda: torch.autocast(device, dtype)  # noqa: E731
    with mixed():
        share = int((batch["labels"] != -100).sum()) / max(labels, 1)
        loss: Tensor = model(**batch, use_cache=False).loss * share
    loss.backward()
    return loss.detach()
