"""TRL's trainer as this project uses it: configured from a recipe, and what ours adds. Owner of trl."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from accelerate.utils import AutocastKwargs, gather_object
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from mamba_sft.data.packing import PADDING
from mamba_sft.errors import TrainingError
from mamba_sft.model.adapter import adapter_tensors, keep_float32
from mamba_sft.model.full_weights import is_undecayed, load_trained, whole_weights, without_wrapper
from mamba_sft.model.shards import whole
from mamba_sft.planning.course import Course
from mamba_sft.planning.schedule import make_scheduler
from mamba_sft.recipe.fields import TrainSection
from mamba_sft.run import Run, write_atomically
from mamba_sft.training.callbacks import Interruption, StepGivenUp
from mamba_sft.training.counts import Counts, mean_loss, read_counts, write_counts
from mamba_sft.training.figures import Figures, Tally
from mamba_sft.training.fused_head import add_fused_head, shard_fused_head
from mamba_sft.training.largest_residual import LargestResidual
from mamba_sft.training.pace import Pace
from mamba_sft.training.random_state import (
    RandomState,
    current_random_state,
    restore_random_state,
    saved_by,
    start_anew,
)
from mamba_sft.training.resume_points import STATE, fault_of, find_good, rotate, write_whole
from mamba_sft.training.saving import CheckpointSaves, left_out_if_refused
from mamba_sft.training.sharding import (
    compute_as_ddp,
    load_whole_state,
    own_environment,
    shard_anywhere,
    whole_state,
)
from mamba_sft.training.spikes import SpikeWatch, named
from mamba_sft.training.step_loader import Batch, count_rows, load_steps
from mamba_sft.training.steps import ChunkedSteps
from mamba_sft.training.streaming import split
from mamba_sft.training.zero import EngineBackward, EngineStep, compute_mixed, use_engine

logger = logging.getLogger(__name__)


class Trainer(SFTTrainer):  # type: ignore[misc]
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
        self._resume_point: Path | None = None
        self._last_step: _LastStep | None = None
        self._after_evaluation: RandomState | None = None
        self.steps = ChunkedSteps(self, section) if ChunkedSteps.wanted(section) else None
        self.add_callback(_TakeUp(self))  # last: what was logged before is cut to its place by then

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

    def fit(self, resume_point: Path | None) -> None:
        """Trains to the end of the run, from its start or from a resume point, which may be the end.

        When the user stops it, the state after the last whole step has been saved, if there was one.

        Raises:
            OSError: A resume point cannot be written.
        """
        self._resume_point = resume_point
        try:
            self.train(resume_from_checkpoint=str(resume_point) if resume_point else None)
        except StepGivenUp:
            self._save_last_step()

    def give_up_if_late(self) -> None:
        """Raises `StepGivenUp` when the user stopped the run and the step, or the evaluation, takes too long.

        With several processes never: one that gives up leaves the others waiting.
        """
        if self.interruption.is_late and self.accelerator.num_processes == 1:
            raise StepGivenUp

    def _save_last_step(self) -> None:
        """Saves the state after the last whole step, with an evaluation that was given up marked as due."""
        last, final = self._last_step, self.run.checkpoints / f"checkpoint-{self.state.global_step}"
        if last is None or (last.saved and fault_of(final) is None):
            return
        self._tr_loss, self.current_flos = last.loss, last.operations
        restore_random_state(last.random, self.args.device)
        if self.steps is not None:
            self.steps.passed_on = last.carried
        self._save_checkpoint(self.model, None)

    def _keep_last_step(self, *, saved: bool) -> None:
        """Keeps what a step in progress changes before the optimizer's step, to go back to it."""
        self._last_step = _LastStep(
            random=current_random_state(self.args.device),
            loss=self._tr_loss.detach().clone(),
            operations=self.current_flos,
            carried=None if self.steps is None else self.steps.passed_on,
            saved=saved,
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        saves = self.control.should_save
        self.state.epoch = float(self.course.epochs[self.state.global_step - 1])
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._keep_last_step(saved=saves or (self._last_step is not None and self._last_step.saved))

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self._keep_last_step(saved=False)
        return super()._evaluate(*args, **kwargs)

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
                loss = self._take_micro_batch(model, self._on_device(batch), num_items_in_batch)
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

    def _on_device(self, batch: Batch) -> Batch:
        """The batch with its tensors on the device; from pinned memory, nobody waits for that."""
        return {
            name: value.to(self.args.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    def _take_micro_batch(
        self, model: Any, batch: Batch, num_items: torch.Tensor | int | None = None
    ) -> torch.Tensor:
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
            self._stop_on_nan("loss", [inputs for loss, (_, inputs) in pairs if not math.isfinite(loss)])
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            micro_batches = [inputs for _, inputs in batches]
            bad = self._find_bad_gradients(model, micro_batches)
            self._stop_on_nan("gradient", bad if any(gather_object([bool(bad)])) else micro_batches[-1:])
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
        return self.state.global_step >= self.state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves a resume point, if the disk takes it."""
        self.saves.save(self, self._write_resume_point)

    def _write_resume_point(self) -> None:
        """Saves a resume point, complete or not at all, and removes those that are too many.

        Raises:
            OSError: It cannot be written; what was there before still is.
        """
        final = self.run.checkpoints / f"checkpoint-{self.state.global_step}"
        by_us = self.is_world_process_zero()
        self.store_flos()
        best = self.run.checkpoints / f"checkpoint-{self.state.best_global_step}"
        if best == final or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        weights, optimizer = self._whole_weights(), self._whole_optimizer()  # all processes together
        unlogged = float(self.accelerator.reduce(self._tr_loss, reduction="mean"))

        def write(partial: Path) -> None:
            self._save_weights(str(partial), weights)
            self._save_optimizer(str(partial), optimizer)
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
            if by_us:
                self._save_record(partial, unlogged)

        write_whole(final, write, by_us=by_us, meet=self._meet)
        if by_us:
            kept = self.state.best_model_checkpoint
            best = Path(kept) if kept else final
            rotate(self.run, newest=final, best=best, limit=self.args.save_total_limit)

    def _meet(self, refusal: OSError | None) -> None:
        """Waits for the other processes; raises in all of them what a disk refused to one."""
        found = gather_object([refusal]) if self.accelerator.num_processes > 1 else [refusal]
        if refused := next((error for error in (refusal, *found) if error is not None), None):
            raise refused

    def _whole_weights(self) -> dict[str, torch.Tensor] | None:
        """What is trained, put together where no process has it as a whole."""
        if not self.is_fsdp_enabled:
            return None
        if hasattr(self.model, "peft_config"):
            return {name: whole(x.detach()).cpu() for name, x in adapter_tensors(self.model).items()}
        return whole_weights(self.model, torch.float32, keep=self.args.should_save)

    def _whole_optimizer(self) -> dict[str, Any] | None:
        """The optimizer's numbers, put together where no process has them as a whole."""
        sharded = self.is_fsdp_enabled or self.has_engine
        return whole_state(self.optimizer, keep=self.args.should_save) if sharded else None

    def _save_weights(self, directory: str, weights: dict[str, torch.Tensor] | None) -> None:
        if weights is None:
            self.save_model(directory, _internal_call=True)
        elif self.args.should_save:
            self._save(directory, state_dict=weights)

    def _save_optimizer(self, directory: str, state: dict[str, Any] | None) -> None:
        if state is None:
            self._save_optimizer_and_scheduler(directory)
        elif self.args.should_save:
            torch.save(state, Path(directory) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(directory) / SCHEDULER_NAME)

    def _save_record(self, directory: Path, unlogged_loss: float) -> None:
        """Writes what the run has come to: the trainer's state, and what transformers forgets of it."""
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(directory / STATE))
        write_counts(
            directory,
            self.counts.sessions(self.state.global_step, self.tokens),
            tokens=self.tokens,
            unlogged_loss=unlogged_loss,
            last_logged_step=self._globalstep_last_logged,
            unlogged_metrics=dict(self._metrics["train"]),
            largest_residual=self._largest,
            unlogged_pace=self.pace.unlogged,
            spikes=self.spikes.state,
        )

    def take_up(self) -> None:
        """Goes on counting where the resume point stopped, or begins at nothing."""
        if self.is_fsdp_enabled:
            shard_fused_head(without_wrapper(self.model))
            compute_as_ddp(self.accelerator, self.model)
        elif self.has_engine:
            compute_mixed(self.model, self.args)
        if self._resume_point is None:
            self.counts.begin(0, 0)
            return
        best = json.loads((self._resume_point / STATE).read_text(encoding="utf-8"))["best_model_checkpoint"]
        here = self.run.checkpoints / Path(best).name if best else None  # the run may have been moved
        self.state.best_model_checkpoint = str(here) if here is not None and here.is_dir() else None
        earlier, counts = read_counts(self._resume_point)
        told = [int(line["num_tokens"]) for line in self.state.log_history if "num_tokens" in line]
        self.tally.tokens = self._total_train_tokens = counts.get("tokens", max(told, default=0))
        self.counts.begin(self.state.global_step, self.tally.tokens, earlier)
        if counts:
            self._tr_loss = torch.tensor(counts["unlogged_loss"], device=self.args.device)
            self._globalstep_last_logged = counts["last_logged_step"]
            self._metrics["train"].update(counts["unlogged_metrics"])
            self._largest = counts["largest_residual"]
            self.pace.unlogged = counts["unlogged_pace"]
            self.spikes.state = counts["spikes"]
            self.spikes.write()
        if self.control.should_evaluate:
            self._evaluate_now(str(self._resume_point))

    def _evaluate_now(self, resume_point: str) -> None:
        """Makes up for the evaluation, and the saving after it, that was given up when the run stopped."""
        self._load_rng_state(resume_point)
        now = time.time()
        self._maybe_log_save_evaluate(self._tr_loss, None, self.model, None, self.state.epoch, None, now)
        self._after_evaluation = current_random_state(self.args.device)

    def _load_best_model(self) -> None:
        """Loads the weights of the lowest validation loss; stays with the last ones if those are damaged."""
        best = Path(self.state.best_model_checkpoint)
        if fault := fault_of(best):
            logger.warning("the best checkpoint `%s` is damaged: %s; the last weights are kept", best, fault)
            return
        if self.is_fsdp_enabled:
            load_trained(self.model, best)
        else:
            super()._load_best_model()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.steps is not None:
            self.steps.save(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._after_evaluation is not None:  # later than what the resume point holds
            restore_random_state(self._after_evaluation, self.args.device)
            return
        with _loading(checkpoint):
            if checkpoint is None or saved_by(Path(checkpoint)) == self.args.world_size:
                super()._load_rng_state(checkpoint)
            else:
                start_anew(
                    self.args.seed,
                    step=self.state.global_step,
                    process=self.args.process_index,
                    processes=self.args.world_size,
                )
            if self.steps is not None and checkpoint is not None:
                self.steps.load(Path(checkpoint), self.args.process_index)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _loading(resume_from_checkpoint):
            if self.is_fsdp_enabled:
                load_trained(self.model, resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _loading(checkpoint):
            if self.is_fsdp_enabled and checkpoint is not None:
                state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
                load_whole_state(self.optimizer, state)
                schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
                self.lr_scheduler.load_state_dict(schedule)
            else:
                super()._load_optimizer_and_scheduler(checkpoint)

    def _find_bad_gradients(self, model: Any, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Runs the micro-batches of a step again, as they were run; returns those with a bad gradient.

        Dropout draws anew, so it may be none of them this time. Every process runs all of its own, so that
        none waits for another. Sharded gradients are nobody's own: a bad one is in all processes.
        """
        if self.has_engine:  # it keeps what it has added up
            return [inputs for inputs in batches if self._has_bad_gradient(inputs)]
        bad = []
        for inputs in batches:
            model.zero_grad()
            with nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model):
                self._take_micro_batch(model, self._on_device(inputs))
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not torch.isfinite(whole(torch.nn.utils.get_total_norm(gradients))):
                bad.append(inputs)
        return bad

    def _has_bad_gradient(self, inputs: Batch) -> bool:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        loss = self.compute_loss(self.model, self._on_device(inputs))
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        norm = torch.nn.utils.get_total_norm([x for x in gradients if x is not None])
        return not bool(torch.isfinite(norm))

    def _stop_on_nan(self, what: str, bad: list[dict[str, Any]]) -> None:
        """Raises for the first bad micro-batch of any process; all of them come here, and name the same.

        Args:
            what: What is not a number.
            bad: The bad micro-batches of this process.
        """
        step = self.state.global_step + 1
        inputs = gather_object([_as_lists(inputs) for inputs in bad[:1]])[0]
        batch = self.run.nan_batch(step)
        if self.is_world_process_zero():
            with left_out_if_refused(batch):
                write_atomically(batch, json.dumps(inputs, ensure_ascii=False))
        text = self.processing_class.decode(inputs["input_ids"][0][:40])
        kept, _ = find_good(self.run)
        where = f"the last good checkpoint is `{kept}`" if kept else "no checkpoint had been saved yet"
        raise TrainingError(
            f"the {what} is not a number at step {step}; {where}\n"
            f"{named([row for rows in inputs['where'] for row in rows])}\n"
            f"the batch is in `{batch}`; its first row starts {text!r}",
            hint="look at that batch, lower `train.learning_rate`, or use bfloat16 instead of float16; "
            "then go on with `--resume`",
        )


def _as_lists(inputs: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch as JSON can hold it: its tensors, and where its rows came from."""
    tokens = {key: value.tolist() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    return tokens | {"where": [list(where) for where in inputs["where"]]}


@contextmanager
def _loading(resume_point: str | None) -> Iterator[None]:
    """Says that a resume point is no use: one without a manifest may be damaged, or hold what it must not."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, UnpicklingError):  # its own text recommends to load it all the same
            first = "a file of it holds more than numbers, and is not opened"
        raise TrainingError(
            f"`{resume_point}` cannot be loaded: {first}",
            hint="move that directory away; `--resume` then goes on from the one before",
        ) from error


class _LastStep(NamedTuple):
    """What was so after the last whole step, and may be otherwise in the middle of the next."""

    random: RandomState
    loss: torch.Tensor
    operations: float
    carried: Any
    saved: bool


class _TakeUp(TrainerCallback):
    """Has the trainer take up what a run had come to, once transformers has set all of it to nothing."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes it up."""
        self.trainer.take_up()
