from __future__ import annotations

from typing import Any

import pytest

from mamba_sft.training.fine_tuning import train


@pytest.mark.parametrize("streams", [False, True])
def test_the_largest_residual_of_the_steps_is_logged(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    from mamba_sft.kernels.falcon_mamba import FalconMambaBlock

    seen: list[float] = []
    forward = FalconMambaBlock.forward

    def watched(block: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(block, *args, **kwargs)
        if block.training:
            seen.append(float(output.detach().abs().max()))
        return output

    monkeypatch.setattr(FalconMambaBlock, "forward", watched)
    more = ("train.stream_tokens=16",) if streams else ()
    run = train(recipe("train.log_activations=true", "train.max_steps=2", "train.logging_steps=2", *more))
    logged = [line["largest_residual"] for line in run.read_metrics() if "loss" in line]
    assert len(logged) == 2  # the first step is always logged
    assert max(logged) == max(seen)


def test_nothing_is_watched_unless_asked(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mamba_sft.training.largest_residual import LargestResidual

    monkeypatch.setattr(LargestResidual, "_see", lambda *args: pytest.fail("a block is watched"))
    run = train(recipe("train.max_steps=1"))
    assert not any("largest_residual" in line for line in run.read_metrics())
