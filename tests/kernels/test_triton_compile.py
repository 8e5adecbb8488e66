"""What the compiler makes of the Triton kernels for every card from the T4 to Blackwell; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_instructions_per_state_update(rows):
    if not any(row["per_update"] for row in rows):
        pytest.skip("Triton came without its disassembler")
    for row in rows:
        if row["states"] == 16 and row["kernel"] == "scan.forward":
            assert max(row["per_update"]) <= 10, (named(row), row["per_update"])
        if row["states"] == 16 and row["kernel"] == "scan.backward":
            first_walk, windows = row["per_update"]
            assert first_walk <= 12, (named(row), row["per_update"])
            assert windows <= 30, (named(row), row["per_update"])
