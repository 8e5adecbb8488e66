"""What can be said of a run within a second: arguments, places, and what lies there. Imports no torch.

Loading torch, transformers and peft takes seconds. A typing mistake, a file that is not there or a run that
is finished already are told before; `preparation.prepare` goes on from here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from mamba_sft.data.sources import check_source
from mamba_sft.disk import check_writable
from mamba_sft.errors import TrainingError
from mamba_sft.evaluation.prompts import Prompt, load_prompts
from mamba_sft.model.chat_template import check_template_file
from mamba_sft.model.checkpoint import resolve_base
from mamba_sft.model.shape import find_shape
from mamba_sft.planning.storage import ANOTHER_PLACE
from mamba_sft.processes import is_first
from mamba_sft.recipe.builtin import find_path
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from mamba_sft.run_lock import refuse_if_held
from mamba_sft.training.overwriting import (
    contents_of,
    refuse_both,
    refuse_to_overwrite,
    refuse_to_read_what_goes,
)
from mamba_sft.training.resuming import find_resume_point
from mamba_sft.training.starting import find_start


@dataclass(frozen=True)
class Checked:
    """A recipe whose places are there, and what was found in them.

    Args:
        recipe: What to train; when resuming, with what the run settled of it.
        run: Where it will be written.
        resumed: Whether this goes on with what is in the run directory.
        resume_point: What training goes on from; None where it begins at nothing.
        finish: Whether the run ends at its resume point, with no step more.
        start: The adapter that training starts from, where `model.adapter` names one, or None.
        prompts: Sample prompts to answer before and after.
        seen: What was in the run's directory, by `contents_of`.
    """

    recipe: Recipe
    run: Run
    resumed: bool
    resume_point: Path | None
    finish: bool
    start: Path | None
    prompts: list[Prompt]
    seen: frozenset[tuple[str, int]]


def check_first(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    finish: bool = False,
    writes: bool = True,
) -> Checked:
    """Checks what the recipe and the file system alone can tell.

    `recipe.output_dir` is written to for a moment, to see that it can be, and is left as it was. Of a base on
    the hub that is not here yet, configuration and tokenizer are fetched.

    Args:
        recipe: What to train.
        resume: Go on from the newest complete checkpoint in `recipe.output_dir`.
        overwrite: Delete what is in `recipe.output_dir` when training starts.
        finish: With `resume`: end the run at that checkpoint.
        writes: Whether the run is written from this machine, by the first of all processes.

    Raises:
        MambaSFTError: A place is missing, of the wrong kind, held by another process, or would be lost.
    """
    refuse_both(resume=resume, overwrite=overwrite, finish=finish)
    run = Run(Path(recipe.output_dir))
    writes = writes and is_first()  # with several processes, it writes for all
    if writes:
        refuse_if_held(run.lock, run.path)
        check_writable(run.path, TrainingError, hint=ANOTHER_PLACE)
    seen = contents_of(run)
    recipe, resume_point = find_resume_point(run, recipe) if resume else (recipe, None)
    if finish and resume_point is None:
        raise TrainingError(
            f"`{run.path}` has no checkpoint yet that it could be finished from",
            hint="go on with it: `--resume` alone",
        )
    if not resume and writes:
        refuse_to_overwrite(run, overwrite=overwrite)
        if overwrite:
            refuse_to_read_what_goes(recipe)
    for source in recipe.data.sources:
        check_source(source)
    prompts = load_prompts(find_path(recipe.eval.prompts)) if recipe.eval.prompts else []
    resolve_base(recipe.model.base, recipe.model.revision, weights=False)
    check_template_file(recipe.chat.template)
    start = find_start(recipe)
    return Checked(
        recipe=recipe,
        run=run,
        resumed=resume,
        resume_point=resume_point,
        finish=finish,
        start=start,
        prompts=prompts,
        seen=seen,
    )


_SWITCHES = {"fsdp": "ACCELERATE_USE_FSDP", "zero2": "ACCELERATE_USE_DEEPSPEED"}
"""What `accelerate launch` sets where its own configuration asks for one of the modes."""
_FSDP = Version("2.13")
"""The first torch whose `fully_shard` takes norm and head as one group, called apart; 2.11 and 2.12 crash."""


def check_sharing(recipe: Recipe, processes: int) -> None:
    """Checks that this run's processes can share it as `train.parallel` says.

    Args:
        recipe: What is trained.
        processes: How many train together.

    Raises:
        TrainingError: They cannot, or were launched to do otherwise.
    """
    parallel = recipe.train.parallel
    for name, switch in _SWITCHES.items():
        if name != parallel and os.environ.get(switch, "").lower() == "true":
            raise TrainingError(
                f"`accelerate launch` was told to use {name}, and `train.parallel` is `{parallel}`",
                hint=f"set `train.parallel={name}`, or launch with `torchrun`",
            )
    if processes == 1:
        return
    if parallel == "zero2" and find_spec("deepspeed") is None:
        raise TrainingError(
            "`train.parallel: zero2` needs DeepSpeed, which is not installed",
            hint="pip install 'mamba-sft[deepspeed]', or set `train.parallel=ddp`",
        )
    if parallel == "fsdp" and Version(version("torch")) < _FSDP:
        raise TrainingError(
            f"`train.parallel: fsdp` needs torch 2.13, and this is {version('torch')}: the backward would "
            "crash, because weights are given back before it has used them",
            hint="install torch 2.13 or newer, or set `train.parallel=ddp`",
        )
    if parallel == "fsdp" and find_shape(recipe.model)[0].tied:
        raise TrainingError(
            f"`train.parallel: fsdp` cannot cut `{recipe.model.base}` in parts: its embeddings and its head "
            "are one matrix, with trained rows",
            hint="set `train.parallel=ddp`",
        )
