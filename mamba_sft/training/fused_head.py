"""Log-probabilities of the trained positions, without the logits of all positions and without a wait.

TRL's kernel makes them in tiles. TRL's own head (1.16.0, read 2026-11-27) finds the positions by a mask on
the device, where the host has to wait to know how many they are: four times in a micro-batch, there and back.
The collator knows them before anything is on the device, so this head is told.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from trl.kernels import ChunkedLogProbFunction

VOCABULARY_TILE = 32768
"""Logits of a position that exist at a time: TRL's own number, two tiles for Falcon-Mamba's 65,024."""


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Returns an array as a tensor on a device, without waiting for the copy."""
    found = torch.from_numpy(array)
    return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)


class Targets(NamedTuple):
    """What is predicted where.

    Args:
        positions: (N,) int64, into the batch as one row of B * L.
        tokens: (N,) int64, the token that follows each.
    """

    positions: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, shift_labels: Tensor, trained: np.ndarray) -> Targets:
        """Returns the trained ones of a batch.

        Args:
            shift_labels: (B, L) int64, the token after each position, on the device.
            trained: (B, L) bool, on the host: where a token is trained.
        """
        positions = send(np.flatnonzero(trained), shift_labels.device)
        return cls(positions, shift_labels.reshape(-1).index_select(0, positions))


class LogProbs(NamedTuple):
    """What is known of each target: (N,) float32, float32 and bool.

    Args:
        log_probs: Its log-probability.
        entropy: Of the distribution it is from.
        is_top1: Whether no other token was likelier.
    """

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor


def add_fused_head(model: Any) -> None:
    """Lets a causal language model be called with `targets`: then it returns `LogProbs` and no logits.

    Args:
        model: A `FalconMambaForCausalLM`, its adapter attached, before it is wrapped for several processes.
    """
    original = model.forward
    head = model.get_output_embeddings()

    def forward(self: Any, *args: Any, targets: Targets | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        at_targets = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets.positions)
        return head.log_probs(at_targets, targets.tokens)

    head.log_probs = types.MethodType(_log_probs, head)
    model.forward = types.MethodType(forward, model)


def shard_fused_head(model: Any) -> None:
    """Has the head of a model that FSDP sharded fetch its weights for `log_probs` as it does for a forward.

    Args:
        model: With the fused head.
    """
    register_fsdp_forward_method(model.get_output_embeddings(), "log_probs")


def _log_probs(head: Any, hidden: Tensor, tokens: Tensor) -> LogProbs:
    """What is known of the tokens after hidden states (N, hidden_size)."""
    log_probs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
        hidden,
        head.weight,
        head.bias,
        tokens,
        1.0,  # temperature
        VOCABULARY_TILE,
        None,  # no soft cap and no scale: Falcon-Mamba's logits are what the projection gives
        1.0,
        ("entropy", "is_top1"),
    )
    return LogProbs(log_probs, entropy, is_top1)
