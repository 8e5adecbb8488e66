"""From a recipe to a run: data, model, adapter and trainer, put together in the order they are needed.

Everything that can be checked without weights is checked first (`preparation`; `--dry-run` stops after it).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from mamba_sft.data.packing import Collator
from mamba_sft.disk import disk_errors_explained
from mamba_sft.errors import TrainingError
from mamba_sft.evaluation.prompts import pair, write_samples
from mamba_sft.kernels import automatic
from mamba_sft.model.adapter import adapter_weights, attach_adapter, load_weights, trained_digest
from mamba_sft.model.checkpoint import base_fingerprint, resolve_base
from mamba_sft.model.full_weights import in_float32, save_trained, train_all_weights
from mamba_sft.model.loading import apply_setup, load_model, recommend_sampling, resolve_dtype
from mamba_sft.model.shards import held_bytes, is_sharded, whole_tensors
from mamba_sft.planning.environment import describe_call, describe_device, describe_environment
from mamba_sft.planning.storage import ANOTHER_PLACE, FILES, checkpoint_sizes, result_bytes
from mamba_sft.recipe.mixtures import source_ids
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run, atomic_directory, write_atomically
from mamba_sft.training.activations import keep_activations
from mamba_sft.training.callbacks import AdapterWatch, Interruption, MetricsLog
from mamba_sft.training.counts import Counts
from mamba_sft.training.keeping import Ask, save_surely
from mamba_sft.training.live_report import LiveReport
from mamba_sft.training.overwriting import sole_writer, start_anew
from mamba_sft.training.preparation import Preparation, prepare
from mamba_sft.training.resume_points import step_in_name, sweep
from mamba_sft.training.resuming import newest_resume_point
from mamba_sft.training.sample_answers import answers_after, answers_before, watch_answers
from mamba_sft.training.saving import CheckpointSaves, file_errors_explained, left_out_if_refused
from mamba_sft.training.starting import check_base
from mamba_sft.training.trainer import Trainer
from mamba_sft.training.zero import full_gradient
from mamba_sft.wording import count_text

logger = logging.getLogger(__name__)

_CAUSES = ("learning_rate", "grad_norm")


class RunInterruptedError(TrainingError):
    """The user stopped the run, and can go on with it."""

    exit_code = 130
    heading = "stopped"


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changed_data: bool = False,
    finish: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Trains `recipe` and returns the finished run.

    Args:
        recipe: What to train.
        resume: Go on exactly where the newest complete checkpoint of `recipe.output_dir` stopped.
        overwrite: Replace an earlier run in `recipe.output_dir`.
        allow_changed_data: Resume with other rows, or other prompts, than the run was started with.
        finish: With `resume`: take no step more, and finish the run at that checkpoint.
        callbacks: More trainer callbacks. When one of them shows progress, the trainer's own bar is off.

    Raises:
        MambaSFTError: The run cannot start, diverged, or trains weights that cannot learn.
        RunInterruptedError: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    preparation = prepare(
        recipe, resume=resume, overwrite=overwrite, allow_changed_data=allow_changed_data, finish=finish
    )
    return train_prepared(preparation, callbacks=callbacks)


def train_prepared(
    preparation: Preparation, *, callbacks: Sequence[TrainerCallback] = (), ask: Ask | None = None
) -> Run:
    """Loads the weights of a prepared run, trains, and writes the run directory. See `train`.

    Args:
        preparation: From `prepare`.
        callbacks: More trainer callbacks.
        ask: Asks the user where an adapter is to go that cannot be saved. Without, it is tried again for a
            while.
    """
    interruption = Interruption(preparation.recipe.train.grace_seconds)
    main = preparation.arguments.process_index == 0  # with several processes, it writes for all
    writes = sole_writer(preparation.run, preparation.seen) if main else nullcontext()
    with interruption.listening(), writes:
        try:
            return _train(preparation, interruption, callbacks, ask)
        except KeyboardInterrupt:
            raise _interrupted(preparation.run, interruption) from None


def _train(
    preparation: Preparation,
    interruption: Interruption,
    callbacks: Sequence[TrainerCallback],
    ask: Ask | None,
) -> Run:
    recipe, run = preparation.recipe, preparation.run
    counts = Counts(describe_device()["name"])
    _say_what_is_left(preparation)
    trainer = load_trainer(preparation, counts, interruption, callbacks)
    start = trained_digest(trainer.model)
    before = answers_before(preparation, trainer)
    watch_answers(preparation, trainer, before)
    report = LiveReport(run, preparation.max_steps, writes=trainer.is_world_process_zero())
    trainer.add_callback(report)  # the last one: it tells what the others have written
    explained = file_errors_explained(run, lambda: trainer.state.global_step)
    with report.telling_the_end():
        with explained, _out_of_memory_explained(recipe):
            trainer.fit(preparation.resume_point, finish=preparation.finish)
        if interruption.ends_the_run:
            raise _interrupted(run, interruption)
        interruption.where = "stopped after training, before all was written"
        _refuse_unchanged(trainer, start, recipe.trains)
        after = answers_after(preparation, trainer)
        weights = _whole_weights(preparation, trainer)
        held = gather_object([held_bytes(trainer.model)])
        if trainer.is_world_process_zero():
            _save(preparation, trainer, Result(weights, before, after, held), ask)
    report.finish()
    trainer.accelerator.wait_for_everyone()
    return run


def load_trainer(
    preparation: Preparation,
    counts: Counts,
    interruption: Interruption,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Loads the weights of a prepared run, begins its directory, and returns its trainer, ready to start.

    Args:
        preparation: From `prepare`.
        counts: Takes the time and tokens of this session.
        interruption: Says when the user wants it to stop.
        callbacks: More trainer callbacks.
    """
    recipe = preparation.recipe
    logger.info("loading `%s`", recipe.model.base)
    if preparation.start is not None:
        check_base(preparation.start, recipe.model)
    _settle_base(preparation)
    set_seed(recipe.seed)  # before the adapter draws its first weights
    section = recipe.model if recipe.adapter is not None else in_float32(recipe.model)
    model = load_model(section, to_shard=bool(preparation.arguments.fsdp))
    logger.info("scan and convolution: backend %s", _backend(recipe.model.kernels, model))
    apply_setup(model, preparation.setup)
    recommend_sampling(model, recipe.chat)
    if recipe.adapter is None:
        model = train_all_weights(model)
    else:
        model = attach_adapter(model, recipe.adapter, trained_token_ids=preparation.setup.trained_token_ids)
    keep_activations(model, recipe.train.checkpointing)
    _start_directory(preparation)  # an earlier run goes only when this one has all it needs
    trainer = _build_trainer(preparation, model, counts, interruption, callbacks)
    if preparation.start is not None:  # not before: TRL rounds what is trained when the base is quantized
        load_weights(trainer.model, preparation.start)
    return trainer


