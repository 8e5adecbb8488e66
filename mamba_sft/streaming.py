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

import torch
from torch import Tensor
from torch.nn.functional import pad

from mamba_sft.kernels.carry import Carry, LayerState
from mamba_sft.packing import IGNORED
from mamba_sft.randomness import RandomState, random_state, set_random_state

States = list[LayerState]
"""A state for each layer."""


@dataclass(frozen=True)
class Chunk:
    """Some positions of a batch.

    Args:
        inputs: `input_ids`, `attention_mask`, `seq_idx` and `shift_labels`, each (B, l). The label of a
            position is the token after it, for the last position the first of the next chunk.
        continues: (B, 1, 1) bool, the rows whose sequence began in an earlier chunk; None for the first.
    """

    inputs: dict[str, Tensor]
    continues: Tensor | None

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


def split(inputs: dict[str, Tensor], tokens: int | None) -> list[Chunk]:
    """Cuts a batch along its length.

    Args:
        inputs: From `packing.Collator`: `input_ids`, `labels`, `attention_mask` and `seq_idx`, each (B, L).
        tokens: Positions per chunk, of which the last may have fewer; None makes a single chunk.

    Returns:
        The chunks in order, at least one.
    """
    seq_idx = inputs["seq_idx"]
    length = seq_idx.shape[1]
    columns = {name: inputs[name] for name in ("input_ids", "attention_mask", "seq_idx")}
    columns["shift_labels"] = pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
    size = tokens or length
    chunks = []
    for start in range(0, length, size):
        continues = (seq_idx[:, start] == seq_idx[:, start - 1])[:, None, None] if start else None
        chunks.append(Chunk({name: x[:, start : start + size] for name, x in columns.items()}, continues))
    return chunks


@dataclass(frozen=True)
class Boundary:
    """What a chunk can be computed from again: the states before it and the random numbers it drew."""

    states: States | None
    random: RandomState


def sweep(backbone: Any, chunks: Sequence[Chunk], initial: States | None = None) -> list[Boundary]:
    """Runs all chunks but the last without a graph.

    Args:
        backbone: The `FalconMambaModel`.
        chunks: From `split`.
        initial: States before the first chunk; None starts from zeros.

    Returns:
        A boundary before each chunk, its states in host memory.
    """
    device = chunks[0].inputs["input_ids"].device
    states, boundaries = initial, []
    for number, chunk in enumerate(chunks):
        states = chunk.enter(states)
        kept = None if states is None else [(conv.cpu(), scan.cpu()) for conv, scan in states]
        boundaries.append(Boundary(kept, random_state(device)))
        if number + 1 < len(chunks):
            carry = Carry(states)
            inputs = {name: x for name, x in chunk.inputs.items() if name != "shift_labels"}
            with torch.no_grad():
                backbone(**inputs, carry=carry)
            states = carry.after
    return boundaries


Run = Callable[[Chunk, Carry, Callable[[Tensor], Tensor]], None]


def backpropagate(chunks: Sequence[Chunk], boundaries: Sequence[Boundary], run: Run) -> States:
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
    for chunk, boundary in zip(reversed(chunks), reversed(boundaries), strict=True):
        set_random_state(boundary.random, device)
        inner = chunk.continues is not None  # the states before the first chunk are not ours to train
        before = _leaves(boundary.states, device, requires_grad=inner)
        carry = Carry(before)
        run(chunk, carry, _closing(carry, gradients))
        if chunk is chunks[-1]:
            final = [(conv.detach(), scan.detach()) for conv, scan in carry.after]
            random = random_state(device)
        if inner and before is not None:
            gradients = chunk.enter([(_gradient(conv), _gradient(scan)) for conv, scan in before])
    set_random_state(random, device)
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


def _leaves(states: States | None, device: torch.device, *, requires_grad: bool) -> States | None:
    if states is None:
        return None
    return [
        (
            conv.to(device).detach().requires_grad_(requires_grad),
            scan.to(device).detach().requires_grad_(requires_grad),
        )
        for conv, scan in states
    ]


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
