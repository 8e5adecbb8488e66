"""Exact back-propagation through a row of any length, in memory that does not grow with it.

A row is cut into chunks of `tokens` positions. A sweep without a graph finds the states at their boundaries;
then the chunks are taken from the last to the first, each computed again with its graph, starting from its
saved state, and the gradient of that state goes on into the chunk before. What reaches the weights is the
gradient of the whole row: the states are all that later positions know of earlier ones. The cost is a second
forward of all chunks but the last. Saved states lie in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mamba_sft.data.rows import IGNORED
from mamba_sft.kernels.carry import Carry, LayerState
from mamba_sft.training.random_state import current_random_state, restore_random_state

States = list[LayerState]
"""A state for each layer."""


@dataclass(frozen=True)
class Chunk:
    """Some positions of a batch.

    Args:
        inputs: `input_ids`, `seq_idx` and `shift_labels`, each (B, l). The label of a
            position is the token after it, for the last position the first of the next chunk.
        trained: (B, l) bool, on the host: the positions whose label is trained.
        source: (B, l) int32, on the host: the number of the source that each position is of.
        continues: (B, 1, 1) bool, the rows whose sequence began in an earlier chunk; None for the first.
    """

    inputs: dict[str, Tensor]
    trained: np.ndarray
    source: np.ndarray
    continues: Tensor | None

    @property
    def read(self) -> dict[str, Tensor]:
        """What the model reads of it: everything but the labels."""
        return {name: x for name, x in self.inputs.items() if name != "shift_labels"}

    def enter(self, states: States | None) -> States | None:
        """Returns the states this chunk starts from, given those the chunk before ended with.

        A sequence that starts exactly at the boundary starts from zeros. The same for gradients, the other
        way round.
        """
        if states is None or self.continues is None:
            return states
        return [
            (torch.where(self.continues, conv, 0.0), torch.where(self.continues, scan, 0.0))
            for conv, scan in states
        ]


def split(inputs: dict[str, Any], tokens: int | None) -> list[Chunk]:
    """Cuts a batch along its length.

    Args:
        inputs: From `packing.Collator`: `input_ids`, `labels`, `seq_idx`, `trained`, `source`, each (B, L).
        tokens: Positions per chunk, of which the last may have fewer; None makes a single chunk.

    Returns:
        The chunks in order, at least one.
    """
    seq_idx = inputs["seq_idx"]
    length = seq_idx.shape[1]
    columns = {name: inputs[name] for name in ("input_ids", "seq_idx")}
    columns["shift_labels"] = pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
    size = tokens or length
    chunks = []
    for start in range(0, length, size):
        continues = (seq_idx[:, start] == seq_idx[:, start - 1])[:, None, None] if start else None
        part = np.s_[:, start : start + size]
        chunks.append(
            Chunk(
                {name: x[part] for name, x in columns.items()},
                inputs["trained"][part],
                inputs["source"][part],
                continues,
            )
        )
    return chunks


class Boundaries:
    """What each chunk can be computed from again: the states before it, and the random numbers it drew.

    The states of all layers go to the host as one block, and come back as one: pinned, so that nobody waits
    for the copy. On the host they lie in one large block, because many small ones that live long, between the
    large ones that come and go, would scatter the heap until it takes many times what is in it.

    Args:
        chunks: How many there are.
        device: Where the model is.
        initial: The states before the first chunk; None is zeros.
    """

    def __init__(self, chunks: int, device: torch.device, initial: States | None):
        self._device = device
        self._initial = initial
        self._kept: Tensor | None = None  # (chunks, bytes of all states) uint8
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self._random = tuple(x.new_empty((chunks, *x.shape)) for x in current_random_state(device))

    def save(self, chunk: int, states: States | None) -> None:
        """Keeps what chunk number `chunk` starts from, and the present state of the random numbers."""
        for kept, now in zip(self._random, current_random_state(self._device), strict=True):
            kept[chunk] = now
        if chunk == 0 or states is None:
            return
        block = torch.cat([_as_bytes(x) for x in _wide_first(states)])
        if self._kept is None:
            rows = len(self._random[0])
            self._kept = torch.empty(
                (rows, len(block)), dtype=torch.uint8, pin_memory=self._device.type == "cuda"
            )
            self._shapes = [(x.shape, x.dtype) for x in _wide_first(states)]
        self._kept[chunk].copy_(block, non_blocking=True)

    def restore(self, chunk: int) -> States | None:
        """Returns the states before a chunk as leaves, and sets the random numbers back.

        They require a gradient, except for those before the first chunk, which are not ours to train.
        """
        # Cloned, because torch reads a generator's state from the start of the storage, whatever the view.
        restore_random_state(tuple(kept[chunk].clone() for kept in self._random), self._device)
        if chunk == 0 or self._kept is None:
            return self._initial
        block = self._kept[chunk].to(self._device, non_blocking=True)
        parts = block.split([shape.numel() * dtype.itemsize for shape, dtype in self._shapes])
        leaves = [
            part.view(dtype).view(shape).detach().requires_grad_()
            for part, (shape, dtype) in zip(parts, self._shapes, strict=True)
        ]
        layers = len(leaves) // 2
        return list(zip(leaves[layers:], leaves[:layers], strict=True))


def _wide_first(states: States) -> list[Tensor]:
    """The scan states, in 32 bits, before those of the convolutions: each begins where its type may begin."""
    return [scan for _, scan in states] + [conv for conv, _ in states]


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def sweep(backbone: Any, chunks: Sequence[Chunk], initial: States | None = None) -> Boundaries:
    """Runs all chunks but the last without a graph.

    Args:
        backbone: The `FalconMambaModel`.
        chunks: From `split`.
        initial: States before the first chunk, without a graph; None starts from zeros.

    Returns:
        What to compute each chunk from again, in host memory.
    """
    boundaries = Boundaries(len(chunks), chunks[0].inputs["input_ids"].device, initial)
    states = initial
    for number, chunk in enumerate(chunks):
        states = chunk.enter(states)
        boundaries.save(number, states)
        if number + 1 < len(chunks):
            carry = Carry(states)
            with torch.no_grad():
                backbone(**chunk.read, carry=carry)
            states = carry.after
    return boundaries


RunChunk = Callable[[Chunk, Carry, Callable[[Tensor], Tensor]], None]


def backpropagate(chunks: Sequence[Chunk], boundaries: Boundaries, run: RunChunk) -> States:
    """Runs the chunks from the last to the first and hands the gradients of the states back through them.

    Args:
        chunks: From `split`.
        boundaries: From `sweep`.
        run: Called with a chunk, the carry for its forward, and a function. It computes the chunk's share of
            the loss, passes it through the function, and calls backward on the result. Gradients of the
            weights add up over the calls. The last call is for `chunks[0]`.

    Returns:
        The states after the last chunk, detached.
    """
    device = chunks[0].inputs["input_ids"].device
    gradients: States | None = None
    for number, chunk in reversed(list(enumerate(chunks))):
        before = boundaries.restore(number)
        carry = Carry(before)
        run(chunk, carry, _closing(carry, gradients))
        carry.detach()
        if chunk is chunks[-1]:
            final = carry.after
            random = current_random_state(device)
        if number and before is not None:
            gradients = chunk.enter([(_gradient(conv), _gradient(scan)) for conv, scan in before])
    restore_random_state(random, device)
    return final


def _closing(carry: Carry, gradients: States | None) -> Callable[[Tensor], Tensor]:
    def close(loss: Tensor) -> Tensor:
        if gradients is None:
            return loss
        flat = [x for state in gradients for x in state]
        closed: Tensor = _Inject.apply(loss, flat, *(x for state in carry.after for x in state))
        return closed

    return close


class _Inject(torch.autograd.Function):
    """The loss, with gradients waiting behind it that its backward sends into `states` as they are.

    They come out of an earlier backward, so whatever the loss is scaled by (loss scaling of float16) is in
    them already.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *states: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], None, *ctx.gradients


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