def _whole_weights(preparation: Preparation, trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """What was trained, for the process that writes it; None where each process has it anyway."""
    if preparation.recipe.adapter is not None:
        return adapter_weights(trainer.model)
    if not is_sharded(trainer.model):
        return None
    dtype = resolve_dtype(preparation.recipe.model, trainer.model.device)
    return whole_tensors(trainer.model.state_dict(), keep=trainer.is_world_process_zero(), dtype=dtype)


def _settle_base(preparation: Preparation) -> None:
    """Keeps the fingerprint of the base, which has to be the same when the run goes on.

    Raises:
        TrainingError: It is another.
    """
    section, run = preparation.recipe.model, preparation.run
    now = base_fingerprint(resolve_base(section.base, section.revision))
    before = run.read_data().get("base", now) if preparation.resumed else now
    if before != now:
        raise TrainingError(
            f"`{run.path}` was started on another base than what is in `{section.base}` now",
            hint="bring that base back, or start anew with `--overwrite`",
        )
    preparation.record["base"] = now


def _backend(wanted: str, model: Any) -> str:
    return automatic(model.device.type, model.dtype)[0] if wanted == "auto" else wanted


def _start_directory(preparation: Preparation) -> None:
    need = "the run cannot begin"
    with preparation.arguments.main_process_first():
        if preparation.arguments.process_index == 0:
            with disk_errors_explained(preparation.run.path, need, TrainingError, hint=ANOTHER_PLACE):
                _clear(preparation)


def _clear(preparation: Preparation) -> None:
    run = preparation.run
    if preparation.resumed:
        sweep(run)
    else:
        start_anew(run)
    write_atomically(run.recipe, preparation.recipe.to_yaml())
    write_atomically(run.data, json.dumps(preparation.record, indent=2, ensure_ascii=False) + "\n")
    if preparation.data.rejected:
        write_atomically(run.rejected, preparation.data.rejected.read_text(encoding="utf-8"))
    write_atomically(run.environment, json.dumps(_describe(preparation), indent=2) + "\n")


def _describe(preparation: Preparation) -> dict[str, Any]:
    """What the run runs on, for `environment.json`."""
    together = {
        "parallel": preparation.recipe.train.parallel,
        "processes": preparation.arguments.world_size,
    }
    return describe_environment() | describe_call() | together


def _build_trainer(
    preparation: Preparation,
    model: Any,
    counts: Counts,
    interruption: Interruption,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    recipe, run = preparation.recipe, preparation.run
    engine = recipe.train.parallel == "zero2" and preparation.arguments.world_size > 1
    watch = AdapterWatch(full_gradient) if engine else AdapterWatch()
    watchers: list[TrainerCallback] = [MetricsLog(run.metrics_file), watch, *callbacks]
    if recipe.eval.early_stopping_patience and preparation.data.validation_rows is not None:
        watchers.append(EarlyStoppingCallback(recipe.eval.early_stopping_patience))
    return Trainer(
        run=run,
        section=recipe.train,
        course=preparation.course,
        sources=source_ids(recipe.data) if len(recipe.data.sources) > 1 else [],
        saves=CheckpointSaves(run, checkpoint_sizes(preparation.trained, recipe.train.optim)),
        counts=counts,
        interruption=interruption,
        model=model,
        args=preparation.arguments,
        data_collator=Collator(preparation.setup.tokenizer.pad_token_id),
        train_dataset=preparation.data.train_rows,
        eval_dataset=preparation.data.validation_rows,
        processing_class=preparation.setup.tokenizer,
        callbacks=watchers,
    )


def _interrupted(run: Run, interruption: Interruption) -> RunInterruptedError:
    kept = newest_resume_point(run)
    again = f"continue with `{run.resume_command}`"
    if kept is not None:
        told = "saved" if step_in_name(kept) == interruption.step else "the newest checkpoint is"
        return RunInterruptedError(
            f"{interruption.where}; {told} `{kept}`",
            hint=f"{again}, or finish the run here with `{run.resume_command} --finish`",
        )
    begun = run.recipe.is_file()  # else it is as if nothing had been started
    return RunInterruptedError(f"{interruption.where}; no checkpoint yet", hint=again if begun else None)


def _refuse_unchanged(trainer: Trainer, start: str, trained: str) -> None:
    """Raises `TrainingError` when what was trained is what it was: such a run must not look finished."""
    if trained_digest(trainer.model) != start:
        return
    log = trainer.state.log_history
    rate, norm = (max((line.get(name, 0.0) for line in log), default=0.0) for name in _CAUSES)
    steps = count_text(trainer.state.global_step, "step")
    raise TrainingError(
        f"nothing was learned: after {steps} the {trained} is what it was at the start, to the last bit",
        hint=f"the learning rate reached {rate:.3g} and the norm of the gradient {norm:.3g}, see "
        f"`{trainer.run.metrics_file}`; raise `train.learning_rate`, and start anew with `--overwrite`",
    )


@contextmanager
def _out_of_memory_explained(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU is out of memory: {error}",
            hint="set `train.auto_batch: true` or `train.stream_tokens: 1024`, lower "
            "`train.per_device_train_batch_size` or `data.max_length`, or use "
            + ("nf4" if recipe.trains == "adapter" else "LoRA: `adapter={}`"),
        ) from error


def _say_what_is_left(preparation: Preparation) -> None:
    if not preparation.resumed:
        return
    point, steps = preparation.resume_point, preparation.max_steps
    if point is None:
        logger.info("going on from step 0 of %d: the run ended before its first checkpoint", steps)
    elif step_in_name(point) < steps and preparation.finish:
        logger.info("finishing the run at step %d of %d", step_in_name(point), steps)
    elif step_in_name(point) < steps:
        logger.info("going on from step %d of %d", step_in_name(point), steps)
    else:
        logger.info("going on from step %d of %d: training is done, the rest is left", steps, steps)


@dataclass(frozen=True)
class Result:
    """What training came to.

    Args:
        weights: From `_whole_weights`.
        before: Answers to the sample prompts before training.
        after: Answers after it.
        held: Bytes of the model's parameters in each process.
    """

    weights: dict[str, torch.Tensor] | None
    before: list[str]
    after: list[str]
    held: list[int]


def _save(preparation: Preparation, trainer: Trainer, result: Result, ask: Ask | None) -> None:
    run, recipe = preparation.run, preparation.recipe
    sessions = trainer.counts.sessions(trainer.state.global_step, trainer.tokens)

    def write(place: Path) -> None:
        with atomic_directory(place) as partial:
            save_trained(
                trainer.model,
                partial,
                section=recipe.model,
                setup=preparation.setup,
                weights=result.weights,
            )

    nbytes = result_bytes(recipe, preparation.trained) + FILES
    place = run.path / recipe.trains
    saved = save_surely(write, run, nbytes, ask, what=recipe.trains)
    if result.before:
        with left_out_if_refused(run.samples_file):
            write_samples(run.samples_file, pair(preparation.prompts, result.before, result.after))
    facts = _describe(preparation) | {
        "seconds": round(sum(session.seconds for session in sessions), 1),
        "steps": trainer.state.global_step,
        "tokens": trainer.tokens,
        "held_bytes": result.held,
        "best_validation_loss": trainer.state.best_metric,
        "sessions": [asdict(session) for session in sessions],
    }
    with left_out_if_refused(run.environment):
        write_atomically(run.environment, json.dumps(facts, indent=2) + "\n")
    with left_out_if_refused(run.answers_before):
        run.answers_before.unlink(missing_ok=True)
    if saved != place:
        raise TrainingError(
            f"the {recipe.trains} is in `{saved}`; its run, `{run.path}`, is not finished without it",
            hint=f"when there is room: `mv {quote(str(saved))} {quote(str(place))}`",
        )
