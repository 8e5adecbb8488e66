"""The state of the random numbers that dropout draws: read, and set back so that they are drawn again."""

from __future__ import annotations

import torch

RandomState = tuple[torch.Tensor, ...]


def current_random_state(device: torch.device) -> RandomState:
    """Returns the state of the host's generator and, for a CUDA device, of its own."""
    host = torch.get_rng_state()
    return (host, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (host,)


def restore_random_state(state: RandomState, device: torch.device) -> None:
    """Sets back what `current_random_state` returned for the same device."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
