"""The plan against every byte that a training step takes on the card, for the shape of each recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mamba_sft.recipe.builtin import builtin_recipes


def test_the_plan_is_what_is_counted(run_jobs: Callable[..., Any]) -> None:
    """Recipes scaled down to 4 layers of 256; all of them in 4 bits, and two in 8, which no recipe has."""
    jobs = [["memory", name, name] for name in builtin_recipes()]
    jobs += [["memory", f"{name}-nf4", name, "nf4"] for name in ("quickstart", "instruct")]
    jobs += [["memory", f"{name}-int8", name, "int8"] for name in ("quickstart", "instruct", "long-context")]
    for name, found in run_jobs("h100", *jobs).items():
        assert found["planned"] == pytest.approx(found["counted"], rel=0.1), name
