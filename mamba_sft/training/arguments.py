"""TRL's configuration of a run, every field of which comes from the recipe."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from trl import SFTConfig

from mamba_sft.errors import RecipeError, TrainingError
from mamba_sft.model.loading import resolve_dtype
from mamba_sft.planning.schedule import TRAINER_NAMES
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from mamba_sft.training.sharding import SETTINGS, round_nothing


def trainer_arguments(
    recipe: Recipe, run: Run, *, steps: int, has_validation: bool, processes: int = 1
) -> SFTConfig:
    """Returns TRL's configuration of a run.

    To the trainer a run is one epoch of `steps` batches: its loader hands over all rows of an optimizer step,
    which the step itself cuts into micro-batches.

    Args:
        recipe: What is trained.
        run: Where it is written.
        steps: Optimizer steps of the run.
        has_validation: Whether there are validation rows.
        processes: Processes that train together: one alone has nothing to shard.

    Raises:
        RecipeError: Its fields do not go together.
        TrainingError: A logger of `train.report_to` is not installed.
    """
    dtype = resolve_dtype(recipe.model)
    if dtype == torch.float16 and not torch.cuda.is_available():
        raise RecipeError(
            "`model.dtype: float16` trains on CUDA GPUs only",
            hint="use `float32` or `bfloat16` on a CPU: `model.dtype=float32`",
        )
    if dtype == torch.float16 and recipe.train.parallel == "zero2" and processes > 1:
        raise RecipeError(
            "`train.parallel: zero2` does not go with float16, which these GPUs need: DeepSpeed would train "
            "the adapter in it too",
            hint="set `train.parallel=ddp`",
        )
    if dtype == torch.float16 and recipe.adapter is None:  # `auto`, or a GPU without bfloat16
        raise RecipeError(
            f"`adapter: none` cannot train here with `model.dtype: {recipe.model.dtype}`: the GPU has no "
            "bfloat16, and in float16 all weights do not train",
            hint="take `model.dtype=float32`, or LoRA: leave `adapter: none` out",
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
        "num_train_epochs": 1.0,
        "max_steps": steps,
        "gradient_accumulation_steps": 1,
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
        "restore_callback_states_from_checkpoint": True,  # else early stopping begins to count anew
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
    shards = recipe.train.parallel == "fsdp" and processes > 1
    if shards:
        values |= {"fsdp": True, "fsdp_config": dict(SETTINGS)}
    config = _sft_config(values, recipe.train.trainer_arguments)
    if shards:
        round_nothing(config)
    return config


def _same_names(recipe: Recipe) -> dict[str, Any]:
    names = (
        "per_device_train_batch_size", "learning_rate", "weight_decay", "max_grad_norm",
        "optim", "logging_steps", "save_steps", "save_total_limit",
    )  # fmt: skip
    return {name: getattr(recipe.train, name) for name in names}


def _sft_config(values: dict[str, Any], more: dict[str, Any]) -> SFTConfig:
    try:
        return SFTConfig(**values | more)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"the trainer refuses these settings: {error}") from error
