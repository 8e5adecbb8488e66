"""Names of other libraries that no one promises to keep, and where we lean on each.

The upper bounds in pyproject.toml stand because of these. When a library moves on, this test says what is
gone and which file of ours used it; a name that we no longer use leaves the table.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "mamba_sft"


class Name(NamedTuple):
    """One name.

    Args:
        module: Where it lives.
        path: The attribute in it, dotted. `f(x)` is the parameter x of f; `C:x` an attribute x that instances
            of C are given; `f:x` something that f sets on what it is given.
        used_in: Our file.
    """

    module: str
    path: str
    used_in: str


LORA = "peft.tuners.lora.layer"
TOKENS = "peft.tuners.trainable_tokens.layer"
STOCK = "transformers.models.falcon_mamba.modeling_falcon_mamba"
LAYERS = "transformers.modeling_layers"
ZERO = "deepspeed.runtime.zero.stage_1_and_2"
EXTRAS = ("deepspeed",)
"""Libraries that the suite does without; their names are looked for where they are installed."""

NAMES = [
    Name("peft.tuners.tuners_utils", "_check_lora_target_modules_mamba", "model/adapter.py"),
    Name("peft.tuners.tuners_utils", "BaseTunerLayer.get_base_layer", "model/base_view.py"),
    Name("peft.tuners.tuners_utils", "BaseTunerLayer.merged", "model/base_view.py"),
    Name("peft.utils.other", "TrainableTokensWrapper", "model/adapter.py"),
    Name("peft.utils.other", "TrainableTokensWrapper:token_adapter", "model/base_view.py"),
    Name("peft.utils.other", "TrainableTokensWrapper.original_module", "inference/scoring.py"),
    Name(TOKENS, "TrainableTokensLayer.merge", "model/adapter.py"),
    Name(TOKENS, "TrainableTokensLayer.get_merged_weights(active_adapters)", "model/trained_rows.py"),
    Name(TOKENS, "TrainableTokensLayer:merged_adapters", "model/base_view.py"),
    Name(TOKENS, "TrainableTokensLayer:trainable_tokens_original", "model/base_view.py"),
    Name(TOKENS, "TrainableTokensLayer:trainable_tokens_delta", "model/adapter.py"),
    Name(TOKENS, "TrainableTokensLayer:token_indices", "model/base_view.py"),
    Name(LORA, "LoraLayer:base_layer", "kernels/time_step.py"),
    Name(LORA, "LoraLayer:lora_variant", "training/activations.py"),
    Name(LORA, "LoraLayer:lora_B", "model/adapter.py"),
    Name(LORA, "LoraLayer:lora_magnitude_vector", "merging/saved_adapter.py"),
    Name("peft", "PeftModel.save_pretrained(save_embedding_layers)", "model/adapter.py"),
    Name("peft", "get_peft_model_state_dict(save_embedding_layers)", "model/adapter.py"),
    Name("peft", "set_peft_model_state_dict(low_cpu_mem_usage)", "merging/merge_run.py"),
    Name("peft", "inject_adapter_in_model(low_cpu_mem_usage)", "merging/merge_run.py"),
    Name("peft", "LoraConfig(trainable_token_indices)", "model/adapter.py"),
    Name(STOCK, "FalconMambaMixer.forward", "kernels/falcon_mamba.py"),
    Name(STOCK, "FalconMambaMixer:dt_layernorm", "kernels/falcon_mamba.py"),
    Name(STOCK, "FalconMambaMixer:time_step_rank", "kernels/falcon_mamba.py"),
    Name(STOCK, "FalconMambaBlock:residual_in_fp32", "kernels/falcon_mamba.py"),
    Name(STOCK, "FalconMambaModel:norm_f", "kernels/falcon_mamba.py"),
    Name(STOCK, "FalconMambaOutput(last_hidden_state)", "kernels/falcon_mamba.py"),
    Name(STOCK, "FalconMambaCausalLMOutput(hidden_states)", "kernels/falcon_mamba.py"),
    Name(STOCK, "FalconMambaRMSNorm:variance_epsilon", "kernels/decoding.py"),
    Name("transformers.cache_utils", "DynamicCache.has_previous_state", "kernels/falcon_mamba.py"),
    Name("transformers.cache_utils", "DynamicCache.reorder_cache", "inference/generation.py"),
    Name("transformers.cache_utils", "Cache.update_conv_state", "kernels/falcon_mamba.py"),
    Name("transformers.cache_utils", "Cache.update_recurrent_state", "kernels/falcon_mamba.py"),
    Name("transformers.cache_utils", "LinearAttentionLayer:conv_states", "kernels/decoding.py"),
    Name("transformers.cache_utils", "LinearAttentionLayer:recurrent_states", "kernels/decoding.py"),
    Name("transformers.cache_utils", "LinearAttentionLayer:has_previous_state", "inference/state_rows.py"),
    Name("lm_eval.models.huggingface", "HFLM._loglikelihood_tokens", "evaluation/harness_model.py"),
    Name("transformers.integrations.accelerate", "force_accelerate_hooks", "kernels/falcon_mamba.py"),
    Name(LAYERS, "GradientCheckpointingLayer:_gradient_checkpointing_func", "training/activations.py"),
    Name("transformers", "Trainer._get_grad_norm(grad_norm)", "training/trainer.py"),
    Name("transformers", "Trainer._save_rng_state", "training/resumable.py"),
    Name("transformers", "Trainer._load_rng_state", "training/resumable.py"),
    Name("transformers", "Trainer._run_epoch", "training/trainer.py"),
    Name("transformers", "Trainer._evaluate", "training/resumable.py"),
    Name("transformers", "Trainer._maybe_log_save_evaluate", "training/resumable.py"),
    Name("transformers", "Trainer._save_checkpoint", "training/resumable.py"),
    Name("transformers", "Trainer._save_optimizer_and_scheduler", "training/resumable.py"),
    Name("transformers", "Trainer._save_scaler", "training/resumable.py"),
    Name("transformers", "Trainer._load_best_model", "training/resumable.py"),
    Name("transformers", "Trainer._load_from_checkpoint", "training/resumable.py"),
    Name("transformers", "Trainer._load_optimizer_and_scheduler", "training/resumable.py"),
    Name("transformers", "Trainer.save_model(_internal_call)", "training/resumable.py"),
    Name("transformers", "Trainer:_tr_loss", "training/trainer.py"),
    Name("transformers", "Trainer:_globalstep_last_logged", "training/resumable.py"),
    Name("transformers", "Trainer:current_flos", "training/resumable.py"),
    Name("trl", "SFTTrainer:_total_train_tokens", "training/trainer.py"),
    Name("transformers", "Trainer._prepare_inputs", "training/steps.py"),
    Name("transformers", "Trainer:current_gradient_accumulation_steps", "training/steps.py"),
    Name("transformers.utils.logging", "disable_progress_bar", "noise.py"),
    Name("trl.kernels", "ChunkedLogProbFunction", "training/fused_head.py"),
    Name("trl", "SFTTrainer:_metrics", "training/trainer.py"),
    Name("trl", "SFTTrainer:maybe_activation_offload_context", "training/steps.py"),
    Name("bitsandbytes.nn", "Linear4bit:support_avx512bf16_for_cpu", "model/quantization.py"),
    Name("bitsandbytes.nn", "Linear8bitLt.init_8bit_state", "model/quantization.py"),
    Name("bitsandbytes.nn", "Params4bit.__new__(module)", "model/quantization.py"),
    Name("bitsandbytes.autograd._functions", "logger", "model/loading.py"),
    Name("bitsandbytes.functional", "dequantize_4bit", "merging/merge_run.py"),
    Name("bitsandbytes.functional", "int8_vectorwise_dequant", "merging/merge_run.py"),
    Name("bitsandbytes.functional", "quantize_blockwise(blocksize)", "merging/merge_run.py"),
    Name("transformers", "Trainer.create_accelerator_and_postprocess", "training/trainer.py"),
    Name("transformers", "Trainer:is_fsdp_enabled", "training/trainer.py"),
    Name("transformers", "TrainingArguments:fsdp_plugin_args", "training/sharding.py"),
    Name("transformers.trainer", "OPTIMIZER_NAME", "training/resumable.py"),
    Name("transformers.trainer", "DEFAULT_PROGRESS_CALLBACK", "training/trainer.py"),
    Name("accelerate.state", "AcceleratorState:fsdp_plugin", "training/sharding.py"),
    Name("accelerate.state", "AcceleratorState:deepspeed_plugins", "training/zero.py"),
    Name("accelerate", "Accelerator:deepspeed_engine_wrapped", "training/zero.py"),
    Name("accelerate.utils", "DeepSpeedPlugin.select(_from_accelerator_state)", "training/zero.py"),
    Name(ZERO, "DeepSpeedZeroOptimizer:single_partition_of_fp32_groups", "training/zero.py"),
    Name(ZERO, "DeepSpeedZeroOptimizer:_hp_optimizer_states_linked", "training/zero.py"),
    Name(ZERO, "DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state", "training/zero.py"),
    Name("accelerate.hooks", "add_hook_to_module:_old_forward", "kernels/twin.py"),
    Name("numba.core.cgutils", "get_or_insert_function", "kernels/cpu_rows.py"),
    Name("numba.extending", "intrinsic", "kernels/cpu_rows.py"),
    Name("llvmlite.ir", "FloatType", "kernels/cpu_rows.py"),
    Name("tokenizers.decoders", "DecodeStream(skip_special_tokens)", "inference/answer_text.py"),
    Name("huggingface_hub.utils", "validate_repo_id", "model/checkpoint.py"),
    Name("huggingface_hub.errors", "HFValidationError", "model/checkpoint.py"),
]  # fmt: skip


def _find(name: Name) -> Any:
    """The object, or None; of a parameter or a set attribute, whether it is there."""
    path, sets, given = re.fullmatch(r"([\w.]+)(?::(\w+))?(?:\((\w+)\))?", name.path).groups()
    try:
        found = reduce(getattr, path.split("."), importlib.import_module(name.module))
    except (ImportError, AttributeError):
        return None
    if given is not None:
        return given in inspect.signature(found).parameters or None
    if sets is not None:
        classes = found.__mro__ if inspect.isclass(found) else [found]
        sources = [inspect.getsource(one) for one in classes if one.__module__ != "builtins"]
        return any(re.search(rf"\.{sets}\b|\b{sets}\s*[:=]", source) for source in sources) or None
    return found


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name.module}.{name.path}")
def test_the_name_is_there_and_we_use_it(name: Name) -> None:
    library, last = name.module.split(".")[0], re.findall(r"\w+", name.path)[-1]
    if library in EXTRAS:
        pytest.importorskip(library)
    if _find(name) is None:
        pytest.fail(f"{last} of {library} is gone, used in {name.used_in}", pytrace=False)
    text = (PACKAGE / name.used_in).read_text(encoding="utf-8")
    assert re.search(rf"\b{last}\b", text), f"{name.used_in} does not use {last}: take it out of the table"


def test_a_name_that_is_gone_is_named_with_its_place() -> None:
    for path in ("_gone", "PeftModel.gone", "PeftModel:gone", "get_peft_model(gone)"):
        assert _find(Name("peft", path, "model/adapter.py")) is None
    with pytest.raises(pytest.fail.Exception, match=r"^gone of peft is gone, used in model/adapter\.py$"):
        test_the_name_is_there_and_we_use_it(Name("peft", "PeftModel.gone", "model/adapter.py"))
