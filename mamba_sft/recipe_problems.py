"""What is wrong with a recipe, in words: one line per problem, with its place and the likely fix."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mamba_sft.recipe_checks import ConflictError

Keys = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a value was written. Sorts by file line, then by order of the overrides."""

    order: int
    line: int
    text: str


class Finding(NamedTuple):
    """A problem and where it is."""

    place: Place
    text: str


FOREIGN_KEYS = {
    "base_model": "model.base",
    "base_model_name_or_path": "model.base",
    "checkpoint_dir": "model.base",
    "model_name": "model.base",
    "model_name_or_path": "model.base",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: float16",
    "load_in_4bit": "model.quantization: nf4",
    "load_in_8bit": "model.quantization: int8",
    "quantization_bit": "model.quantization",
    "quant_bits": "model.quantization",
    "quantize": "model.quantization",
    "chat_template": "chat.template",
    "default_system": "chat.system",
    "system_prompt": "chat.system",
    "dataset": "data.sources",
    "datasets": "data.sources",
    "dataset_mixture": "data.sources",
    "dataset_name": "data.sources",
    "hf_dataset": "data.sources",
    "train_file": "data.sources",
    "split_dataset_ratio": "data.validation",
    "val_set_size": "data.validation",
    "val_size": "data.validation",
    "cutoff_len": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "neat_packing": "data.packing",
    "sample_packing": "data.packing",
    "completion_only_loss": "data.assistant_only_loss",
    "mask_prompt": "data.assistant_only_loss",
    "train_on_inputs": "data.assistant_only_loss (which means the opposite)",
    "train_on_prompt": "data.assistant_only_loss (which means the opposite)",
    "lora_rank": "adapter.r",
    "lora_r": "adapter.r",
    "lora_scale": "adapter.lora_alpha",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "lora_modules": "adapter.target_modules",
    "lora_use_dora": "adapter.use_dora",
    "peft_use_dora": "adapter.use_dora",
    "peft_use_rslora": "adapter.use_rslora",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "iters": "train.max_steps",
    "batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "grad_accumulation_steps": "train.gradient_accumulation_steps",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "lr_schedule": "train.lr_scheduler_type",
    "warmup_ratio": "train.warmup_steps (below 1 it is a share of the run)",
    "gradient_clipping": "train.max_grad_norm",
    "max_norm": "train.max_grad_norm",
    "optimizer": "train.optim",
    "gradient_checkpointing": "train.checkpointing",
    "use_gradient_checkpointing": "train.checkpointing",
    "steps_per_report": "train.logging_steps",
    "save_every": "train.save_steps",
    "steps_per_save": "train.save_steps",
    "eval_batch_size": "eval.per_device_eval_batch_size",
    "steps_per_eval": "eval.eval_steps",
    "early_stopping_steps": "eval.early_stopping_patience",
    "adapter_path": "output_dir",
    "out_dir": "output_dir",
    "random_state": "seed",
}
"""Field names of axolotl, TRL, LLaMA-Factory, ms-swift, Unsloth, mlx-lm and litgpt, and ours for the same thing."""

UNWANTED_KEYS = {
    "adapter": "every run trains a LoRA adapter; its settings are the section `adapter`",
    "finetuning_type": "every run trains a LoRA adapter; leave it out",
    "tuner_type": "every run trains a LoRA adapter; leave it out",
    "use_peft": "every run trains a LoRA adapter; leave it out",
    "trust_remote_code": "code from a model repository is never run; leave it out",
    "double_quantization": "`model.quantization: nf4` always quantizes its scales too; leave it out",
    "use_bnb_nested_quant": "`model.quantization: nf4` always quantizes its scales too; leave it out",
    "eval_strategy": "evaluation follows `eval.eval_steps` and needs `data.validation`",
    "save_strategy": "checkpoints follow `train.save_steps`",
}
"""Field names of other tools that have nothing to set here, and why."""


def find_problems(model: type[BaseModel], tree: Any, places: dict[Keys, Place]) -> list[Finding]:
    """Everything wrong with `tree`, which `model` refuses.

    Fields that clash are looked for only in a valid tree, so wrong values are taken out and what is left is
    validated again: both kinds of problems are reported at once.
    """
    tree = copy.deepcopy(tree)
    findings: list[Finding] = []
    for _ in range(3):
        try:
            model.model_validate(tree)
            break
        except ValidationError as error:
            problems = [
                problem for details in error.errors() for problem in _problems(model, tree, dict(details))
            ]
            findings += [Finding(_place(path, places), text) for path, text in problems]
            if not _repair(tree, error):
                break
    return findings


def _place(path: Keys, places: dict[Keys, Place]) -> Place:
    while path not in places:
        path = path[:-1]
    return places[path]


def _repair(tree: Any, error: ValidationError) -> bool:
    """Takes out what `error` complains about; False where that cannot make the tree valid."""
    for details in sorted(error.errors(), key=lambda details: len(details["loc"]), reverse=True):
        *parents, last = details["loc"] or (None,)
        target = tree
        for key in parents:
            target = target[key] if isinstance(target, list) else target.get(key)
        if details["type"] == "missing":
            target[last] = {"base": "x", "sources": [{"path": "x"}]}.get(str(last), "x")
        elif isinstance(target, dict):
            target.pop(last, None)
        else:
            return False
    return True


def _problems(model: type[BaseModel], tree: Any, details: dict[str, Any]) -> Iterator[tuple[Keys, str]]:
    path: Keys = details["loc"]
    kind, context = details["type"], details.get("ctx", {})
    dotted = ".".join(map(str, path))
    if kind == "extra_forbidden":
        yield path, f"unknown field `{dotted}`{_suggestion(model, path)}"
    elif kind == "missing":
        yield path, f"`{dotted}` is missing"
    elif isinstance(context.get("error"), ConflictError):
        for at, text in context["error"].problems:
            yield at, f"`{'.'.join(map(str, at))}` {text}"
    else:
        yield path, f"`{dotted}` {_expectation(kind, context, details['input'])}"


def _expectation(kind: str, context: dict[str, Any], value: Any) -> str:
    return f"{kind} {context} {value}"


def _suggestion(model: type[BaseModel], path: Keys) -> str:
    return ""
