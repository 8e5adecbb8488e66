"""The callbacks on their own, where a whole run would hide the case."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from mamba_sft.errors import AdapterError
from mamba_sft.training.callbacks import ECHO_SECONDS, AdapterWatch, Interruption, MetricsLog


def state(step: int, *logged: dict[str, Any]) -> Any:
    return SimpleNamespace(global_step=step, epoch=0.5, is_world_process_zero=True, log_history=list(logged))


def logged_until(step: int) -> list[dict[str, Any]]:
    return [{"loss": float(n), "epoch": 0.5, "step": n} for n in range(1, step + 1)]


def read(log: MetricsLog) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_a_resumed_run_forgets_the_lines_of_lost_steps(tmp_path: Path) -> None:
    nothing: Any = None
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.on_train_begin(nothing, state(0), nothing)
    for step in (1, 2, 3):
        log.on_log(nothing, state(step), nothing, logs={"loss": float(step)})
    log.on_train_begin(nothing, state(2, *logged_until(2)), nothing)
    log.on_log(nothing, state(3), nothing, logs={"loss": 9.0})
    assert read(log) == [(1, 1.0), (2, 2.0), (3, 9.0)]


@pytest.mark.parametrize("there", ["", '{"step": 1, "epoch": 0.5, "loss": 1.0}\n{"st', "\x00\x00\n[]\n7\n"])
def test_lines_that_did_not_reach_the_disk_are_written_again(tmp_path: Path, there: str) -> None:
    nothing: Any = None
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_text(there)
    log.on_train_begin(nothing, state(3, *logged_until(3)), nothing)
    assert read(log) == [(1, 1.0), (2, 2.0), (3, 3.0)]


class Adapter(torch.nn.Module):
    """Two adapter tensors by the names PEFT gives them, in what PEFT wraps."""

    peft_config: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.x_proj = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 2, bias=False)})
        self.x_proj["lora_B"] = torch.nn.Linear(2, 2, bias=False)


def watch(gradients: list[dict[str, float | None]]) -> None:
    """Runs the watch over steps, given the gradient of each tensor in each step."""
    nothing: Any = None
    model, watcher = Adapter(), AdapterWatch()
    for step in gradients:
        for name, parameter in model.named_parameters():
            value = step["B" if "lora_B" in name else "A"]
            parameter.grad = None if value is None else torch.full_like(parameter, value)
        watcher.on_pre_optimizer_step(nothing, nothing, nothing, model=model)


def test_a_tensor_that_never_gets_a_gradient_is_named() -> None:
    told = r"(?s)no gradient reaches 1 tensor of the adapter.*x_proj\.lora_B\.weight"
    with pytest.raises(AdapterError, match=told):
        watch([{"A": 1.0, "B": None}] * 2)


def test_one_step_without_a_trained_token_is_forgiven() -> None:
    watch([{"A": 0.0, "B": 0.0}, {"A": 1.0, "B": 1.0}, {"A": 1.0, "B": 1.0}])


def test_only_the_first_steps_are_watched() -> None:
    watch([{"A": 1.0, "B": 1.0}] * AdapterWatch.STEPS + [{"A": None, "B": None}] * 3)


def test_a_signal_that_comes_twice_to_one_of_many_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm sends it to all processes, and torchrun passes its own on; alone, the second stops at once."""
    nothing: Any = None
    clock = [100.0]
    monkeypatch.setattr("mamba_sft.training.callbacks.time.monotonic", lambda: clock[0])
    for variable, later in (("1", ECHO_SECONDS + 0.1), ("", 0.1)):
        monkeypatch.setenv("RANK", variable)
        interruption = Interruption(grace_seconds=20.0)
        interruption.on_train_begin(nothing, SimpleNamespace(global_step=0, max_steps=4), nothing)
        interruption._handle(signal.SIGTERM, None)
        if variable:
            clock[0] += 0.1
            interruption._handle(signal.SIGTERM, None)
        assert interruption.requested
        clock[0] += later
        with pytest.raises(KeyboardInterrupt):
            interruption._handle(signal.SIGTERM, None)
