"""The state of the random numbers that dropout draws: read, and set back so that they are drawn again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

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


def saved_by(resume_point: Path) -> int:
    """Returns how many processes saved their random states in a resume point."""
    return len(list(resume_point.glob("rng_state*.pth")))


def start_anew(seed: int, *, step: int, process: int, processes: int) -> None:
    """Seeds all generators of a process that has no saved state to go on from.

    Other numbers than those of the run's start, which would be drawn a second time, and others in each
    process; the same ones whenever the run goes on from this step with as many processes.

    Args:
        seed: The recipe's.
        step: Optimizer steps taken.
        process: The number of this process.
        processes: How many there are.
    """
    entropy = np.random.SeedSequence([seed, step, processes, process])
    set_seed(int(entropy.generate_state(1)[0]))
