"""The trainer's resume points: written whole, and gone on from as if the run had never stopped."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from mamba_sft.errors import TrainingError
from mamba_sft.model.adapter import adapter_tensors
from mamba_sft.model.full_weights import load_trained, without_wrapper
from mamba_sft.model.shards import whole_tensors
from mamba_sft.planning.course import Course
from mamba_sft.run import Run
from mamba_sft.training.callbacks import Interruption, StepGivenUp
from mamba_sft.training.counts import Counts, read_counts, write_counts
from mamba_sft.training.figures import Tally
from mamba_sft.training.fused_head import shard_fused_head
from mamba_sft.training.pace import Pace
from mamba_sft.training.random_state import (
    RandomState,
    current_random_state,
    restore_random_state,
    saved_by,
    start_anew,
)
from mamba_sft.training.resume_points import STATE, fault_of, rotate, write_whole
from mamba_sft.training.saving import CheckpointSaves
from mamba_sft.training.sharding import compute_as_ddp, load_whole_state, whole_state
from mamba_sft.training.spikes import SpikeWatch
from mamba_sft.training.steps import ChunkedSteps
from mamba_sft.training.zero import compute_mixed
from mamba_sft.wording import first_line

logger = logging.getLogger(__name__)


class ResumableTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, which wastes no step: stopped and resumed, it trains what it would have trained.

    What it keeps of a run beside the weights is made by `Trainer`, which inherits it.
    """

    run: Run
    course: Course
    counts: Counts
    interruption: Interruption
    saves: CheckpointSaves
    spikes: SpikeWatch
    pace: Pace
    tally: Tally
    steps: ChunkedSteps | None
    has_engine: bool
    _largest: float

    def __init__(self, **arguments: Any):
        self._resume_point: Path | None = None
        self._finish = False
        self._last_step: _LastStep | None = None
        self._after_evaluation: RandomState | None = None
        super().__init__(**arguments)

    def fit(self, resume_point: Path | None, *, finish: bool = False) -> None:
        """Trains to the end of the run, from its start or from a resume point, which may be the end.

        When the user stops it, the state after the last whole step has been saved, if there was one.

        Args:
            resume_point: Where to go on; None at nothing.
            finish: Take no step more: the run ends at its resume point.

        Raises:
            OSError: A resume point cannot be written.
        """
        self._resume_point, self._finish = resume_point, finish
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

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        saves = self.control.should_save
        self.state.epoch = float(self.course.epochs[self.state.global_step - 1])
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._keep_last_step(saved=saves or (self._last_step is not None and self._last_step.saved))

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self._keep_last_step(saved=False)
        return super()._evaluate(*args, **kwargs)

    def _keep_last_step(self, *, saved: bool) -> None:
        """Keeps what a step in progress changes before the optimizer's step, to go back to it."""
        self._last_step = _LastStep(
            random=current_random_state(self.args.device),
            loss=self._tr_loss.detach().clone(),
            operations=self.current_flos,
            carried=None if self.steps is None else self.steps.passed_on,
            saved=saved,
        )

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
        adapted = hasattr(self.model, "peft_config")
        trained = adapter_tensors(self.model) if adapted else self.model.state_dict()
        return whole_tensors(trained, keep=self.args.should_save)

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


@contextmanager
def _loading(resume_point: str | None) -> Iterator[None]:
    """Says that a resume point is no use: one without a manifest may be damaged, or hold what it must not."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first = first_line(error)
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


class TakeUp(TrainerCallback):
    """Has the trainer take up what a run had come to, once transformers has set all of it to nothing."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes it up."""
        self.trainer.take_up()
