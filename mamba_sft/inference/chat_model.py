"""A model that is ready to talk: from a run, an adapter, a model directory, the hub or a GGUF file."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mamba_sft.errors import AdapterError, DataError
from mamba_sft.inference.generation import stop_token_ids
from mamba_sft.inference.model_places import ModelPlace, find_place, no_adapter
from mamba_sft.inference.request import Running
from mamba_sft.model.adapter import load_adapter
from mamba_sft.model.base_facts import BaseFacts
from mamba_sft.model.base_view import without_adapter
from mamba_sft.model.chat_template import TemplateSetup, find_stop_token
from mamba_sft.model.checkpoint import base_fingerprint
from mamba_sft.model.compiling import compile_step
from mamba_sft.model.loading import apply_setup, load_model, load_setup, load_tokenizer, resolve_base
from mamba_sft.model.warming_up import warm_up
from mamba_sft.run import Run


@dataclass
class ChatModel:
    """A model and all that a conversation with it needs.

    Args:
        name: What to call it: where it came from, or `base` and `tuned` in a comparison.
        model: A FalconMamba language model with our mixer, with or without an adapter; or a `GGUFModel`.
        tokenizer: With its chat template, unless it is a bare base model's.
        stop_ids: Ids that end an answer.
        system: The system message it was trained with, if any.
        one_at_a_time: Whether it answers one prompt at a time only.
        source: Where it is from and how it is run, or None where it was not loaded from a place.
    """

    name: str
    model: Any
    tokenizer: Any
    stop_ids: frozenset[int]
    system: str | None = None
    one_at_a_time: bool = False
    source: tuple[ModelPlace, Running] | None = None

    @property
    def state_bytes(self) -> int:
        """Size of the state of one conversation, however long it is."""
        if (own := getattr(self.model, "state_bytes", None)) is not None:
            return int(own)
        config = self.model.config
        conv = config.intermediate_size * config.conv_kernel * self.model.dtype.itemsize
        scan = config.intermediate_size * config.state_size * 4
        return int(config.num_hidden_layers * (conv + scan))


def load_chat_model(
    where: ModelPlace | Run | str | Path,
    *,
    merged: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    quantization: str | None = None,
    compile: bool = False,
    needs_template: bool = True,
    needs_adapter: bool = False,
) -> ChatModel:
    """Loads what is at `where`, ready to talk; what can be refused is refused before the weights are read.

    Args:
        where: A run (its base with its adapter on top), a checkpoint or the adapter directory of one, a model
            directory, a GGUF file or a hub id; or what `find_place` found of it.
        merged: Take the run's merged checkpoint rather than base and adapter.
        device: `cpu`, `cuda`, or `auto`: a GPU where there is one.
        dtype: What it computes in: `bfloat16`, `float16`, `float32`, or `auto`: what the device is good at.
            None takes what the run was trained with, or what the checkpoint is stored in.
        quantization: How to hold the weights in memory: `nf4`, `int8` or `none`; None takes what the run was
            trained with, or none.
        compile: Have `torch.compile` make the step of one token.
        needs_template: Refuse a model that cannot hold conversations.
        needs_adapter: Refuse a model without an adapter.

    Raises:
        UsageError: The run has no adapter, or no merged checkpoint; or it cannot be run like this.
        DataError: There is no chat template.
        ModelError: There is no such model, or the device is absent.
        AdapterError: The adapter is incomplete, does not fit, or was trained on another base.
    """
    running = Running(device, dtype, quantization, compile)
    source = (
        where
        if isinstance(where, ModelPlace)
        else find_place(where, merged=merged, needs_adapter=needs_adapter)
    )
    running.check(source, compare=needs_adapter)
    system = source.recipe.chat.system if source.recipe is not None else None
    if source.gguf is not None:
        return replace(_load_gguf(source.name, source.gguf, system, needs_template), source=(source, running))
    name = source.name
    setup = None if source.adapter is None else _setup(source, source.adapter)
    tokenizer = load_tokenizer(source.section) if setup is None else setup.tokenizer
    if needs_template:
        require_template(name, tokenizer)
    asked = {"dtype": dtype, "quantization": quantization}
    held_as = {field: value for field, value in asked.items() if value is not None}
    model = load_model(source.section.model_copy(update=held_as), device=None if device == "auto" else device)
    if setup is not None and source.adapter is not None:
        apply_setup(model, setup)
        model = load_adapter(model, source.adapter)
    model.eval()
    warm_up(model)
    if compile:
        compile_step(model)
    return ChatModel(
        name, model, tokenizer, _stop_ids(model, tokenizer, name), system, source=(source, running)
    )


def _load_gguf(name: str, path: Path, system: str | None, needs_template: bool) -> ChatModel:
    from mamba_sft.inference.gguf_model import load_gguf

    model, tokenizer = load_gguf(path)
    if needs_template:
        require_template(name, tokenizer)
    return ChatModel(name, model, tokenizer, _stop_ids(model, tokenizer, name), system, one_at_a_time=True)


def _stop_ids(model: Any, tokenizer: Any, name: str) -> frozenset[int]:
    stops = stop_token_ids(model, tokenizer)
    if tokenizer.chat_template:
        stops |= {tokenizer.convert_tokens_to_ids(find_stop_token(tokenizer, name))}
    return stops


def require_template(name: str, tokenizer: Any) -> None:
    """Checks that a model can hold conversations.

    Raises:
        DataError: Its tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"`{name}` has no chat template: it is a base model that continues text",
            hint="train it first, or let it continue plain text:"
            f" `mamba-sft generate {shlex.quote(name)} --raw --prompt 'Once upon a time'`",
        )


def split_chat_model(chat_model: ChatModel) -> tuple[ChatModel, ChatModel]:
    """Returns the base and the tuned model inside one adapted model; both use the tuned one's template.

    They share their weights and nothing else, so any number of threads may ask either of them.

    Raises:
        UsageError: The model has no adapter, so there is nothing to compare with.
    """
    if not hasattr(chat_model.model, "peft_config"):
        raise no_adapter(chat_model.name)
    base = replace(chat_model, name="base", model=without_adapter(chat_model.model))
    return base, replace(chat_model, name="tuned")


def _setup(source: ModelPlace, adapter: Path) -> TemplateSetup:
    """Returns the tokenizer that the adapter was trained with, and what it needs of the base."""
    section = source.section
    if source.facts is None and source.recipe is not None:
        return load_setup(source.recipe.model, source.recipe.chat)
    facts = source.facts or BaseFacts.read(adapter)
    if base_fingerprint(resolve_base(section.base, section.revision)) != facts.fingerprint:
        raise AdapterError(
            f"`{section.base}` is not the base that `{adapter}` was trained on",
            hint="restore the base, or give the revision it had then as `model.revision` in the run's recipe",
        )
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        raise AdapterError(f"the tokenizer in `{adapter}` cannot be read: {error}") from error
    try:
        stops = GenerationConfig.from_pretrained(adapter).eos_token_id
    except Exception as error:  # as many kinds as it has values
        raise AdapterError(f"the generation config in `{adapter}` cannot be read: {error}") from error
    return TemplateSetup(
        tokenizer=tokenizer,
        trained_token_ids=facts.trained_token_ids,
        resize_to=facts.resize_to,
        stop_token=tokenizer.eos_token,
        stop_token_ids=stops if isinstance(stops, list) else [stops],
    )
