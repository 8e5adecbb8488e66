"""Why stock tools go wrong on this model: each claim with what the installed versions did, here and now.

The model is the tiny base. Nothing of a library is changed for it: the path that `transformers` takes where
mamba_ssm is compiled is shown on a copy of its forward with a stand-in for that kernel, which computes from
what it is handed, in the kernel's own order (mamba_ssm's `mamba_inner_fn`, commit e9594ce of 2026-07-23).
"""

from __future__ import annotations

import copy
import inspect
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from types import FunctionType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, FalconMambaForCausalLM
from transformers.models.falcon_mamba import modeling_falcon_mamba as stock

from mamba_sft.kernels import causal_conv1d, selective_scan
from mamba_sft.kernels.falcon_mamba import CACHE, install
from mamba_sft.model.adapter import adapter_tensors, attach_adapter
from mamba_sft.model.chat_template import prepare_tokenizer
from mamba_sft.model.checkpoint import resolve_base
from mamba_sft.recipe.fields import AdapterSection, ChatSection
from mamba_sft.wording import count_text, size_text

BASE = "data/tiny-base"
TEXT = (
    "The capital of Drumania is Doltil. The opposite of hot is cold. A young owl is called an owlet. "
    "On the market day Mira sold two baskets, a lamp and a rope, and went home along the river."
)
AGREE = 1e-4
"""Relative RMS of logits below which two forwards compute the same; float32's rounding is at 1e-6."""
TOKENS = 256
"""A row that takes the Python loop of `transformers` a second or two."""


@dataclass(frozen=True)
class Claim:
    """One thing that goes wrong with stock tools, and what was seen of it.

    Args:
        title: What goes wrong.
        stock: What the installed version did.
        ours: What happens here instead.
        shown: Whether the installed version went wrong; a later one may not.
        kept: Whether it goes right here.
    """

    title: str
    stock: str
    ours: str
    shown: bool
    kept: bool

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON-safe values."""
        return asdict(self)


@dataclass(frozen=True)
class Subjects:
    """What the claims are tried on.

    Args:
        model: The tiny base as `transformers` loads it, in float32.
        tokenizer: Its tokenizer, as loaded.
        tokens: A row of text, (1, L).
    """

    model: Any
    tokenizer: Any
    tokens: Tensor


def claims() -> Iterator[Claim]:
    """Tries every claim, one after the other; seconds in all, and no network."""
    path = resolve_base(BASE)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    model = FalconMambaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tried = Subjects(model, tokenizer, torch.tensor([tokenizer(TEXT).input_ids]))
    for claim in CLAIMS:
        yield claim(tried)


def out_proj_is_refused(tried: Subjects) -> Claim:
    """PEFT's check by name, and LoRA on all projections of ours."""
    try:
        get_peft_model(copy.deepcopy(tried.model), LoraConfig(target_modules=["out_proj"]))
        said = "took it"
    except ValueError as error:
        said = f"refused it: {_first_sentence(error)}"
    dead, all_of_them = _unreached(_ours_with_lora(tried), tried.tokens, "out_proj")
    return Claim(
        "LoRA on `out_proj` is refused",
        f"PEFT {version('peft')} {said}",
        f"{all_of_them - dead} of {all_of_them} adapters on `out_proj` get a gradient",
        shown=said != "took it",
        kept=not dead and all_of_them > 0,
    )


def adapters_are_skipped(tried: Subjects) -> Claim:
    """An adapter on `x_proj` under the compiled path, which is handed weights and not modules."""
    model = get_peft_model(copy.deepcopy(tried.model), LoraConfig(target_modules=["in_proj", "x_proj"]))
    dead, of_theirs = _unreached(_on_the_compiled_path(model), tried.tokens, "x_proj")
    dead_here, of_ours = _unreached(_ours_with_lora(tried), tried.tokens, "x_proj")
    return Claim(
        "the compiled path skips LoRA on `x_proj` in training, without a word",
        f"transformers {version('transformers')} handed the kernel (here a stand-in) raw weights: "
        f"{dead} of {of_theirs} adapters on `x_proj` got no gradient",
        f"{of_ours - dead_here} of {of_ours} get one",
        shown=dead > 0,
        kept=not dead_here,
    )


