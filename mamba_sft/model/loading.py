"""The base model and its tokenizer: found, checked, loaded in the asked precision, with our mixer installed.

`load_model` accepts any `transformers` FalconMamba checkpoint in safetensors, from a directory or the hub.
Code that comes with a checkpoint is never run. Weights keep one dtype throughout, the recipe's: the mixer
computes the recurrence and every norm in float32 anyway, and what was trained against is then exactly what a
merge writes.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from mamba_sft.errors import ModelError
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model.chat_template import TemplateSetup, prepare_tokenizer
from mamba_sft.model.checkpoint import base_fingerprint, read_config, read_tensors, resolve_base
from mamba_sft.model.quantization import (
    UNQUANTIZED,
    bitsandbytes_config,
    misfits,
    never_pack,
    settle_int8,
)
from mamba_sft.model.shape import Shape
from mamba_sft.recipe.builtin import find_path
from mamba_sft.recipe.fields import ChatSection, ModelSection

__all__ = [
    "apply_setup",
    "base_fingerprint",
    "load_config",
    "load_model",
    "load_tokenizer",
    "recommend_sampling",
    "resolve_base",
    "resolve_dtype",
]

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_config(section: ModelSection) -> Any:
    """Returns the `FalconMambaConfig` of the section's base, without fetching its weights.

    Raises:
        ModelError: The base is missing, not FalconMamba, or its config has values `transformers` refuses.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import FalconMambaConfig

    directory = resolve_base(section.base, section.revision, weights=False)
    try:
        return FalconMambaConfig.from_pretrained(directory, local_files_only=True)
    except (TypeError, ValueError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        path = directory / "config.json"
        raise ModelError(f"`{path}` is not usable: {said}", hint="download it again") from error


def load_tokenizer(section: ModelSection) -> Any:
    """Returns the fast tokenizer of the section's base, without fetching its weights.

    Raises:
        ModelError: The base or its tokenizer is missing or cannot be read.
    """
    from transformers import AutoTokenizer

    directory = resolve_base(section.base, section.revision, weights=False)
    if not (directory / "tokenizer.json").is_file():
        raise ModelError(
            f"`{section.base}` has no `tokenizer.json`", hint="copy the tokenizer's files beside the weights"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        tokenizer.backend_tokenizer.no_truncation()  # a file may say otherwise; rows are cut and padded here
        tokenizer.backend_tokenizer.no_padding()
        return tokenizer
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        raise ModelError(f"the tokenizer in `{directory}` cannot be read: {error}") from error


def load_setup(model: ModelSection, chat: ChatSection) -> TemplateSetup:
    """Returns a base's tokenizer with its chat template and special tokens settled as training settles them.

    Raises:
        MambaSFTError: The base, its tokenizer or the template cannot be used.
    """
    config, tokenizer = load_config(model), load_tokenizer(model)
    return prepare_tokenizer(tokenizer, chat, named_ids(config), embedding_rows=config.vocab_size)


def resolve_dtype(section: ModelSection, device: str | torch.device | None = None) -> torch.dtype:
    """Returns the dtype the section means on `device`, by default the one `load_model` takes.

    `auto` is bfloat16 on GPUs that compute in it, float16 on older ones, float32 on a CPU. A bfloat16 that
    the GPU would only emulate becomes float16, with a warning.
    """
    place = _pick_device(device)
    native = place.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if section.dtype == "auto":
        if place.type == "cpu":
            return torch.float32
        return torch.bfloat16 if native else torch.float16
    dtype = _DTYPES[section.dtype]
    if dtype == torch.bfloat16 and not native:
        logger.warning("%s has no bfloat16: using float16", torch.cuda.get_device_name(place))
        return torch.float16
    return dtype


def load_model(
    section: ModelSection, *, device: str | torch.device | None = None, to_shard: bool = False
) -> Any:
    """Returns the section's base model in eval mode, on `device`, with our mixer installed.

    Args:
        section: Which model, in which precision, on which kernels.
        device: Where to; None takes this process's GPU if there is one.
        to_shard: Whether its weights will be cut in parts: then 4-bit ones lie in numbers of the dtype that
            they are computed in, since only such can be.

    Raises:
        ModelError: The checkpoint is missing, broken or of another kind, the device is absent, or memory is
            short.
    """
    from transformers import FalconMambaForCausalLM

    place = _pick_device(device)
    dtype = resolve_dtype(section, place)
    if place.type == "cpu" and dtype != torch.float32:
        logger.warning(
            "most CPUs multiply 16-bit matrices slowly: `model.dtype: auto` takes float32 on a CPU"
        )
    directory = resolve_base(section.base, section.revision)
    read_tensors(directory)
    shape = Shape.from_config(read_config(directory))
    try:
        model, info = FalconMambaForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map={"": place},
            quantization_config=_quantization(section, shape, dtype, to_shard),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (RuntimeError, MemoryError) as error:
        explained = _explain_loading(error, section, place)
        if explained is None:
            raise
        raise explained from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"`{directory}` lacks {len(missing)} tensors of the model, the first `{missing[0]}`",
            hint="the checkpoint is incomplete, or its config does not belong to it",
        )
    model.name_or_path = section.base if not find_path(section.base).is_dir() else str(directory.resolve())
    if section.quantization == "nf4":
        never_pack(model)
    if section.quantization == "int8":
        settle_int8(model)
    install(model, section.kernels)
    return model.eval()


def apply_setup(model: Any, setup: TemplateSetup) -> None:
    """Makes the model agree with the tokenizer that `prepare_tokenizer` settled, in place, deterministically.

    Grows the vocabulary if asked, gives every row that is to be trained a start, and sets the stop, padding
    and start ids in both configs. Slot rows saw no text in pre-training and hold noise, so they start anew
    too: inputs from the mean of the vocabulary, which says nothing; the outputs of a stop token from the row
    that ended documents, so that stopping is known from the first step. Where the two matrices are tied, a
    stop token starts as an output.

    Args:
        model: A model without an adapter.
        setup: What the chat template needs.

    Raises:
        ModelError: The tokenizer has fewer tokens than `resize_to` would drop.
    """
    old_size = model.get_input_embeddings().weight.shape[0]
    old_eos = first_id(model.config.eos_token_id)
    if setup.resize_to is not None and setup.resize_to < old_size:
        raise ModelError(f"the vocabulary cannot shrink from {old_size} to {setup.resize_to} tokens")
    new_rows = range(old_size, setup.resize_to or old_size)
    if new_rows:
        model.resize_token_embeddings(setup.resize_to, mean_resizing=False)
    _start_rows(
        model, sorted({*setup.trained_token_ids, *new_rows}), set(setup.stop_token_ids), old_eos, old_size
    )
    tokenizer = setup.tokenizer
    for config in (model.config, model.generation_config):
        config.eos_token_id = list(setup.stop_token_ids)
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id


def recommend_sampling(model: Any, section: ChatSection) -> None:
    """Writes the recipe's sampling into the generation config, which travels with adapter and checkpoint."""
    if section.temperature is None and section.top_p is None:
        return
    config, sampled = model.generation_config, section.temperature != 0
    config.do_sample = sampled
    config.temperature = section.temperature if sampled else None
    config.top_p = section.top_p if sampled else None


def _start_rows(model: Any, rows: list[int], stops: set[int], old_eos: int | None, old_size: int) -> None:
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = inputs is outputs
    with torch.no_grad():
        for matrix in (inputs,) if tied else (inputs, outputs):
            mean = matrix[:old_size].mean(0, dtype=torch.float32).to(matrix.dtype)
            end = mean if old_eos is None else matrix[old_eos].clone()
            ends = stops if tied or matrix is outputs else set()
            for row in rows:
                if row != old_eos:
                    matrix[row] = end if row in ends else mean


def first_id(ids: Any) -> int | None:
    """Returns the first of the ids that a config gives one meaning; some list several."""
    if isinstance(ids, list):
        ids = ids[0] if ids else None
    return ids if isinstance(ids, int) else None


def _quantization(section: ModelSection, shape: Shape, dtype: torch.dtype, to_shard: bool) -> Any:
    if section.quantization == "none":
        return None
    if section.quantization == "int8":
        # It says at every call of every layer that bfloat16 inputs are rounded to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    left_out = misfits(shape, section.quantization)
    for name, reason in left_out.items():
        logger.info("`%s` stays in %s: %s", name, str(dtype).removeprefix("torch."), reason)
    storage = dtype if to_shard else torch.uint8
    return bitsandbytes_config(section.quantization, dtype, (*UNQUANTIZED, *left_out), storage=storage)


def _pick_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    picked = torch.device(device)
    if picked.type != "cuda":
        return picked
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = picked.index if picked.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        raise ModelError(
            f"device `cuda:{index}` was asked for, but this machine shows {count} CUDA devices",
            hint="see `nvidia-smi` and CUDA_VISIBLE_DEVICES, or leave the device out to run on the CPU",
        )
    return torch.device("cuda", index)


def _explain_loading(error: BaseException, section: ModelSection, device: torch.device) -> ModelError | None:
    short = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
    if short:
        smaller = "free memory on it" if section.quantization == "nf4" else "try `model.quantization=nf4`"
        return ModelError(f"not enough memory on {device} to load `{section.base}`", hint=smaller)
    if "mismatch" in str(error):
        return ModelError(
            f"the weights of `{section.base}` do not have the shapes that its config gives",
            hint="config.json and the shards come from different models; download both again",
        )
    return None


def named_ids(config: Any) -> set[int]:
    """Returns the token ids that a model's config gives a meaning; some configs list several."""
    ids: set[int] = set()
    for value in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids
