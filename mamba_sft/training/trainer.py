"""TRL's trainer as this project uses it: configured from a recipe, and what ours adds. Owner of trl."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, gather_object
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerControl
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from mamba_sft.data.packing import PADDING
from mamba_sft.model.adapter import keep_float32
from mamba_sft.model.full_weights import is_undecayed, without_wrapper
from mamba_sft.model.shards import whole
from mamba_sft.planning.course import Course
from mamba_sft.planning.schedule import make_scheduler
from mamba_sft.recipe.fields import TrainSection
from mamba_sft.run import Run
from mamba_sft.training.bad_steps import find_bad_gradients, stop_on_nan
from mamba_sft.training.callbacks import Interruption
from mamba_sft.training.counts import Counts, mean_loss
from mamba_sft.training.figures import Figures, Tally
from mamba_sft.training.fused_head import add_fused_head
from mamba_sft.training.largest_residual import LargestResidual
from mamba_sft.training.pace import Pace
from mamba_sft.training.resumable import ResumableTrainer, TakeUp
from mamba_sft.training.saving import CheckpointSaves
from mamba_sft.training.sharding import own_environment, shard_anywhere
from mamba_sft.training.spikes import SpikeWatch
from mamba_sft.training.step_loader import Batch, count_rows, load_steps
from mamba_sft.training.steps import ChunkedSteps
from mamba_sft.training.streaming import split
from mamba_sft.training.zero import EngineBackward, EngineStep, use_engine

logger = logging.getLogger(__name__)


class Trainer(ResumableTrainer):
    """TRL's trainer, which stops at the first loss or gradient that is not a number, and wastes no step.

    With `stream_tokens`, `carry_state` or `auto_batch` it takes its own training steps (`ChunkedSteps`).

    Args:
        run: Where resume points, and a batch that gave NaN, are kept.
        saves: How its checkpoints are saved.
        section: The recipe's `train`.
        course: Which rows each optimizer step takes.
        sources: What the sources are called whose losses are told apart; none where there is one alone.
        counts: Takes this session's time and tokens.
        interruption: Says when the user wants it to stop; then a step that takes too long is given up.
        callbacks: As the trainer's; one with `shows_progress = True` replaces the trainer's bar.
        **arguments: Everything else `SFTTrainer` takes.
    """

    def __init__(
        self,
        *,
        run: Run,
        section: TrainSection,
        course: Course,
        sources: Sequence[str],
        counts: Counts,
        interruption: Interruption,
        saves: CheckpointSaves,
        callbacks: Sequence[TrainerCallback],
        **arguments: Any,
    ):
        self.run = run
        self.course = course
        self.counts = counts
        self.interruption = interruption
        self.saves = saves
        self.section = section
        add_fused_head(without_wrapper(arguments["model"]))  # beside TRL's, for a loss that needs no wait
        self.spikes = SpikeWatch(run, section.on_spike)
        self.residual = LargestResidual() if section.log_activations else None
        self.pace = Pace()
        residual = [self.residual] if self.residual else []
        watchers = [interruption, self.pace, *residual, *callbacks]
        super().__init__(callbacks=watchers, **arguments)
        if not hasattr(self.model, "peft_config"):  # each weight is cast once: a cache only takes room
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self.remove_callback(PrinterCallback)
        if any(getattr(callback, "shows_progress", False) for callback in callbacks):
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # in a notebook it is another one
        keep_float32(self.model)
        self.tally = Tally(self.accelerator, sources)
        self._largest = 0.0
        self._micro_batches: list[tuple[torch.Tensor, Batch]] = []
        self.steps = ChunkedSteps(self, section) if ChunkedSteps.wanted(section) else None
        self.add_callback(TakeUp(self))  # last: what was logged before is cut to its place by then

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator, which shards as `train.parallel` says, on CPUs too."""
        with own_environment():
            super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            shard_anywhere(self.accelerator, self.args)
            self.is_fsdp_enabled = True
        self.has_engine = self.section.parallel == "zero2" and self.accelerator.num_processes > 1
        if self.has_engine:
            use_engine(self.accelerator, self.args)

    @property
    def tokens(self) -> int:
        """Tokens that the run has read in training."""
        return max(self.tally.tokens, int(self._total_train_tokens))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the optimizer, and keeps what its groups were: DeepSpeed drops those without parameters."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self._groups = [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Makes the recipe's schedule, with a first and a last step that count."""
        if self.has_engine:
            engine = self.accelerator.deepspeed_engine_wrapped.engine
            self.accelerator.deepspeed_engine_wrapped = EngineBackward(engine)
            self.optimizer: Any = EngineStep(self.optimizer, engine, self._groups)  # type: ignore[has-type]
        if self.lr_scheduler is None:  # type: ignore[has-type]
            self.lr_scheduler = make_scheduler(
                self.optimizer if optimizer is None else optimizer, self.section, self.course.tokens
            )
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """The weights that weight decay pulls towards 0: none of those that it would harm."""
        return [name for name in super().get_decay_parameter_names(model) if not is_undecayed(name)]

    def get_train_dataloader(self) -> Any:
        """One item for each optimizer step of the run: the micro-batches of this process."""
        return load_steps(self.train_dataset, self.data_collator, self.course, self.args)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Batch]], num_batches: int, device: torch.device
    ) -> tuple[list[list[Batch]], torch.Tensor | int | None]:
        """The micro-batches of the next optimizer step, and the trained tokens of all processes in it."""
        batches = next(epoch_iterator)
        return [batches], self._get_num_items_in_batch(batches, device)

    def floating_point_ops(self, inputs: list[Batch]) -> float:
        """Floating-point operations of an optimizer step."""
        return float(sum(super(Trainer, self).floating_point_ops(batch) for batch in inputs))

    def training_step(
        self, model: Any, inputs: list[Batch], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """All forwards and backwards of an optimizer step, whose losses and inputs are kept until its end."""
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs, 1):
            self.give_up_if_late()
            self.pace.count_rows(count_rows(batch), self.steps.parts if self.steps is not None else 1)
            with nullcontext() if number == len(inputs) else self._gradients_apart(model):
                loss = self.take_micro_batch(model, self.on_device(batch), num_items_in_batch)
            self._micro_batches.append((loss, batch))
            total = total + loss
            if number < len(inputs):  # as transformers tells of a micro-batch that ends no step
                self.control: TrainerControl = self.callback_handler.on_substep_end(
                    self.args,
                    self.state,
                    self.control,  # type: ignore[has-type]
                )
        return total

    @contextmanager
    def _gradients_apart(self, model: Any) -> Iterator[None]:
        """Adds gradients up in each process by itself: they meet in the last micro-batch of a step.

        DeepSpeed's engine, which has no place for whole gradients, lets them meet after each of them.
        """
        state = self.accelerator.gradient_state
        state._set_sync_gradients(False)
        try:
            with nullcontext() if self.has_engine else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    def on_device(self, batch: Batch) -> Batch:
        """The batch with its tensors on the device; from pinned memory, nobody waits for that."""
        return {
            name: value.to(self.args.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    def take_micro_batch(
        self, model: Any, batch: Batch, num_items: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch on the device; returns its share of the loss, detached."""
        step = super().training_step if self.steps is None else self.steps.training_step
        loss: torch.Tensor = step(model, batch, num_items)
        return loss.detach()

    def _get_grad_norm(self, model: Any, grad_norm: torch.Tensor | None = None) -> float:
        """Returns the gradient's norm; raises `TrainingError` before a NaN can reach the weights.

        Here, once in an optimizer step, the host waits for the device: for all that it must know of the step.
        """
        found = whole(torch.as_tensor(super()._get_grad_norm(model, grad_norm=grad_norm)))
        batches, self._micro_batches = self._micro_batches, []
        figures = self.tally.collect("train")
        own = torch.stack([loss for loss, _ in batches])
        numbers = [found[None], self.accelerator.reduce(own.sum()[None], reduction="mean"), own]
        if self.residual is not None:
            numbers.append(self.residual.collect(self.accelerator))
        if self.accelerator.num_processes > 1:  # a signal may reach them in different steps
            own = torch.tensor([float(self.interruption.requested)], device=figures.device)
            numbers.append(self.accelerator.reduce(own, reduction="sum"))
        read = torch.cat([x.double().to(figures.device) for x in (*numbers, figures.flatten())]).tolist()
        norm, step_loss = read[:2]
        losses, rest = read[2 : len(batches) + 2], read[len(batches) + 2 :]
        if not math.isfinite(step_loss):  # in some process, and each of them knows
            pairs = zip(losses, batches, strict=True)
            stop_on_nan(self, "loss", [inputs for loss, (_, inputs) in pairs if not math.isfinite(loss)])
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            micro_batches = [inputs for _, inputs in batches]
            bad = find_bad_gradients(self, model, micro_batches)
            stop_on_nan(self, "gradient", bad if any(gather_object([bool(bad)])) else micro_batches[-1:])
        if self.residual is not None:
            self._largest = max(self._largest, rest.pop(0))
        if self.accelerator.num_processes > 1:
            self.interruption.agreed = rest.pop(0) > 0
        origins = [(loss, inputs["where"]) for loss, (_, inputs) in zip(losses, batches, strict=True)]
        values = {"loss": step_loss, "gradient norm": norm}
        if self.spikes.skips(self.state.global_step + 1, values, origins):
            self._leave_out(model)
        width = self.tally.width
        self._take("train", [rest[start : start + width] for start in range(0, len(rest), width)])
        return float(norm)

    def _leave_out(self, model: Any) -> None:
        """Takes the gradients of a step away: an optimizer changes nothing that has none."""
        if self.accelerator.scaler is not None and not self.args.max_grad_norm:
            self.accelerator.unscale_gradients()  # clipping did it, and the scaler has to see it done
        for parameter in model.parameters():
            parameter.grad = None

    def _take(self, mode: str, rows: list[list[float]]) -> None:
        """Hands what micro-batches came to over to TRL's metrics."""
        if rows:
            before = self.tally.tokens
            for name, values in self.tally.metrics(mode, rows).items():
                self._metrics[mode][name] += values
            self.pace.count_tokens(self.tally.tokens - before)
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
            tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
            inputs = tensors | {"attention_mask": (inputs["seq_idx"] != PADDING).long()}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            self.give_up_if_late()
        if self.steps is not None and not model.training:
            return self.steps.evaluation_loss(model, inputs)
        (chunk,) = split(inputs, None)
        figures = Figures.of(model, chunk, sources=len(self.tally.sources))
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
        """Logs what TRL logs, over all processes, the pace, and the largest residual if it is asked for."""
        if "loss" in logs:
            logs.update(self.pace.collect(self.args.device, self.args.world_size))
            if self.residual is not None:
                logs["largest_residual"], self._largest = self._largest, 0.0
        self._take("eval", self.tally.collect("eval").tolist())
        if "train_runtime" in logs:
            self._sum_up(logs)
        super().log(logs, start_time)

    def _sum_up(self, logs: dict[str, float]) -> None:
        """Makes the last line of the trainer's tell of the whole run; its rates are of this session."""
        self.model.train()  # else TRL takes the line for one of an evaluation's
        step, seconds = self.state.global_step, logs["train_runtime"]
        self.counts.train_seconds = seconds
        before = sum(session.train_seconds for session in self.counts.earlier)
        logs["train_runtime"] = round(before + seconds, 4)
        logs["train_loss"] = mean_loss(self.state.log_history, float(self._tr_loss), step)
        taken = self.counts.steps(step)
        rows = int(self.course.starts[step] - self.course.starts[step - taken])
        for name, count in (("steps", taken), ("samples", rows)):
            logs.pop(f"train_{name}_per_second", None)
            if count:
                logs[f"train_{name}_per_second"] = round(count / seconds, 3)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trains for an epoch, or takes no step where all of them were taken before."""
        if self._is_over():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _is_over(self) -> bool:
        return (
            self._finish
            or self.state.global_step >= self.state.max_steps
            or any(
                callback.early_stopping_patience_counter >= callback.early_stopping_patience
                for callback in self.callback_handler.callbacks
                if isinstance(callback, EarlyStoppingCallback)
            )
        )