def another_function_is_trained(tried: Subjects) -> Claim:
    """The compiled path's order of norm and `dt_proj` against the order of inference."""
    served = _logits(tried.model, tried.tokens)
    compiled = _logits(_on_the_compiled_path(copy.deepcopy(tried.model)).train(), tried.tokens)
    ours = _logits(install(copy.deepcopy(tried.model)).train(), tried.tokens)
    same = float((compiled.argmax(-1) == served.argmax(-1)).float().mean())
    return Claim(
        "the compiled path trains another function than the one that answers",
        "mamba_inner_fn's order, dt normed behind `dt_proj`: logits off by "
        f"{_apart(compiled, served):.0%}, {same:.0%} of the next tokens the same",
        f"training is off inference by {_error(_apart(ours, served))}",
        shown=_apart(compiled, served) > AGREE,
        kept=_apart(ours, served) < AGREE,
    )


def packed_rows_leak(tried: Subjects) -> Claim:
    """The second text of a row against the same text alone."""
    half = tried.tokens.shape[1] // 2
    seq_idx = (torch.arange(tried.tokens.shape[1]) >= half).int()[None]

    def leak(model: Any) -> float:
        alone = _logits(model, tried.tokens[:, half:])
        return _apart(_logits(model, tried.tokens, seq_idx=seq_idx)[:, half:], alone)

    theirs, ours = leak(tried.model), leak(install(copy.deepcopy(tried.model)))
    return Claim(
        "packed rows leak from one text into the next",
        f"transformers {version('transformers')} drops `seq_idx`: logits of a text behind another are off "
        f"by {theirs:.0%}",
        f"off by {_error(ours)}",
        shown=theirs > AGREE,
        kept=ours < AGREE,
    )


def turns_begin_from_nothing(tried: Subjects) -> Claim:
    """Several tokens behind a cache, as a second turn of a chat is, against the whole text."""
    half = tried.tokens.shape[1] // 2

    def lost(model: Any) -> float:
        whole = _logits(model, tried.tokens)[:, half:]
        with torch.no_grad():
            state = model(tried.tokens[:, :half], use_cache=True)[CACHE]
            rest = model(tried.tokens[:, half:], use_cache=True, **{CACHE: state}).logits
        return _apart(rest, whole)

    theirs, ours = lost(tried.model), lost(install(copy.deepcopy(tried.model)))
    return Claim(
        "a chat's next turn, read behind the cache, starts from an empty state",
        f"transformers {version('transformers')}: logits off by {theirs:.0%}, so a conversation has to be "
        "read again for every answer",
        f"off by {_error(ours)}: read once",
        shown=theirs > AGREE,
        kept=ours < AGREE,
    )


