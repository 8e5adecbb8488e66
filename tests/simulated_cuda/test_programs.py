"""The real Triton programs, in Triton's interpreter, on tensors of the card: one small step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.simulated_cuda.test_training import same

STEP = ["train", "step", "model.dtype=float32", "data.max_length=24", "data.too_long=split",
        "data.sources.0.limit=12",
        "data.validation=1", "train.max_steps=1", "train.per_device_train_batch_size=1",
        "train.gradient_accumulation_steps=1", "eval.eval_steps=1"]  # fmt: skip


def test_a_step_in_the_interpreter(run_jobs: Callable[..., Any]) -> None:
    pytest.importorskip("triton")
    card = run_jobs("4090", STEP, TRITON_INTERPRET="1")["step"]
    same(card, run_jobs("cpu", STEP)["step"], 1e-4)
