"""Where LoRA goes on a Mamba mixer: attach it, save and load it, prove that it learns.

PEFT (0.21.2, read 2026-11-27) refuses LoRA on `out_proj` of Mamba models, by name: the compiled path of
`transformers` (5.23.0, read 2026-11-27) is handed `out_proj.weight` and would skip the adapter without a
word, as it does on `x_proj` and `dt_proj`. Our mixer calls `in_proj`,
`x_proj`, `dt_proj` and `out_proj` as modules and hands only activations to its kernels, so an adapter on any
of them takes part in forward and backward. Importing this module lifts the refusal for models with our mixer.

Adapter weights are float32 whatever the base is: the steps of training are too small for 16 bits to hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners import tuners_utils
from peft.utils.other import TrainableTokensWrapper

from mamba_sft.errors import AdapterError
from mamba_sft.kernels.falcon_mamba import FalconMambaMixer
from mamba_sft.model.adapter_card import write_adapter_card
from mamba_sft.model.adapter_config import HONOURED, OTHERS, read_adapter_config, used
from mamba_sft.model.base_facts import BaseFacts
from mamba_sft.model.checkpoint import base_fingerprint, resolve_base
from mamba_sft.model.checksums import file_checksum, new_digest, tensor_checksums
from mamba_sft.model.portable import settle_tokenizer_config
from mamba_sft.model.shards import part_of, whole
from mamba_sft.model.trained_rows import keep_rows_on_device
from mamba_sft.recipe.fields import TARGETS
from mamba_sft.run import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from mamba_sft.model.chat_template import TemplateSetup
    from mamba_sft.recipe.fields import AdapterSection, ModelSection

_ADAPTER = "default"
_REFUSED = {
    "conv1d": "it is a depthwise convolution, not a projection, and its kernel reads the weight directly",
    "lm_head": "the chunked loss multiplies by its weight directly, so its adapter would never be trained",
    "embeddings": "only the rows of new special tokens are trained, through `trained_token_ids`",
    **dict.fromkeys(("A_log", "D"), "it is a parameter of the recurrence, not a projection"),
}


def _allow_on_our_mixer(
    check: Callable[[PeftConfig, Any, str], None],
) -> Callable[[PeftConfig, Any, str], None]:
    """Returns PEFT's check of one target, lifted for `out_proj` of models whose every mixer is ours.

    Safe because the refusal guards against mixers that read `out_proj.weight`; ours never does, which the
    tests of this module and the gradient check in training hold. Any other model meets PEFT's own check.
    """

    @wraps(check)
    def allow(config: PeftConfig, model: Any, target: str) -> None:
        if target != "out_proj" or not _has_our_mixer(model):
            check(config, model, target)

    return allow


def _has_our_mixer(model: Any) -> bool:
    mixers = [module for module in model.modules() if hasattr(module, "A_log")]
    return bool(mixers) and all(isinstance(mixer, FalconMambaMixer) for mixer in mixers)


# Once, when this module is imported: a check that comes and goes with a call would do so for every thread.
tuners_utils._check_lora_target_modules_mamba = _allow_on_our_mixer(
    tuners_utils._check_lora_target_modules_mamba
)


def attach_adapter(
    model: Any, section: AdapterSection, *, trained_token_ids: Sequence[int] = ()
) -> PeftModel:
    """Wraps `model` with a fresh trainable adapter; everything else is frozen.

    Args:
        model: A FalconMamba language model with our mixer installed, quantized or not.
        section: Rank, scale, targets, variants.
        trained_token_ids: Rows trained in full: of the embeddings, and of `lm_head` where it is not tied.

    Raises:
        AdapterError: A target is refused or matches nothing, a row does not exist, or the mixer is not ours.
    """
    _check_targets(model, section.target_modules)
    size = model.get_input_embeddings().weight.shape[0]
    outside = [token for token in trained_token_ids if not 0 <= token < size]
    if outside:
        raise AdapterError(f"tokens {outside} have no row in the embeddings, which have {size}")
    return _wrap(model, lora_config(model, section, trained_token_ids=trained_token_ids))


def lora_config(model: Any, section: AdapterSection, *, trained_token_ids: Sequence[int] = ()) -> LoraConfig:
    """Returns the recipe's adapter as PEFT has it.

    Args:
        model: The language model that it is for.
        section: Rank, scale, targets, variants.
        trained_token_ids: As `attach_adapter` takes them.
    """
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=sorted(section.target_modules),
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        trainable_token_indices=_trained_rows(model, trained_token_ids),
    )


def load_adapter(model: Any, path: str | Path, *, trainable: bool = False) -> PeftModel:
    """Wraps `model` with the adapter saved in `path`, weights in float32 exactly as saved.

    Args:
        model: The base it was trained on, prepared by `apply_setup` as then, with our mixer installed.
        path: A directory with `adapter_config.json` and `adapter_model.safetensors`.
        trainable: Whether its tensors require gradients.

    Raises:
        AdapterError: Files are missing or broken, or the adapter does not fit the model.
    """
    config, weights = _read_adapter(Path(path))
    config.inference_mode = not trainable
    config.base_model_name_or_path = None  # where it lay when it was trained is not where it lies now
    try:
        wrapped = _wrap(model, config)
    except AdapterError:
        raise
    except Exception as error:  # PEFT raises what comes up: names of modules that are none, rows, biases
        raise _misfit(path, error) from error
    _fill(wrapped, path, weights)
    for parameter in adapter_tensors(wrapped).values():
        parameter.requires_grad_(trainable)
    if not trainable:
        _write_rows(wrapped)
    return wrapped.train(trainable)


def load_weights(model: PeftModel, path: str | Path) -> None:
    """Gives the adapter of `model` the values that are saved in `path`, in place, exactly as saved.

    Args:
        model: From `attach_adapter`, of the shape that the saved adapter has.
        path: As `load_adapter` takes it.

    Raises:
        AdapterError: Files are missing or broken, or the adapter does not fit the model's.
    """
    _fill(model, path, _read_adapter(Path(path))[1])


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Returns the tensors of the adapter under the names they are saved by, in host memory.

    All processes that hold parts of the model ask for them together.

    Args:
        model: From `attach_adapter` or `load_adapter`.
    """
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in sorted(weights.items())}


def save_adapter(
    model: PeftModel,
    directory: Path,
    *,
    section: ModelSection,
    setup: TemplateSetup,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes the adapter, its tokenizer and template, and what a merge must know of the base.

    Args:
        model: From `attach_adapter` or `load_adapter`.
        directory: Where to; made if absent.
        section: The base it was trained on.
        setup: The tokenizer and special tokens it was trained with.
        weights: From `adapter_weights`, where one process writes what several hold.
    """
    from safetensors.torch import save

    directory.mkdir(parents=True, exist_ok=True)
    tensors = adapter_weights(model) if weights is None else weights
    data = save(tensors, metadata={"format": "pt"})  # `save_file`'s files are their owner's alone
    (directory / ADAPTER_WEIGHTS).write_bytes(data)
    config = copy(model.peft_config[_ADAPTER])
    config.target_modules = sorted(config.target_modules)  # PEFT makes a set of them, saved in any order
    config.save_pretrained(directory, inference_mode=True)
    write_adapter_card(directory, section.base, config.target_modules)
    save_tokenizer(setup.tokenizer, directory)
    model.generation_config.save_pretrained(directory)
    base = resolve_base(section.base, section.revision)
    facts = BaseFacts(
        base=section.base,
        revision=section.revision,
        fingerprint=base_fingerprint(base),
        quantization=section.quantization,
        dtype=str(model.get_base_model().dtype).removeprefix("torch."),
        resize_to=setup.resize_to,
        trained_token_ids=list(setup.trained_token_ids),
        checksums=tensor_checksums(base),
        adapter_checksum=file_checksum(directory / ADAPTER_WEIGHTS),
    )
    facts.write(directory)


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Writes a tokenizer so that transformers 4 reads it too, and without the flags of how it was loaded."""
    tokenizer.save_pretrained(directory)
    settle_tokenizer_config(directory)


def adapter_tensors(model: Any) -> dict[str, torch.nn.Parameter]:
    """Returns the adapter's parameters by name: LoRA matrices, DoRA magnitudes, trained token rows."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name or ".trainable_tokens_delta." in name
    }


def trained_digest(model: Any) -> str:
    """Returns a digest of everything that is trained: the same until a step has changed something.

    All processes that hold parts of the model ask for it together.
    """
    digest = new_digest()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode())
            values = whole(parameter.detach()).float().cpu().contiguous()
            digest.update(values.numpy().tobytes())
    return str(digest.hexdigest())


def keep_float32(model: Any) -> None:
    """Makes the adapter's parameters float32, in place.

    Needed again after `SFTTrainer` is built: on a quantized base it casts trainable parameters to bfloat16.
    """
    for parameter in adapter_tensors(model).values():
        parameter.data = parameter.data.float()


def own_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """Returns the gradient that a parameter itself has, as a whole."""
    return None if parameter.grad is None else whole(parameter.grad)


def dead_adapters(
    model: Any, gradient_of: Callable[[torch.Tensor], torch.Tensor | None] = own_gradient
) -> list[str]:
    """Returns the names of trainable adapter tensors that the last backward should have reached but did not.

    A tensor without a gradient is dead, and so is one whose gradient is exactly zero, with two exceptions.
    LoRA starts with B = 0, through which no signal reaches A, so A counts only once B has moved (not in the
    first step, nor while warm-up keeps the learning rate at zero). Rows of input tokens have a gradient only
    if they occurred in the batch, so a zero one proves nothing.

    Args:
        model: After a backward, before the gradients are cleared.
        gradient_of: Returns a parameter's whole gradient, or None where it has none.
    """
    parameters = adapter_tensors(model)
    trained = {name: p for name, p in parameters.items() if p.requires_grad and p.numel()}
    grown = {name: parameters[name.replace(".lora_A.", ".lora_B.")] for name in trained if ".lora_A." in name}
    found_of = {name: gradient_of(p) for name, p in trained.items()}
    gradients = {name: gradient for name, gradient in found_of.items() if gradient is not None}
    looked_at = [*gradients.values(), *grown.values()]
    found = torch.stack([whole(x).any() for x in looked_at]).tolist() if looked_at else []  # waits once
    reached = dict(zip(gradients, found, strict=False))
    moved = dict(zip(grown, found[len(gradients) :], strict=True))
    return [
        name
        for name in trained
        if name not in gradients
        or not (reached[name] or (not moved[name] if name in moved else ".embeddings." in name))
    ]


def _wrap(model: Any, config: PeftConfig) -> PeftModel:
    if not _has_our_mixer(model):
        raise AdapterError(
            "this model does not carry mamba-sft's mixer, so it could skip an adapter on `out_proj`",
            hint="call `mamba_sft.kernels.falcon_mamba.install(model)` first",
        )
    wrapped = get_peft_model(model, config, adapter_name=_ADAPTER)
    keep_rows_on_device(wrapped)
    head = wrapped.get_output_embeddings()
    if "bias" not in head._parameters:  # TRL asks for it, and PEFT's wrapper of trained rows hides it
        head.register_parameter("bias", None)
    for module in wrapped.modules():
        if type(module.__dict__.get("state")).__name__ == "MatmulLtState":
            module.register_forward_pre_hook(_keep_int8_scales)
    # By default a save asks the hub whether the vocabulary grew, then stores both matrices; ours has rows.
    wrapped.save_pretrained = partial(wrapped.save_pretrained, save_embedding_layers=False)
    keep_float32(wrapped)
    return wrapped


def _keep_int8_scales(module: Any, inputs: Any) -> None:
    # DoRA on a CPU moves an int8 weight after its first use; bitsandbytes then looks for its scales in it.
    if module.state.SCB is not None and module.weight.SCB is None:
        module.weight.CB = None


def _trained_rows(model: Any, token_ids: Sequence[int]) -> dict[str, list[int]] | None:
    if not token_ids:
        return None
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    # PEFT extends the rows of a tied matrix to its other use.
    return dict.fromkeys(("embeddings",) if tied else ("embeddings", "lm_head"), sorted(set(token_ids)))


def _fill(wrapped: PeftModel, path: str | Path, weights: dict[str, torch.Tensor]) -> None:
    own = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    weights = {name: part_of(tensor, own.get(name)) for name, tensor in weights.items()}
    try:
        result = set_peft_model_state_dict(wrapped, weights, adapter_name=_ADAPTER)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise _misfit(path, error) from error
    odd = sorted(adapter_tensors(wrapped).keys() & set(result.missing_keys)) + list(result.unexpected_keys)
    if odd:
        raise AdapterError(
            f"the adapter in `{path}` does not fit this model: {len(odd)} tensors are in one but not in the "
            f"other, such as `{odd[0]}`",
            hint="the base has another number of layers, or its config and weights do not belong together",
        )


def _misfit(path: str | Path, error: Exception) -> AdapterError:
    return AdapterError(
        f"the adapter in `{path}` does not fit this model: {error}", hint="load the base it was trained on"
    )


def _write_rows(model: PeftModel) -> None:
    # Otherwise every forward copies both whole matrices. Disabling the adapter, PEFT's way, undoes it.
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.token_adapter.merge()


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    names = [name for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    leaves = Counter(name.rpartition(".")[2] for name in names)
    existing = ", ".join(f"`{leaf}` ({count} of them)" for leaf, count in leaves.items())
    problems = [] if targets else ["`adapter.target_modules` is empty"]
    for target in targets:
        leaf = target.rpartition(".")[2]
        if leaf in _REFUSED:
            problems.append(f"`{target}` cannot carry LoRA: {_REFUSED[leaf]}")
        elif not any(name == target or name.endswith(f".{target}") for name in names):
            problems.append(f"`{target}` matches no projection of this model")
    if problems:
        raise AdapterError("\n".join(problems), hint=f"LoRA goes on {existing}")


def _read_adapter(path: Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            raise AdapterError(f"no `{name}` in `{path}`", hint="give the `adapter/` directory of a run")
    said = read_adapter_config(path / ADAPTER_CONFIG)
    if said.get("peft_type") != "LORA":
        raise AdapterError(f"the adapter in `{path}` is {said.get('peft_type')!s:.80}, not LoRA")
    if uses := used(said, OTHERS):
        raise AdapterError(f"`{path / ADAPTER_CONFIG}` uses what is not known here: {', '.join(uses)}")
    try:
        weights = load_file(path / ADAPTER_WEIGHTS)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            **{name: said[name] for name in HONOURED if name != "peft_type" and said.get(name) is not None},
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"cannot read the adapter in `{path}`: {error}", hint="copy it again") from error
    _check_rank(path, config, weights)
    return config, weights


def _check_rank(path: Path, config: LoraConfig, weights: dict[str, torch.Tensor]) -> None:
    """Refuses ranks that no tensor has: matrices of them would be allocated first."""
    highest = max((value.shape[0] for name, value in weights.items() if ".lora_A." in name), default=0)
    named = max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r
    if named > highest:
        raise AdapterError(
            f"`{path / ADAPTER_CONFIG}` names a rank of {named:,}; the highest in `{ADAPTER_WEIGHTS}` is "
            f"{highest}",
            hint="the two files must be of the same training",
        )