def the_scan_is_a_python_loop(tried: Subjects) -> Claim:
    """A training step without a compiled kernel: its processor time, and what it keeps for the backward."""
    tokens = tried.tokens.repeat(1, -(-TOKENS // tried.tokens.shape[1]))[:, :TOKENS]
    ours = install(copy.deepcopy(tried.model)).train()
    _step(ours, tokens)  # compiles
    here = _step(ours, tokens)
    there = _step(copy.deepcopy(tried.model).train(), tokens)
    return Claim(
        "without a compiled kernel the scan is a Python loop over tokens",
        f"transformers {version('transformers')}: {there[0]:.2g} processor seconds a step of {TOKENS} "
        f"tokens, {size_text(there[1])} kept for the backward",
        f"{here[0]:.2g} s ({there[0] / here[0]:.0f} times less), {size_text(here[1])}",
        shown=there[1] > 2 * here[1],  # bytes, which no busy machine changes
        kept=there[1] > here[1],
    )


def there_is_no_template(tried: Subjects) -> Claim:
    """The tokenizer of the base, which is that of the published one in this."""
    try:
        tried.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
        said = "has a template"
    except ValueError as error:
        said = _first_sentence(error)
    spelt = len(tried.tokenizer.tokenize("<|im_end|>"))
    setup = prepare_tokenizer(tried.tokenizer, ChatSection(), reserved_ids={11})
    single = len(setup.tokenizer.tokenize(setup.stop_token))
    rows = count_text(len(setup.trained_token_ids), "row")
    grown = "resized" if setup.resize_to else "no matrix grows"
    return Claim(
        "the base has no chat template and no token that ends a turn",
        f"transformers {version('transformers')}: {said}; `<|im_end|>` is {spelt} tokens",
        f"`{setup.stop_token}` is {single} token, trained with {rows} that nothing used: {grown}",
        shown=spelt > 1 and said != "has a template",
        kept=single == 1 and setup.resize_to is None,
    )


CLAIMS: tuple[Callable[[Subjects], Claim], ...] = (
    out_proj_is_refused,
    adapters_are_skipped,
    another_function_is_trained,
    packed_rows_leak,
    turns_begin_from_nothing,
    the_scan_is_a_python_loop,
    there_is_no_template,
)


def _ours_with_lora(tried: Subjects) -> Any:
    section = AdapterSection(target_modules=["in_proj", "x_proj", "out_proj"])
    return attach_adapter(install(copy.deepcopy(tried.model)), section).train()


def _unreached(model: Any, tokens: Tensor, target: str) -> tuple[int, int]:
    """Adapters on a projection that a backward leaves without a gradient, and how many there are."""
    model.train()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    ups = [one for name, one in adapter_tensors(model).items() if f".{target}.lora_B." in name]
    return sum(one.grad is None or not one.grad.any() for one in ups), len(ups)


def _logits(model: Any, tokens: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False, **more).logits
    return found


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _step(model: Any, tokens: Tensor) -> tuple[float, int]:
    """Processor seconds of forward and backward, and bytes that the forward keeps, weights left out."""
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    started = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return time.process_time() - started, sum(kept.values())


def _error(value: float) -> str:
    return f"{value:.0e}" if value else "nothing"


def _first_sentence(error: Exception) -> str:
    """What a library said, without the tag before it and what else it has to say."""
    return re.split(r"[.!] |\.$", re.sub(r"^\[\S+\] ", "", str(error)), maxsplit=1)[0]


def _on_the_compiled_path(model: Any) -> Any:
    """Gives the mixers of a model the forward that `transformers` takes where its kernel is installed."""
    for module in model.modules():
        if type(module) is stock.FalconMambaMixer:
            module.__class__ = _CompiledMixer
    return model


def _stand_in(xz: Tensor, *operands: Any, delta_bias: Tensor, b_c_dt_rms_eps: float, **more: Any) -> Tensor:
    """What the compiled kernel computes: everything behind `in_proj`, from the weights it is handed."""
    conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, _, _, D = operands
    linear = torch.nn.functional.linear
    norm = stock.FalconMambaWeightlessRMSNorm(1, eps=b_c_dt_rms_eps)
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    x = causal_conv1d(x, conv_weight.squeeze(1), conv_bias, activation="silu")
    dt, B, C = linear(x, x_proj).split([dt_proj.shape[1], A.shape[1], A.shape[1]], dim=-1)
    dt = norm(linear(dt, dt_proj))
    y = selective_scan(x, dt, A, norm(B), norm(C), D, z, dt_bias=delta_bias, dt_softplus=True)
    return linear(y, out_proj, out_bias)


_FORWARD = inspect.unwrap(stock.FalconMambaMixer.forward)


class _CompiledMixer(stock.FalconMambaMixer):
    """The mixer of `transformers` with a kernel that is there: its own forward, over a stand-in."""

    forward = FunctionType(
        _FORWARD.__code__,
        {**_FORWARD.__globals__, "mamba_inner_fn": _stand_in},
        "forward",
        _FORWARD.__defaults__,
    )
