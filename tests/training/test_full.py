"""Runs without an adapter: every weight is trained, exactly, and what is left is a whole model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mamba_sft.training.fine_tuning import train

FULL = ("adapter=none", "train.learning_rate=1.0e-3")


def test_a_run_leaves_a_model_that_plain_transformers_loads(recipe: Any) -> None:
    run = train(recipe(*FULL))
    assert run.result == run.model
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert AutoTokenizer.from_pretrained(run.model).chat_template
    assert model.dtype == torch.float32
