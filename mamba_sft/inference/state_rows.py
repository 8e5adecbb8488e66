"""Rows of states: some of a batch's, each as often as wanted, and several batches as one.

A cache of `transformers` holds a convolution state and a recurrent state for each layer, with the rows of the
batch in front. Nothing else belongs to a row, since the size of a state does not depend on what was read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch


def rows_of(cache: Any, rows: Sequence[int]) -> Any:
    """Returns a cache of its own with these rows of another, each as often as it is named.

    Args:
        cache: What was read, or None where nothing was.
        rows: Rows of it, in the order of the new ones.
    """
    if cache is None:
        return None
    return _changed(cache, lambda states: states[0][torch.tensor(list(rows), device=states[0].device)])


def stacked(caches: Sequence[Any]) -> Any:
    """Returns one cache with the rows of several, in order; one alone is returned as it is."""
    if len(caches) == 1:
        return caches[0]
    return _changed(caches[0], torch.cat, *caches[1:])


def _changed(cache: Any, change: Callable[[list[Any]], Any], *others: Any) -> Any:
    """A cache like another, whose tensors are what `change` makes of its own and those at the same place."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer, *beside in zip(made.layers, *(other.layers for other in others), strict=True):
        layer.has_previous_state = dict(layer.has_previous_state)
        for name in ("conv_states", "recurrent_states"):
            parts = [getattr(one, name) for one in (layer, *beside)]
            setattr(layer, name, {key: change([part[key] for part in parts]) for key in parts[0]})
    return made
