"""From a recipe to a run: data, model, adapter and trainer, put together in the order they are needed.

Everything that can be checked without weights is checked first (`prepare`, which `--dry-run` stops after).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from mamba_sft.data.packing import Collator
from mamba_sft.data.preparing import PreparedData, read_corpus
from mamba_sft.data.rows import row_lengths
from mamba_sft.errors import TrainingError
from mamba_sft.evaluation.prompts import Prompt, load_prompts, pair, write_samples
from mamba_sft.evaluation.report import write_report
from mamba_sft.inference.generation import answers, stop_token_ids
from mamba_sft.inference.sampling import Sampling
from mamba_sft.kernels import automatic
from mamba_sft.model.adapter import attach_adapter, load_weights, save_adapter, trained_digest
from mamba_sft.model.chat_template import TemplateSetup, render
from mamba_sft.model.loading import apply_setup, load_model, recommend_sampling
from mamba_sft.planning.environment import describe_environment
from mamba_sft.planning.extent import RunLength, run_length, with_accumulation
from mamba_sft.planning.fitting import refuse_what_cannot_fit
from mamba_sft.recipe.builtin import find_path
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run, atomic_directory, write_atomically
from mamba_sft.run_lock import refuse_if_held
from mamba_sft.training.activations import keep_activations
from mamba_sft.training.callbacks import AdapterWatch, Interruption, MetricsLog
from mamba_sft.training.data_record import record_data, settle_changes
from mamba_sft.training.overwriting import (
    contents_of,
    refuse_both,
    refuse_to_overwrite,
    refuse_to_read_what_goes,
    sole_writer,
    start_anew,
)
from mamba_sft.training.resuming import find_resume_point, newest_resume_point
from mamba_sft.training.starting import check_base, find_start
from mamba_sft.training.trainer import Trainer, trainer_arguments
from mamba_sft.wording import count_text

if TYPE_CHECKING:
    from trl import SFTConfig

logger = logging.getLogger(__name__)

ANSWERED_TOGETHER = 32
"""Sample prompts answered in one batch."""
_CAUSES = ("learning_rate", "grad_norm")


class RunInterruptedError(TrainingError):
    """The user stopped the run; its newest checkpoint is complete."""

    exit_code = 130


@dataclass(frozen=True)
class Preparation:
    """Everything a run needs before the weights.

    Args:
        run: Where it will be written.
        setup: The tokenizer with its chat template and special tokens settled.
        data: The prepared rows and what was seen while preparing them.
        arguments: The trainer's own configuration.
        prompts: Sample prompts to answer before and after.
        length: What the rows come to: the optimizer steps of the whole run, and whether they are too few.
        start: The adapter that training starts from, where `model.adapter` names one, or None.
        resume_point: The checkpoint to go on from, or None.
        record: What the run keeps of its data.
        seen: What was in the run's directory, by `contents_of`.
    """

    recipe: Recipe
    run: Run
    setup: TemplateSetup
    data: PreparedData
    arguments: SFTConfig
    prompts: list[Prompt]
    length: RunLength
    start: Path | None
    resume_point: Path | None
    record: dict[str, Any]
    seen: frozenset[tuple[str, int]]

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.length.steps


def prepare(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, allow_changed_data: bool = False
) -> Preparation:
    """Does everything that comes before the weights: reads and renders the data, checks every setting.

    Writes nothing: `recipe.output_dir` is as it was until the run starts.

    Args:
        recipe: What to train.
        resume: Go on from the newest complete checkpoint in `recipe.output_dir`.
        overwrite: Delete what is in `recipe.output_dir` when training starts.
        allow_changed_data: Resume with other rows, or other prompts, than the run was started with.

    Raises:
        MambaSFTError: Anything in recipe, base, data, memory or output directory that would make it fail.
    """
    refuse_both(resume=resume, overwrite=overwrite)
    run = Run(Path(recipe.output_dir))
    if PartialState().is_main_process:
        refuse_if_held(run.lock, run.path)
    seen = contents_of(run)
    recipe, resume_point = find_resume_point(run, recipe) if resume else (recipe, None)
    if not resume and PartialState().is_main_process:
        refuse_to_overwrite(run, overwrite=overwrite)
        if overwrite:
            refuse_to_read_what_goes(recipe)
    setup, data = read_corpus(recipe)
    start = find_start(recipe, setup)
    lengths = row_lengths(data.train_rows)
    length = run_length(
        recipe, rows=len(lengths), tokens=int(lengths.sum()), processes=PartialState().num_processes
    )
    recipe, longest = with_accumulation(recipe, length.accumulation), int(lengths.max(initial=0))
    refuse_what_cannot_fit(recipe, longest=longest, trained_rows=len(setup.trained_token_ids))
    arguments = trainer_arguments(recipe, run, has_validation=data.validation_rows is not None)
    prompts = load_prompts(find_path(recipe.eval.prompts)) if recipe.eval.prompts else []
    record = record_data(recipe, data, setup.tokenizer, length, prompts)
    if resume_point is not None:
        record["changes"] = settle_changes(run, record, resume_point, allowed=allow_changed_data)
    return Preparation(
        recipe=recipe,
        run=run,
        setup=setup,
        data=data,
        arguments=arguments,
        prompts=prompts,
        length=length,
        start=start,
        resume_point=resume_point,
        record=record,
        seen=seen,
    )


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changed_data: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Trains `recipe` and returns the finished run.

    Args:
        recipe: What to train.
        resume: Go on exactly where the newest complete checkpoint of `recipe.output_dir` stopped.
        overwrite: Replace an earlier run in `recipe.output_dir`.
        allow_changed_data: Resume with other rows, or other prompts, than the run was started with.
        callbacks: More trainer callbacks. When one of them shows progress, the trainer's own bar is off.

    Raises:
        MambaSFTError: The run cannot start, diverged, or holds an adapter that cannot learn.
        RunInterruptedError: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    preparation = prepare(recipe, resume=resume, overwrite=overwrite, allow_changed_data=allow_changed_data)
    return train_prepared(preparation, callbacks=callbacks)


def train_prepared(preparation: Preparation, *, callbacks: Sequence[TrainerCallback] = ()) -> Run:
    """Loads the weights of a prepared run, trains, and writes the run directory. See `train`."""
    main = preparation.arguments.process_index == 0  # with several processes, it writes for all
    with sole_writer(preparation.run, preparation.seen) if main else nullcontext():
        return _train(preparation, callbacks)


def _train(preparation: Preparation, callbacks: Sequence[TrainerCallback]) -> Run:
    recipe, run = preparation.recipe, preparation.run
    started = time.time()
    logger.info("loading `%s`", recipe.model.base)
    if preparation.start is not None:
        check_base(preparation.start, recipe.model)
    set_seed(recipe.seed)  # before the adapter draws its first weights
    model = load_model(recipe.model)
    logger.info("scan and convolution: backend %s", _backend(recipe.model.kernels, model))
    apply_setup(model, preparation.setup)
    recommend_sampling(model, recipe.chat)
    model = attach_adapter(model, recipe.adapter, trained_token_ids=preparation.setup.trained_token_ids)
    keep_activations(model, recipe.train.checkpointing)
    _start_directory(preparation)  # an earlier run goes only when this one has all it needs
    interruption = Interruption()
    trainer = _build_trainer(preparation, model, interruption, callbacks)
    if preparation.start is not None:  # not before: TRL rounds what is trained when the base is quantized
        load_weights(trainer.model, preparation.start)
    start = trained_digest(trainer.model)
    before = _answer(preparation, trainer, "before")
    _run_trainer(trainer, preparation.resume_point, interruption)
    _refuse_unchanged(trainer, start)
    after = _answer(preparation, trainer, "after")
    if trainer.is_world_process_zero():
        _save(preparation, trainer, before, after, time.time() - started)
    trainer.accelerator.wait_for_everyone()
    return run


def _backend(wanted: str, model: Any) -> str:
    return automatic(model.device.type, model.dtype)[0] if wanted == "auto" else wanted


def _start_directory(preparation: Preparation) -> None:
    with preparation.arguments.main_process_first():
        if preparation.arguments.process_index == 0:
            _clear(preparation)


def _clear(preparation: Preparation) -> None:
    run = preparation.run
    if preparation.resume_point is None:
        start_anew(run)
    write_atomically(run.recipe, preparation.recipe.to_yaml())
    write_atomically(run.data, json.dumps(preparation.record, indent=2, ensure_ascii=False) + "\n")
    if preparation.data.rejected:
        write_atomically(run.rejected, preparation.data.rejected.read_text(encoding="utf-8"))
    write_atomically(run.environment, json.dumps(describe_environment(), indent=2) + "\n")


def _build_trainer(
    preparation: Preparation, model: Any, interruption: Interruption, callbacks: Sequence[TrainerCallback]
) -> Trainer:
    recipe, run = preparation.recipe, preparation.run
    watchers: list[TrainerCallback] = [MetricsLog(run.metrics), AdapterWatch(), interruption, *callbacks]
    if recipe.eval.early_stopping_patience and preparation.data.validation_rows is not None:
        watchers.append(EarlyStoppingCallback(recipe.eval.early_stopping_patience))
    return Trainer(
        run=run,
        section=recipe.train,
        model=model,
        args=preparation.arguments,
        data_collator=Collator(preparation.setup.tokenizer.pad_token_id),
        train_dataset=preparation.data.train_rows,
        eval_dataset=preparation.data.validation_rows,
        processing_class=preparation.setup.tokenizer,
        callbacks=watchers,
    )


def _run_trainer(trainer: Trainer, resume_point: Path | None, interruption: Interruption) -> None:
    with interruption.listening(), _out_of_memory_explained():
        try:
            trainer.train(resume_from_checkpoint=str(resume_point) if resume_point else None)
        except KeyboardInterrupt:
            raise _interrupted(trainer) from None
    if interruption.requested:
        raise _interrupted(trainer)


def _interrupted(trainer: Trainer) -> RunInterruptedError:
    kept = newest_resume_point(trainer.run)
    if kept is None:
        return RunInterruptedError(
            f"stopped at step {trainer.state.global_step}, before the first checkpoint"
        )
    return RunInterruptedError(
        f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; saved `{kept}`",
        hint=f"continue with `mamba-sft train {trainer.run.recipe} --resume`",
    )


def _refuse_unchanged(trainer: Trainer, start: str) -> None:
    """Raises `TrainingError` when what was trained is what it was: such a run must not look finished."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trained_digest(trainer.model) != start:
        return
    log = trainer.state.log_history
    rate, norm = (max((line.get(name, 0.0) for line in log), default=0.0) for name in _CAUSES)
    steps = count_text(trainer.state.global_step, "step")
    raise TrainingError(
        f"nothing was learned: after {steps} the adapter is what it was at the start, to the last bit",
        hint=f"the learning rate reached {rate:.3g} and the norm of the gradient {norm:.3g}, see "
        f"`{trainer.run.metrics}`; raise `train.learning_rate`, and start anew with `--overwrite`",
    )


@contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU is out of memory: {error}",
            hint="set `train.auto_batch: true` or `train.stream_tokens: 1024`, lower "
            "`train.per_device_train_batch_size` or `data.max_length`, or use nf4",
        ) from error


def _answer(preparation: Preparation, trainer: Trainer, when: str) -> list[str]:
    prompts, recipe = preparation.prompts, preparation.recipe
    if not prompts or not trainer.is_world_process_zero():
        return []
    logger.info("answering %d sample prompts %s training", len(prompts), when)
    tokenizer = preparation.setup.tokenizer
    chats = [prompt.messages(recipe.chat.system) for prompt in prompts]
    given = answers(
        trainer.model,
        tokenizer,
        [render(tokenizer, chat, add_generation_prompt=True)[0] for chat in chats],
        sampling=Sampling(max_new_tokens=recipe.eval.max_new_tokens),
        stop_ids=stop_token_ids(trainer.model, tokenizer),
        batch_size=ANSWERED_TOGETHER,
    )
    return [answer.text for answer in given]


def _save(
    preparation: Preparation, trainer: Trainer, before: list[str], after: list[str], seconds: float
) -> None:
    run, recipe = preparation.run, preparation.recipe
    with atomic_directory(run.adapter) as partial:
        save_adapter(trainer.model, partial, section=recipe.model, setup=preparation.setup)
    if before:
        write_samples(run.samples, pair(preparation.prompts, before, after))
    facts = describe_environment() | {
        "seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
        "tokens": int(max((entry.get("num_tokens", 0) for entry in trainer.state.log_history), default=0)),
        "best_validation_loss": trainer.state.best_metric,
    }
    write_atomically(run.environment, json.dumps(facts, indent=2) + "\n")
    write_report(run)
