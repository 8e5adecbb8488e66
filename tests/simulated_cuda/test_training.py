"""Training on a card: the host's numbers, no operand on the wrong side, and nobody waits for the card."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

FP32 = "model.dtype=float32"
PATHS = {
    "fp32": [FP32, "train.log_activations=true"],
    "bf16": ["model.dtype=bfloat16"],
    "nf4": ["model.quantization=nf4"],
    "int8": ["model.quantization=int8"],
    "dora": [FP32, "adapter.use_dora=true"],
    "unpacked": [FP32, "data.packing=false"],
    "streaming": [FP32, "train.stream_tokens=32", "train.carry_state=true", "train.auto_batch=true"],
    "paged": [FP32, "train.optim=paged_adamw_8bit"],
}
ROUNDING = {"bf16": 3e-2, "nf4": 3e-2, "int8": 3e-2}
"""How far 16 bits may be apart: autocast has other lists of operations for each device. Else 1e-5."""


def waits_of_others(found: dict[str, Any]) -> int:
    """How often others wait: without bitsandbytes, which looks for outliers at every projection of int8."""
    return sum(n for line, n in found["others"].items() if "bitsandbytes" not in line)


def same(ours: dict[str, Any], theirs: dict[str, Any], within: float) -> None:
    for name in ("losses", "eval_losses", "grad_norms"):
        assert ours[name] == pytest.approx(theirs[name], rel=within), name
        assert all(map(math.isfinite, ours[name]))
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, (numel, squares, _) in ours["weights"].items():
        assert numel == theirs["weights"][name][0]
        assert squares == pytest.approx(theirs["weights"][name][1], rel=10 * within), name


def test_every_way_to_train(run_jobs: Callable[..., Any]) -> None:
    jobs = [["train", name, *overrides] for name, overrides in PATHS.items()]
    card = run_jobs("4090", *jobs, ["train", "fp16", "model.dtype=float16"], ["resume", "again", "fp32"])
    host = run_jobs("cpu", *jobs)
    for name, found in card.items():
        assert not found["mixed"], name
        if name == "again":  # its third step is the first of the process
            continue
        assert sum(found["ours"].values()) <= 2, (name, found["ours"])  # a step, logged, its adapter watched
        assert all("core_model_loading" not in line for line in found["upload"])
        if name != "int8":
            assert waits_of_others(found) == 1, (name, found["others"])  # transformers reads the loss it logs
    for name in PATHS:
        same(card[name], host[name], ROUNDING.get(name, 1e-5))
    same(card["fp16"], host["fp32"], 1e-2)
    assert card["again"]["weights"] == card["fp32"]["weights"]  # resumed exactly, to the last bit
    assert card["again"]["losses"] == card["fp32"]["losses"]


def test_a_tensor_on_the_wrong_side_is_seen(run_jobs: Callable[..., Any]) -> None:
    """The control: the same run with a collator whose tokens stay on the host."""
    found = run_jobs("4090", ["train", "wrong", FP32, "leave=input_ids"], fails=True)["wrong"]
    assert "Expected all tensors to be on the same device" in found["error"]


def test_an_accumulated_step_waits_no_more_often(run_jobs: Callable[..., Any]) -> None:
    two, eight = (
        run_jobs("h100", ["train", "run", FP32, f"train.gradient_accumulation_steps={n}"])["run"]
        for n in (2, 8)
    )
    assert sum(eight["ours"].values()) == sum(two["ours"].values()) <= 2
    assert waits_of_others(eight) == waits_of_others(two)


@pytest.mark.parametrize("streams", [False, True])
def test_out_of_memory(run_jobs: Callable[..., Any], streams: bool) -> None:
    """A card that is too small by a little: the run goes on in parts, and its numbers stay the same."""
    more = ["train.stream_tokens=48"] if streams else []
    wide = [FP32, "data.packing=false", "train.per_device_train_batch_size=4",
            "eval.per_device_eval_batch_size=6", "train.gradient_accumulation_steps=1", *more]  # fmt: skip
    roomy = run_jobs("t4", ["train", "roomy", *wide])["roomy"]
    small = f"limit={int(roomy['most'] * 0.8)}"
    found = run_jobs(
        "t4", ["train", "small", *wide, small], ["train", "survives", *wide, small, "train.auto_batch=true"],
        fails=True,
    )  # fmt: skip
    assert "TrainingError: the GPU is out of memory" in found["small"]["error"]
    assert "error" not in found["survives"], found["survives"].get("traceback")
    same(found["survives"], roomy, 1e-4)
