"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest
import torch

from .cases import HAS_TRITON, STATE_STRIDE


@pytest.fixture(autouse=True)
def chunks_fit_for_the_interpreter(monkeypatch):
    """Let the interpreter, which takes milliseconds per step, reach the second chunk and segment soon."""
    if HAS_TRITON and not torch.cuda.is_available():
        from mamba_sft.kernels import triton_ops

        monkeypatch.setattr(triton_ops, "STATE_STRIDE", STATE_STRIDE["triton"])
        monkeypatch.setattr(triton_ops, "SPAN", 16)


@pytest.fixture
def poisoned_memory():
    """Whatever torch allocates without filling it holds not-a-number."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
