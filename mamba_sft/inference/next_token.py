"""The step of one token: the model's or a compiled one, and on a GPU all of it recorded and launched as one.

A 7B's token is some 2,000 launches, and a GPU is done with each before the host has made the next. A CUDA
graph launches all of them at once. What it records is held against the model's own step before it is used.
"""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from typing import Any

import torch

from mamba_sft.model.compiling import compiled_step
from mamba_sft.model.shards import is_sharded
from mamba_sft.wording import first_line

logger = logging.getLogger(__name__)

_UNFIT: weakref.WeakSet[Any] = weakref.WeakSet()
"""Models whose step was tried and could not be recorded: they are not tried again at every answer."""
PATIENCE = 4
"""Which token's step is recorded; that costs about as much as three tokens, so short answers do without."""
_TOLERANCE = 1e-3
"""How far the recorded step may be from the model's own, of the largest number: the kernels are the same."""


class NextToken:
    """Reads one token of each row on top of a cache, which it moves on, and returns the scores of the next.

    Args:
        model: A causal FalconMamba with our mixer, bare or PEFT-wrapped, in evaluation mode.
        cache: What the rows have read. Its tensors must stay the same while this is used.
    """

    def __init__(self, model: Any, cache: Any):
        self._model, self._cache = model, cache
        self._compiled = compiled_step(model)
        self._graph: Any = None
        self._ids: Any = None
        self._scores: Any = None
        self._read = 0

    @property
    def is_recorded(self) -> bool:
        """Whether the step is a recorded one: then rows may not leave the cache."""
        return self._graph is not None

    def __call__(self, ids: Any) -> Any:
        """Returns the scores `(B, vocabulary)` in fp32; a recorded step writes the next ones over them.

        Args:
            ids: `(B, 1)` int64 on the model's device.
        """
        self._read += 1
        alone = not is_sharded(self._model)  # a graph cannot fetch what other processes hold
        if self._read == PATIENCE and ids.is_cuda and alone and self._model not in _UNFIT:
            return self._record(ids)
        if self._graph is None:
            return self._step(ids, self._cache)
        self._ids.copy_(ids)
        self._graph.replay()
        return self._scores

    def _step(self, ids: Any, cache: Any) -> Any:
        return forward(self._model, ids, cache)[0] if self._compiled is None else self._compiled(ids, cache)

    def _record(self, ids: Any) -> Any:
        before, beside = copy.deepcopy(self._cache), copy.deepcopy(self._cache)
        own = self._step(ids, beside)
        try:
            graph, self._ids = torch.cuda.CUDAGraph(), ids.clone()
            with torch.cuda.graph(graph):  # nothing is computed here
                scores = self._step(self._ids, self._cache)
            graph.replay()
            if _differ([scores, *_states(self._cache)], [own, *_states(beside)]):
                raise RuntimeError("it does not give what the model gives")
        except RuntimeError as error:
            _UNFIT.add(self._model)
            _say_once(first_line(error))
            _restore(self._cache, before)
            return self._step(ids, self._cache)
        self._graph, self._scores = graph, scores
        return scores


def forward(model: Any, ids: Any, cache: Any, mask: Any = None) -> tuple[Any, Any]:
    """Returns the next token's scores `(B, vocabulary)` in fp32, and the cache.

    Args:
        model: As `NextToken`'s.
        ids: `(B, L)` int64 on the model's device.
        cache: What was read before, or None.
        mask: `(B, L)`, zeros where a row has not begun; None where all have.
    """
    with torch.no_grad():
        logits, cache, *_ = model(
            input_ids=ids,
            attention_mask=mask,
            cache_params=cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=False,
        )
    return logits[:, -1].float(), cache


def _states(cache: Any) -> list[Any]:
    return [
        state
        for layer in cache.layers
        for states in (layer.conv_states, layer.recurrent_states)
        for state in states.values()
    ]


def _restore(cache: Any, before: Any) -> None:
    for state, earlier in zip(_states(cache), _states(before), strict=True):
        state.copy_(earlier)


def _differ(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether any tensor is farther from its like than rounding; NaN is. The host waits once for all."""
    apart = [
        ~((one - other).abs().max() <= _TOLERANCE * other.abs().max())
        for one, other in zip(ours, theirs, strict=True)
    ]
    return bool(torch.stack(apart).any())


@functools.cache
def _say_once(reason: str) -> None:
    logger.info("tokens are computed launch by launch, not as one CUDA graph: %s", reason)
