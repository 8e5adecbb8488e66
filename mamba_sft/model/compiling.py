"""The step of one token by `torch.compile`, for who asks for it: tried, and held against the model's own.

One block is compiled and serves all, since they are alike: of a whole 7B the compiler would make the same
kernels 64 times, and take minutes.
"""

from __future__ import annotations

import copy
import logging
import time
import weakref
from typing import Any

import torch

from mamba_sft.kernels.plain_ops import can_step, plain_step
from mamba_sft.model.full_weights import without_wrapper
from mamba_sft.wording import first_line, time_text

logger = logging.getLogger(__name__)

_STEPS: weakref.WeakKeyDictionary[Any, CompiledStep] = weakref.WeakKeyDictionary()
"""Models for which a step was made."""
_TOLERANCE = 2e-2
"""How far its scores may be from the model's own, of the largest: other kernels round 16 bits elsewhere."""


class CompiledStep:
    """Reads one token of each row on top of a cache.

    Args:
        model: A causal FalconMamba with our mixer, bare or PEFT-wrapped, in evaluation mode.
    """

    def __init__(self, model: Any):
        self._model = without_wrapper(model)
        self._step = torch.compile(plain_step)

    def __call__(self, ids: Any, cache: Any) -> Any:
        """Returns the scores `(B, vocabulary)` in fp32; the cache moves on.

        Args:
            ids: `(B, 1)` int64 on the model's device.
            cache: What the rows have read.
        """
        backbone, head = self._model.backbone, self._model.lm_head
        with torch.no_grad():
            hidden = backbone.embeddings(ids)
            for block, layer in zip(backbone.layers, cache.layers, strict=True):
                hidden = self._step(block, hidden, layer.conv_states[0], layer.recurrent_states[0])
            hidden = backbone.norm_f(hidden)
            return head(hidden.to(next(head.parameters()).dtype))[:, -1].float()


def compiled_step(model: Any) -> CompiledStep | None:
    """Returns the step that was made for a model, or None."""
    return _STEPS.get(model)


def compile_step(model: Any) -> None:
    """Has the step of one token compiled, and says how long that took; where it fails, why.

    Args:
        model: As `CompiledStep`'s.
    """
    logger.info("torch.compile makes the step of one token: the first time this can take a minute")
    started = time.perf_counter()
    step = CompiledStep(model)
    try:
        for block in model.modules():
            if hasattr(block, "mixer") and not can_step(block):
                raise RuntimeError(f"the model's activation is `{block.mixer.activation}`, not `silu`")
        _check(model, step)
    except Exception as error:  # a compiler, and whatever it calls, has errors of many kinds
        reason = first_line(error)
        logger.warning("torch.compile does not make the step of one token, so it is as without: %s", reason)
        return
    _STEPS[model] = step
    logger.info("compiled in %s", time_text(time.perf_counter() - started))


def _check(model: Any, step: CompiledStep) -> None:
    """Holds two tokens of a compiled step against the model's own."""
    with torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1, return_dict=False)[1]
        beside, token = copy.deepcopy(cache), ids[:, :1]
        for _ in range(2):
            own = model(
                input_ids=token, cache_params=beside, use_cache=True, logits_to_keep=1, return_dict=False
            )[0][:, -1].float()
            found = step(token, cache)
            if not (found - own).abs().max() <= _TOLERANCE * own.abs().max():
                raise RuntimeError("it does not give what the model gives")
