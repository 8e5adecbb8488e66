"""The words people bring from other tools, and ours for the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

FOREIGN_KEYS = {
    "base_model": "model.base",
    "base_model_name_or_path": "model.base",
    "checkpoint_dir": "model.base",
    "model_name": "model.base",
    "model_name_or_path": "model.base",
    "adapter_name_or_path": "model.adapter",
    "lora_model_dir": "model.adapter",
    "resume_adapter_file": "model.adapter",
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
    "lora": "adapter",
    "lora_parameters": "adapter",
    "peft": "adapter",
    "lora_rank": "adapter.r",
    "lora_r": "adapter.r",
    "lora_scale": "adapter.lora_alpha",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "lora_modules": "adapter.target_modules",
    "lora_use_dora": "adapter.use_dora",
    "peft_use_dora": "adapter.use_dora",
    "peft_use_rslora": "adapter.use_rslora",
    "training": "train",
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
    "evals_per_epoch": "eval.eval_steps (below 1 it is a share of the run)",
    "adapter_path": "output_dir",
    "out_dir": "output_dir",
    "random_state": "seed",
}
"""Field names of axolotl, TRL, LLaMA-Factory, ms-swift, Unsloth, mlx-lm and litgpt, as of summer 2026."""

_LORA_OR_ALL = "a run trains a LoRA adapter, or with `adapter: none` all weights; leave it out"
UNWANTED_KEYS = {
    "finetuning_type": _LORA_OR_ALL,
    "train_type": _LORA_OR_ALL,
    "tuner_type": _LORA_OR_ALL,
    "use_peft": _LORA_OR_ALL,
    "full_finetuning": _LORA_OR_ALL,
    "fine_tune_type": _LORA_OR_ALL,
    "trust_remote_code": "code from a model repository is never run; leave it out",
    "double_quantization": "`model.quantization: nf4` always quantizes its scales too; leave it out",
    "use_bnb_nested_quant": "`model.quantization: nf4` always quantizes its scales too; leave it out",
    "eval_strategy": "evaluation follows `eval.eval_steps` and needs `data.validation`",
    "save_strategy": "checkpoints follow `train.save_steps`",
}
"""Field names of other tools that have nothing to set here, and why."""

ALL_WEIGHTS = (
    "all", "all_weights", "false", "fft", "freeze", "full", "full_fine_tune", "full_fine_tuning",
    "full_finetune", "full_finetuning", "full_weights", "no", "none", "null", "off",
)  # fmt: skip
"""What other tools, and people, call training without an adapter."""

FOREIGN_VALUES = {
    "4": "nf4",
    "4-bit": "nf4",
    "4bit": "nf4",
    "8": "int8",
    "8-bit": "int8",
    "8bit": "int8",
    "adamw_8bit_paged": "paged_adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch": "adamw_torch_fused",
    "awq": "nf4",
    "bf16": "bfloat16",
    "bits_4": "nf4",
    "bits_8": "int8",
    "bnb": "nf4",
    "bnb_4bit": "nf4",
    "double": "float32",
    "f16": "float16",
    "f32": "float32",
    "false": "none",
    "float": "float32",
    "fp16": "float16",
    "fp32": "float32",
    "fp4": "nf4",
    "fp8": "int8",
    "full": "float32",
    "gptq": "nf4",
    "half": "float16",
    "int4": "nf4",
    "load_in_4bit": "nf4",
    "load_in_8bit": "int8",
    "openai": "messages",
    "q4": "nf4",
    "q4_0": "nf4",
    "q4_k_m": "nf4",
    "q8": "int8",
    "q8_0": "int8",
    "qlora": "nf4",
    "single": "float32",
    "true": "block",
    "w8a8": "int8",
    "warmup_stable_decay": "wsd",
}
"""Choices as other tools spell them."""


def meant(word: str, choices: Sequence[str]) -> str | None:
    """Returns which of the choices a word means: its name elsewhere, else the nearest in letters; or None."""
    word = word.lower()
    if FOREIGN_VALUES.get(word) in choices:
        return FOREIGN_VALUES[word]
    close = get_close_matches(word, choices, n=1, cutoff=0.5)
    return close[0] if close else None
