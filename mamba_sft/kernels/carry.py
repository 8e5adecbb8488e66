"""The states of all layers on their way from one forward to the next, with gradients through both ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LayerState = tuple[Tensor, Tensor]
"""What one layer carries: the last inputs of its convolution (B, D, W - 1), its scan state (B, D, N)."""


class Carry:
    """The states that one forward starts from and, after it has run, those it ended with.

    Unlike a cache, which is overwritten in place, this only hands tensors in and out: a gradient reaches the
    states before, and one can be given to the states after. It belongs to a single forward.

    Args:
        before: A state for each layer; None starts from zeros.
    """

    def __init__(self, before: Sequence[LayerState] | None = None):
        self.before = before
        self._after: dict[int, LayerState] = {}

    def enter(self, layer: int) -> LayerState | tuple[None, None]:
        """Returns the states that layer number `layer` starts from."""
        return (None, None) if self.before is None else self.before[layer]

    def leave(self, layer: int, conv_state: Tensor, scan_state: Tensor) -> None:
        """Takes the states that a layer ended with.

        The first ones count: under activation checkpointing a layer runs again in the backward pass, and what
        it hands over then must not be kept alive with everything it was computed from. The last inputs are
        copied, because they are a view that would keep all inputs.
        """
        if layer not in self._after:
            self._after[layer] = conv_state.clone(memory_format=torch.contiguous_format), scan_state

    @property
    def after(self) -> list[LayerState]:
        """The states that the forward ended with, in the order of the layers."""
        return [self._after[layer] for layer in sorted(self._after)]

    def detach(self) -> None:
        """Lets go of what the final states were computed from, once their backward has run.

        Checkpointed blocks hold the carry they were called with, and through it each other: without this, the
        inputs of all of them stay until the next forward is done.
        """
        self._after = {layer: (conv.detach(), scan.detach()) for layer, (conv, scan) in self._after.items()}
