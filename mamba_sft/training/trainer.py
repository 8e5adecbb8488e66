"""TRL's trainer as this project uses it: configured from a recipe, and what ours adds. Owner of trl."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer import add_fused_lm_head

from mamba_sft.data.packing import PADDING
from mamba_sft.errors import RecipeError, TrainingError
from mamba_sft.model.adapter import keep_float32
from mamba_sft.model.loading import resolve_dtype
from mamba_sft.planning.schedule import TRAINER_NAMES, make_scheduler
from mamba_sft.recipe.fields import TrainSection
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run, write_atomically
from mamba_sft.training.figures import Figures, Tally
from mamba_sft.training.largest_residual import LargestResidual
from mamba_sft.training.resuming import newest_resume_point
from mamba_sft.training.steps import ChunkedSteps

FUSED_OUTPUTS = ("log_probs", "entropy", "is_top1")
"""What the fused head computes of each trained token: the loss, and what is logged beside it."""


class Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, which stops at the first loss or gradient that is not a number, and wastes no step.

    With `stream_tokens`, `carry_state` or `auto_batch` it takes its own training steps (`ChunkedSteps`).

    Args:
        run: Where a batch that gave NaN is kept.
        section: The recipe's `train`.
        callbacks: As the trainer's; one that shows progress (has a `console`) replaces the trainer's bar.
        **arguments: Everything else `SFTTrainer` takes.
    """

    def __init__(
        self, *, run: Run, section: TrainSection, callbacks: Sequence[TrainerCallback], **arguments: Any
    ):
        self.run = run
        self.schedule = section.lr_scheduler_type
        # The loss never sees the full logits: its head is asked for log-probabilities in tiles. TRL does this
        # too, today; our own steps ask for the same head, so it is not left to TRL.
        add_fused_lm_head(arguments["model"].get_base_model(), outputs=FUSED_OUTPUTS)
        self.residual = LargestResidual() if section.log_activations else None
        super().__init__(callbacks=[*([self.residual] if self.residual else []), *callbacks], **arguments)
        self.remove_callback(PrinterCallback)
        if any(hasattr(callback, "console") for callback in callbacks):
            self.remove_callback(ProgressCallback)
        keep_float32(self.model)
        self.tally = Tally(self.accelerator)
        self._largest = 0.0
        self._micro_batches: list[tuple[torch.Tensor, dict[str, Any]]] = []
        self.steps = ChunkedSteps(self, section) if ChunkedSteps.wanted(section) else None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Makes the recipe's schedule, with a first and a last step that count."""
        if self.lr_scheduler is None:  # type: ignore[has-type]
            self.lr_scheduler = make_scheduler(
                TRAINER_NAMES[self.schedule],
                self.optimizer if optimizer is None else optimizer,
                warmup=self.args.get_warmup_steps(num_training_steps),
                steps=num_training_steps,
            )
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward, whose loss and inputs are kept until the optimizer's step."""
        loss = self._take_step(model, inputs, *args, **kwargs)
        self._micro_batches.append((loss.detach(), inputs))
        return loss

    def _take_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        step = super().training_step if self.steps is None else self.steps.training_step
        loss: torch.Tensor = step(model, inputs, *args, **kwargs)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: torch.Tensor | None = None) -> float:
        """Returns the gradient's norm; raises `TrainingError` before a NaN can reach the weights.

        Here, once in an optimizer step, the host waits for the device: for all that it must know of the step.
        """
        found = torch.as_tensor(super()._get_grad_norm(model, grad_norm=grad_norm))
        batches, self._micro_batches = self._micro_batches, []
        figures = self.tally.collect("train")
        numbers = [found[None], *(loss[None] for loss, _ in batches)]
        if self.residual is not None:
            numbers.append(self.residual.collect(self.accelerator))
        read = torch.cat([x.double().to(figures.device) for x in (*numbers, figures.flatten())]).tolist()
        norm, losses, rest = read[0], read[1 : len(batches) + 1], read[len(batches) + 1 :]
        for loss, (_, inputs) in zip(losses, batches, strict=True):
            if not math.isfinite(loss):
                self._stop_on_nan("loss", inputs)
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            self._stop_on_nan("gradient", self._find_bad_gradient(model, [inputs for _, inputs in batches]))
        if self.residual is not None:
            self._largest = max(self._largest, rest.pop(0))
        self._take("train", [rest[start : start + 4] for start in range(0, len(rest), 4)])
        return float(norm)

    def _take(self, mode: str, rows: list[list[float]]) -> None:
        """Hands what micro-batches came to over to TRL's metrics."""
        if rows:
            for name, values in self.tally.metrics(mode, rows).items():
                self._metrics[mode][name] += values
            self._metrics[mode]["num_tokens"] = [self.tally.tokens]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss without its waits for the device; in evaluation, rows stream as they do in training."""
        if return_outputs or self._asks_more_of_the_loss:
            inputs = inputs | {"attention_mask": (inputs["seq_idx"] != PADDING).long()}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.steps is not None and not model.training:
            return self.steps.evaluation_loss(model, inputs)
        figures = Figures.of(model, inputs)
        self.tally.add("train" if model.training else "eval", figures, inputs)
        tokens = figures.labels if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = figures.loss / tokens.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean of the processes' gradients
        return loss

    @property
    def _asks_more_of_the_loss(self) -> bool:
        """Whether `train.trainer_arguments` asks for another loss than ours, which TRL then computes."""
        return self.args.loss_type != "nll" or self.label_smoother is not None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what TRL logs, over all processes, and the largest residual where the recipe asks for it."""
        if self.residual is not None and "loss" in logs:
            logs["largest_residual"], self._largest = self._largest, 0.0
        self._take("eval", self.tally.collect("eval").tolist())
        super().log(logs, start_time)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.steps is not None:
            self.steps.save(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self.steps is not None and checkpoint is not None:
            self.steps.load(Path(checkpoint), self.args.process_index)

    def _find_bad_gradient(self, model: Any, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """Runs the micro-batches of a step again, as they were run; returns the first with a bad gradient.

        Dropout draws anew, so it may be none of them this time: then the last is returned. Every process runs
        all of its own, so that none waits for another.
        """
        bad = []
        for inputs in batches:
            model.zero_grad()
            with self.accelerator.no_sync(model):
                self._take_step(model, inputs)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
                bad.append(inputs)
        return (bad or batches[-1:])[0]

    def _stop_on_nan(self, what: str, inputs: dict[str, Any]) -> None:
        step = self.state.global_step + 1
        rows = inputs["input_ids"].tolist()
        batch = self.run.nan_batch(step)
        tokens = {key: value.tolist() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        write_atomically(batch, json.dumps(tokens))
        text = self.processing_class.decode(rows[0][:40])
        kept = newest_resume_point(self.run)
        where = f"the last good checkpoint is `{kept}`" if kept else "no checkpoint had been saved yet"
        raise TrainingError(
            f"the {what} is not a number at step {step}; {where}\n"
            f"the batch is in `{batch}`; its first row starts {text!r}",
            hint="look at that batch, lower `train.learning_rate`, or use bfloat16 instead of float16; "
            "then go on with `--resume`",
        )


def trainer_arguments(recipe: Recipe, run: Run, *, has_validation: bool) -> SFTConfig:
    """Returns TRL's configuration of a run, every field of which comes from the recipe.

    Raises:
        RecipeError: `train.trainer_arguments` names a field TRL does not have.
        TrainingError: A logger of `train.report_to` is not installed.
    """
    dtype = resolve_dtype(recipe.model)
    if dtype == torch.float16 and not torch.cuda.is_available():
        raise RecipeError(
            "`model.dtype: float16` trains on CUDA GPUs only",
            hint="use `float32` or `bfloat16` on a CPU: `model.dtype=float32`",
        )
    for name in recipe.train.report_to:
        if find_spec(name) is None:
            raise TrainingError(
                f"`train.report_to` names `{name}`, which is not installed",
                hint=f"pip install 'mamba-sft[{name}]'",
            )
    values = {
        "output_dir": str(run.checkpoints),
        "seed": recipe.seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "gradient_checkpointing": False,  # `activations.py` does it
        "lr_scheduler_type": TRAINER_NAMES[recipe.train.lr_scheduler_type],
        "ddp_find_unused_parameters": False,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "disable_tqdm": False,
        "report_to": recipe.train.report_to or "none",
        "run_name": run.path.name,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},  # from pinned memory, nobody waits
    } | _same_names(recipe)
    if has_validation:
        values |= {
            "eval_strategy": "steps",
            "eval_steps": recipe.eval.eval_steps,
            "per_device_eval_batch_size": recipe.eval.per_device_eval_batch_size,
            "prediction_loss_only": True,
            "load_best_model_at_end": recipe.eval.load_best_model_at_end,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return _sft_config(values, recipe.train.trainer_arguments)


def _same_names(recipe: Recipe) -> dict[str, Any]:
    names = (
        "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
        "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "logging_steps",
        "save_steps", "save_total_limit",
    )  # fmt: skip
    return {name: getattr(recipe.train, name) for name in names}


def _sft_config(values: dict[str, Any], more: dict[str, Any]) -> SFTConfig:
    known = [field.name for field in fields(SFTConfig)]
    for name in more:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise RecipeError(
                f"unknown field `train.trainer_arguments.{name}`"
                + (f"; did you mean `{close[0]}`?" if close else ""),
                hint="it takes any field of trl.SFTConfig that the recipe has no field for",
            )
    try:
        return SFTConfig(**values | more)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"the trainer refuses these settings: {error}") from error
