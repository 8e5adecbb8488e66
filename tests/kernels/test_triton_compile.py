"""What the compiler makes of the Triton kernels for every card from the T4 to Blackwell; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.planning.gpus import SCAN_BACKWARD, SCAN_FORWARD

triton = pytest.importorskip("triton")

GPUS = {75: "T4", 80: "A100", 86: "A10, 3090", 89: "L4, 4090", 90: "H100, H200", 100: "B200", 120: "5090"}
SCRIPT = Path(__file__).with_name("compile_kernels.py")
ALL_STATES_IN_ONE_THREAD = "sizePerThread = [1, 1], threadsPerWarp = [1, 32]"
STATES_OVER_FOUR_THREADS = "sizePerThread = [1, 4], threadsPerWarp = [4, 8]"
FORWARD = ("scan.segment_states", "scan.forward", "scan.segment_gradients")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """One row per kernel, card and variant; two compilers at work."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    cards = [str(card) for card in GPUS]
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *part],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in (cards[:3], cards[3:])
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [row for output, _ in outputs for row in json.loads(output.splitlines()[-1])]


def named(row: dict[str, Any]) -> str:
    return f"{row['kernel']} for sm_{row['card']}, {row['dtype']}, N {row['states']}"


def test_every_kernel_compiles_for_every_card(rows):
    for card in GPUS:
        kernels = {row["kernel"] for row in rows if row["card"] == card}
        assert kernels == {*FORWARD, "scan.connect", "scan.backward", "conv.forward", "conv.backward"}


def test_no_register_is_spilled(rows):
    assert [(named(row), row["stack"]) for row in rows if row["stack"]] == []


@pytest.mark.parametrize(
    ("kernels", "layout"),
    [(FORWARD, ALL_STATES_IN_ONE_THREAD), (("scan.backward",), STATES_OVER_FOUR_THREADS)],
)
def test_state_tiles_are_laid_out_as_meant(rows, kernels, layout):
    chosen = [row for row in rows if row["kernel"] in kernels and row["states"] == 16]
    assert len(chosen) >= 2 * len(GPUS)
    for row in chosen:
        assert [found.startswith(layout) for found in row["layouts"]] == [True], (named(row), row["layouts"])


def counted(rows: list[dict[str, Any]], kernel: str) -> list[dict[str, Any]]:
    """The rows of a kernel in the number format that a card trains in, at N 16."""
    if not any(row["per_update"] for row in rows):
        pytest.skip("Triton came without its disassembler")
    found = [row for row in rows if row["kernel"] == kernel and row["states"] == 16]
    return [row for row in found if row["dtype"] != "torch.float32"]


def both_walks(row: dict[str, Any], what: str) -> float:
    """Of a backward, per state update: the windows, and the first walk, which spares the last of them."""
    first_walk, windows = row[what]
    return windows + first_walk * (1 - row["window"] / row["stride"])


BACKWARD = {75: 28.2, 80: 30.0, 86: 28.8, 89: 30.0, 90: 29.2, 100: 29.4, 120: 29.8}
BACKWARD_TRAINED = 34.0
COUNTED = triton.__version__.startswith("3.7.")
"""Whether this is the Triton of the pinned torch, whose code is counted; others write their own."""
SLACK = 1.0 if COUNTED else 1.13


@pytest.mark.parametrize("card", GPUS)
def test_instructions_per_state_update(rows, card):
    forward = [row for row in counted(rows, "scan.forward") if row["card"] == card]
    backward = [row for row in counted(rows, "scan.backward") if row["card"] == card]
    assert {row["kept"] for row in forward} == {row["trained"] for row in backward} == {True, False}
    for row in forward:
        bar = 8.35 if row["kept"] or card == 120 else 9.0
        assert max(row["per_update"]) <= bar * SLACK, (named(row), row["per_update"])
        assert row["registers"] <= 168, (named(row), row["registers"])  # twelve programs on a multiprocessor
    for row in backward:
        bar = BACKWARD_TRAINED if row["trained"] else BACKWARD[card]
        assert both_walks(row, "per_update") <= bar * SLACK, (named(row), row["per_update"])


def test_the_plan_and_the_benchmark_count_as_the_machine_code_does(rows):
    """One place, `planning.gpus`, has the numbers; they are those of Hopper."""
    if not COUNTED:
        pytest.skip(f"the numbers are of Triton 3.7, and this is {triton.__version__}")
    (forward,) = {
        (row["per_update"][0], row["fp32"][0], row["mufu"][0])
        for row in counted(rows, "scan.forward")
        if row["card"] == 90 and row["kept"]
    }
    (backward,) = [r for r in counted(rows, "scan.backward") if r["card"] == 90 and not r["trained"]]
    assert forward == pytest.approx((SCAN_FORWARD.issued, SCAN_FORWARD.fp32, SCAN_FORWARD.mufu), rel=0.02)
    found = [both_walks(backward, what) for what in ("per_update", "fp32", "mufu")]
    assert found == pytest.approx([SCAN_BACKWARD.issued, SCAN_BACKWARD.fp32, SCAN_BACKWARD.mufu], rel=0.02)


def test_loads_are_issued_before_they_are_needed(rows):
    """While a step or a window is computed, the loads of the next one are on their way.

    Instructions between each load of the innermost loops and the first that reads it.
    """
    for row in counted(rows, "scan.forward"):
        (lead,) = row["lead"]
        assert lead[0] >= (30 if COUNTED else 10), (named(row), lead)
    for row in counted(rows, "scan.backward"):
        leads = sorted(lead for loop in row["lead"] for lead in loop)
        assert leads[0] >= 30, (named(row), leads)
        early = sum(lead >= 60 for lead in leads)
        assert early >= (0.95 if COUNTED else 0.85) * len(leads), (named(row), leads)


def test_a_load_that_is_used_at_once_has_no_lead():
    from . import compile_kernels

    loop = ["LDG.E R4, desc[UR4][R2.64]", "FADD R5, R4, R1", "@P0 LDG.E.64 R8, [R2.64+0x10]", "BRA `(.L_x_1)"]
    assert compile_kernels.load_lead(loop) == [1, 4]
    assert compile_kernels.load_lead(["STG.E [R2.64], R8", *loop[2:]]) == [2]
