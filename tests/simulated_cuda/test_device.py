"""The simulated card itself: what it counts, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.simulated_cuda.build import build, compiler


def test_it_waits_where_a_card_would_be_waited_for(run_jobs: Callable[..., Any]) -> None:
    found = run_jobs("t4", ["itself", "itself"])["itself"]
    assert found["name"] == "Tesla T4 (simulated)"
    assert found["capability"] == [7, 5]
    assert found["bf16"] is False
    assert found["fresh memory is NaN"]
    assert found["waits"] == {
        "a product": 0,
        "item": 1,
        "tolist": 1,
        "to the host": 1,
        "to the host, pinned and not blocking": 0,
        "to the host, not blocking alone": 1,
        "to the card": 1,
        "to the card, pinned and not blocking": 0,
        "nonzero": 1,
        "a mask as index": 1,
        "an index on the card": 0,
        "synchronize": 1,
    }
    assert "Expected all tensors to be on the same device" in found["both sides"]
    assert found["beyond the limit"] == "OutOfMemoryError"
    assert found["bytes of ten thousand floats"] == 40_448  # rounded up to 512, as CUDA's allocator does


def test_it_is_compiled_once() -> None:
    if compiler() is not None and torch.version.cuda is None:
        library = build()
        assert build() == library
        assert library.stat().st_mtime_ns == build().stat().st_mtime_ns
