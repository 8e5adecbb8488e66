"""What `train.trainer_arguments` takes: fields of TRL's SFTConfig that nothing else settles.

Every other field of SFTConfig is refused with the reason. So none publishes anything, carries a token, breaks
exact resuming or is ignored, and a wrong value is told with its line before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """Values that a field takes.

    Args:
        words: What they are, for messages.
        accepts: Whether a value is one of them.
    """

    words: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(low: int, high: int = 1_000_000) -> Kind:
    return Kind(
        f"a whole number from {low} to {high:,}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def _choice(*choices: str) -> Kind:
    return Kind(f"one of {', '.join(f'`{choice}`' for choice in choices)}", lambda value: value in choices)


_SHARE = Kind("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
_POSITIVE = Kind("a number above 0, at most 1000", lambda value: _is_number(value) and 0 < value <= 1000)
_SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
_NAME = Kind("text", lambda value: isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable())

ALLOWED: dict[str, Kind] = {
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": Kind("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1),
    "average_tokens_across_devices": _SWITCH,
    "dataloader_num_workers": _whole(0, 256),
    "dataloader_persistent_workers": _SWITCH,
    "dataloader_prefetch_factor": _whole(1, 1024),
    "ddp_backend": _choice("nccl", "gloo"),
    "ddp_bucket_cap_mb": _whole(1),
    "ddp_timeout": _whole(1),
    "full_determinism": _SWITCH,
    "label_smoothing_factor": _SHARE,
    "logging_first_step": _SWITCH,
    "loss_type": _choice("nll", "dft"),
    "neftune_noise_alpha": _POSITIVE,
    "project": _NAME,
    "run_name": _NAME,
    "tf32": _SWITCH,
    "torch_empty_cache_steps": _whole(1),
}
"""Fields of SFTConfig that a recipe can set here."""

OWNED = {
    "output_dir": "`output_dir`",
    "seed": "`seed`",
    "data_seed": "`seed`",
    "bf16": "`model.dtype: bfloat16`",
    "fp16": "`model.dtype: float16`",
    "bf16_full_eval": "`model.dtype: bfloat16`",
    "fp16_full_eval": "`model.dtype: float16`",
    "model_init_kwargs": "the section `model`",
    "chat_template_path": "`chat.template`",
    "max_length": "`data.max_length`",
    "packing": "`data.packing`",
    "assistant_only_loss": "`data.assistant_only_loss`",
    "completion_only_loss": "`data.assistant_only_loss`",
    "truncation_mode": "`data.too_long`",
    "gradient_checkpointing": "`train.checkpointing`",
    "gradient_checkpointing_kwargs": "`train.checkpointing`",
    "activation_checkpointing": "`train.checkpointing`",
    "activation_checkpointing_kwargs": "`train.checkpointing`",
    "activation_offloading": "`train.checkpointing`",
    "auto_find_batch_size": "`train.auto_batch`",
    "eval_steps": "`eval.eval_steps`",
    "eval_strategy": "`eval.eval_steps`",
    "eval_delay": "`eval.eval_steps`",
    "eval_on_start": "`eval.eval_steps`",
    "save_strategy": "`train.save_steps`",
    "logging_strategy": "`train.logging_steps`",
    "per_device_eval_batch_size": "`eval.per_device_eval_batch_size`",
    "load_best_model_at_end": "`eval.load_best_model_at_end`",
    "optim_args": "`train.optim`",
    "optim_target_modules": "`adapter.target_modules`",
    "push_to_hub": "`mamba-sft export RUN --format hf --push-to-hub OWNER/NAME` when the run is done",
    "torch_compile": "`model.kernels`",
    "torch_compile_backend": "`model.kernels`",
    "torch_compile_mode": "`model.kernels`",
    "use_liger_kernel": "`model.kernels`",
    "liger_kernel_config": "`model.kernels`",
    "log_level": "`mamba-sft -v`",
    "log_level_replica": "`mamba-sft -v`",
}
"""Fields of SFTConfig that follow from something else, and that."""

_PUBLISHES = "nothing is published while training; `mamba-sft export --format hf --push-to-hub` does that"
_TOKENS = "rows reach the trainer as tokens"
_PACKED = "rows reach the trainer packed"
_RESUME = "a run could no longer be resumed exactly"
_PARALLEL = "`train.parallel: ddp | fsdp | zero2` says how several GPUs share a run, and sets the rest of it"
_ORDER = "the order of the rows is the seed's"
_LOSS_ONLY = "only the loss is measured while training"
_BEST = "the best checkpoint is the one with the lowest validation loss"
_TRAINS = "`mamba-sft train` always trains"
_SETTLED = "the run settles it"

FIXED = {
    "trust_remote_code": "code from a model repository is never run",
    "resume_from_checkpoint": "`mamba-sft train --resume` does that",
    "eos_token": "the chat template settles the stop token",
    "pad_token": "the chat template settles the padding token",
    "hub_token": "a token would stand in the recipe and the report; the environment's HF_TOKEN is read",
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "do_train": _TRAINS,
    "do_eval": "evaluation follows `data.validation`",
    "do_predict": _TRAINS,
    "lr_scheduler_kwargs": "`train.lr_scheduler_type` settles them",
    "logging_nan_inf_filter": "a loss that is not a number stops the run",
    "prediction_loss_only": _LOSS_ONLY,
    "remove_unused_columns": "packed rows need all their columns",
    "router_aux_loss_coef": "the model has no experts",
    "include_num_input_tokens_seen": "metrics.jsonl has them as `num_tokens`",
    "dataloader_drop_last": "every row is trained on, and the steps are counted so",
    "enable_jit_checkpoint": "a run that is stopped saves a checkpoint anyway",
    "use_cpu": "a GPU is used where there is one; CUDA_VISIBLE_DEVICES hides it",
    "use_cache": "training keeps no state to generate from",
} | {
    name: reason
    for reason, names in {
        _PUBLISHES: (
            "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision",
            "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
        ),
        _TOKENS: ("dataset_text_field", "dataset_kwargs", "dataset_num_proc", "pad_to_multiple_of"),
        _PACKED: ("packing_strategy", "eval_packing", "padding_free"),
        _RESUME: (
            "save_only_model", "ignore_data_skip", "restore_callback_states_from_checkpoint",
            "save_on_each_node",
        ),
        _PARALLEL: ("fsdp", "fsdp_config", "deepspeed", "parallelism_config"),
        _ORDER: (
            "shuffle_dataset", "train_sampling_strategy", "length_column_name", "dataloader_in_order",
        ),
        _LOSS_ONLY: (
            "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
            "include_for_metrics", "batch_eval_metrics", "label_names",
        ),
        _SETTLED: (
            "accelerator_config", "dataloader_pin_memory", "dataloader_multiprocessing_context",
            "ddp_find_unused_parameters",
            "ddp_broadcast_buffers", "ddp_static_graph", "debug", "disable_tqdm", "local_rank",
            "log_on_each_node", "skip_memory_metrics",
        ),
    }.items()
    for name in names
}  # fmt: skip
"""Fields of SFTConfig that no recipe can set, and why."""


def find_fault(name: str, value: Any, own: set[str]) -> str | None:
    """Returns what is wrong with an argument, as it follows its name in a message; None if nothing is.

    Args:
        name: The field.
        value: What it is set to.
        own: The fields that `train` has itself.
    """
    if name in own:
        return f"must not be set here; use `train.{name}`"
    if name in OWNED:
        return f"must not be set here; use {OWNED[name]}"
    if name in FIXED:
        return f"must not be set: {FIXED[name]}"
    if name not in ALLOWED:
        close = get_close_matches(name, [*ALLOWED, *own, *OWNED, *FIXED], n=1)
        return "is not a field of SFTConfig" + (f"; did you mean `{close[0]}`?" if close else "")
    kind = ALLOWED[name]
    return None if kind.accepts(value) else f"must be {kind.words}, got {_shown(value)}"


def find_idle(arguments: dict[str, Any], *, reports: bool) -> Iterator[tuple[str, str]]:
    """Finds arguments that would do nothing beside the others: each with what is wrong with it.

    Args:
        arguments: All of them.
        reports: Whether metrics go anywhere else than into `metrics.jsonl`.
    """
    for name in ("dataloader_persistent_workers", "dataloader_prefetch_factor"):
        if arguments.get(name) and not arguments.get("dataloader_num_workers"):
            yield name, "needs `train.trainer_arguments.dataloader_num_workers` to be at least 1"
    for name in ("run_name", "project"):
        if name in arguments and not reports:
            yield name, "needs `train.report_to`: nothing else shows it"
    if arguments.get("loss_type") == "dft" and arguments.get("label_smoothing_factor"):
        yield "label_smoothing_factor", "does not go with `loss_type: dft`, which smooths nothing"


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "fields"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = f"the text `{value[:60]}`" if isinstance(value, str) else str(value)[:60]
    return text if text.isprintable() else repr(text)
