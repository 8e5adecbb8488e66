"""Everything that a run needs before its weights, with every check that needs none."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from mamba_sft.data.preparing import PreparedData, read_corpus
from mamba_sft.evaluation.prompts import Prompt
from mamba_sft.model.chat_template import TemplateSetup
from mamba_sft.planning.course import Course
from mamba_sft.planning.extent import RunLength
from mamba_sft.planning.fitting import refuse_what_cannot_fit, trained_values
from mamba_sft.planning.settling import settle
from mamba_sft.planning.storage import refuse_too_small_a_disk
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from mamba_sft.training.arguments import trainer_arguments
from mamba_sft.training.data_record import record_data, settle_changes
from mamba_sft.training.first_checks import Checked, check_first, check_sharing
from mamba_sft.training.resuming import processes_at_start
from mamba_sft.training.starting import check_vocabulary
from mamba_sft.wording import count_text

if TYPE_CHECKING:
    from trl import SFTConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """Everything a run needs before the weights.

    Args:
        recipe: What is trained, with what was settled of it.
        run: Where it will be written.
        setup: The tokenizer with its chat template and special tokens settled.
        data: The prepared rows and what was seen while preparing them.
        arguments: The trainer's own configuration.
        course: Which rows each optimizer step takes.
        prompts: Sample prompts to answer before and after.
        length: What the rows come to: the optimizer steps of the whole run, and whether they are too few.
        start: The adapter that training starts from, where `model.adapter` names one, or None.
        resumed: Whether this goes on with what is in the run directory.
        resume_point: What training goes on from; None where it begins at nothing.
        finish: Whether the run ends there.
        record: What the run keeps of its data.
        trained: Values that are trained.
        seen: What was in the run's directory, by `contents_of`.
    """

    recipe: Recipe
    run: Run
    setup: TemplateSetup
    data: PreparedData
    arguments: SFTConfig
    course: Course
    prompts: list[Prompt]
    length: RunLength
    start: Path | None
    resumed: bool
    resume_point: Path | None
    finish: bool
    record: dict[str, Any]
    trained: int
    seen: frozenset[tuple[str, int]]

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.length.steps


def prepare(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changed_data: bool = False,
    finish: bool = False,
) -> Preparation:
    """Does everything that comes before the weights: reads and renders the data, checks every setting.

    Args:
        recipe: What to train.
        resume: Go on from the newest complete checkpoint in `recipe.output_dir`.
        overwrite: Delete what is in `recipe.output_dir` when training starts.
        allow_changed_data: Resume with other rows, or other prompts, than the run was started with.
        finish: With `resume`: end the run at that checkpoint.

    Raises:
        MambaSFTError: Anything in recipe, base, data, memory or output directory that would make it fail.
    """
    checked = check_first(recipe, resume=resume, overwrite=overwrite, finish=finish)
    return prepare_checked(checked, allow_changed_data=allow_changed_data)


def prepare_checked(checked: Checked, *, allow_changed_data: bool = False) -> Preparation:
    """Does what `prepare` does after the first checks.

    Args:
        checked: From `check_first`.
        allow_changed_data: Resume with other rows, or other prompts, than the run was started with.
    """
    recipe, run = checked.recipe, checked.run
    processes = PartialState(cpu=not torch.cuda.is_available())  # as the trainer asks; else each is the first
    check_sharing(recipe, processes.num_processes)
    setup, data = read_corpus(recipe)
    if checked.start is not None:
        check_vocabulary(checked.start, setup)
    settled = settle(recipe, data, processes=_processes_at_start(checked, processes.num_processes))
    recipe, data, course, length = settled.recipe, settled.data, settled.course, settled.length
    longest = int(settled.lengths.max(initial=0))
    refuse_what_cannot_fit(
        recipe,
        longest=longest,
        trained_rows=len(setup.trained_token_ids),
        processes=processes.num_processes,
    )
    trained = trained_values(recipe, trained_rows=len(setup.trained_token_ids))
    validates = data.validation_rows is not None
    if processes.is_main_process:
        refuse_too_small_a_disk(
            run, recipe, trained, steps=length.steps, validates=validates, resumes=checked.resumed
        )
    arguments = trainer_arguments(
        recipe, run, steps=course.steps, has_validation=validates, processes=processes.num_processes
    )
    record = record_data(recipe, data, setup.tokenizer, length, checked.prompts)
    if settled.mixture is not None:
        record["mixture"] = settled.mixture.to_dict()
    if checked.resumed:
        record["changes"] = settle_changes(run, record, checked.resume_point, allowed=allow_changed_data)
    return Preparation(
        recipe=recipe,
        run=run,
        setup=setup,
        data=data,
        arguments=arguments,
        course=course,
        prompts=checked.prompts,
        length=length,
        start=checked.start,
        resumed=checked.resumed,
        resume_point=checked.resume_point,
        finish=checked.finish,
        record=record,
        trained=trained,
        seen=checked.seen,
    )


def _processes_at_start(checked: Checked, now: int) -> int:
    """With how many processes the run was started: a run that goes on keeps the rows of its steps."""
    found = (processes_at_start(checked.run) if checked.resumed else None) or now
    if found != now:
        logger.info(
            "the run was started with %s and goes on with %d: each step reads the same rows",
            count_text(found, "process", "processes"), now,
        )  # fmt: skip
    return found
