"""Choosing a backend, and what happens to operands that do not fit."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from numba import njit

from mamba_sft import kernels
from mamba_sft.kernels import backends, causal_conv1d, cpu, cpu_loops, selective_scan

from .cases import FAST, conv_inputs, placed, scan_inputs


def test_every_backend_is_here_if_triton_may_interpret():
    assert backends() == ["reference", *FAST]


def test_without_a_gpu_triton_says_why_not(monkeypatch):
    kernels.why_unavailable.cache_clear()
    monkeypatch.setattr(kernels, "_device_of", lambda backend: "cuda" if backend == "triton" else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        assert backends() == ["reference", "cpu"]
        with pytest.raises(RuntimeError, match=r"'triton' is unavailable: no CUDA device; use backend="):
            selective_scan(**scan_inputs(1, 2, 4, 2), backend="triton")
    finally:
        kernels.why_unavailable.cache_clear()


def test_auto_takes_triton_on_a_gpu_and_the_definition_where_there_is_nothing_fast(monkeypatch, caplog):
    kernels._automatic.cache_clear()
    assert kernels._automatic("cuda", torch.bfloat16) == "triton"
    assert kernels._automatic("cuda", torch.float64) == "reference"
    assert kernels._automatic("mps", torch.float32) == "reference"
    assert "slow Python loop, for torch.float32 on mps: no fast kernels for mps" in caplog.text
    monkeypatch.setattr(kernels, "why_unavailable", lambda name: "no triton; install it")
    kernels._automatic.cache_clear()
    assert kernels._automatic("cuda", torch.bfloat16) == "reference"
    assert "for torch.bfloat16 on cuda: no triton; install it" in caplog.text
    kernels._automatic.cache_clear()


def test_auto_takes_the_compiled_loops_and_says_so_once(caplog):
    kernels._automatic.cache_clear()
    inputs = scan_inputs(1, 2, 4, 2)
    with caplog.at_level(logging.DEBUG, logger="mamba_sft.kernels"):
        y = selective_scan(**inputs)
        selective_scan(**inputs)
    assert [record.message for record in caplog.records if "backend cpu" in record.message] == [
        "scan and convolution: backend cpu for torch.float32 on cpu"
    ]
    assert torch.equal(y, selective_scan(**inputs, backend="cpu"))


def test_a_compiler_that_need_not_run_is_not_spoken_of(monkeypatch):
    selective_scan(**scan_inputs(1, 2, 4, 2), backend="cpu")
    assert cpu._were_compiled()
    said = []
    monkeypatch.setattr(cpu.logger, "info", lambda *message: said.append(message))
    for compiled in (True, False):
        monkeypatch.setattr(cpu, "_were_compiled", lambda compiled=compiled: compiled)
        cpu._announce.cache_clear()
        cpu._announce()
        assert len(said) == (not compiled)


def test_auto_takes_the_definition_for_float64():
    inputs = {name: x.double() for name, x in scan_inputs(1, 2, 4, 2).items()}
    assert torch.equal(selective_scan(**inputs), selective_scan(**inputs, backend="reference"))


def test_a_missing_numba_is_an_error_only_if_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "why_unavailable", lambda name: "no numba" if name == "cpu" else None)
    kernels._automatic.cache_clear()
    inputs = scan_inputs(1, 2, 4, 2)
    selective_scan(**inputs)
    assert "slow Python loop, for torch.float32 on cpu: no numba" in caplog.text
    with pytest.raises(RuntimeError, match="no numba"):
        selective_scan(**inputs, backend="cpu")
    kernels._automatic.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 4)}, r"u must have shape \(B, L, D\) with no zero in it, got \(2, 4\)"),
        ({"u": torch.zeros(1, 0, 4)}, r"got \(1, 0, 4\)"),
        ({"u": torch.zeros(1, 3, 4, dtype=torch.int64)}, "u must be float32, .*, got torch.int64"),
        ({"dt": torch.zeros(1, 2, 4)}, r"dt must have shape \(1, 3, 4\), got \(1, 2, 4\)"),
        ({"A": torch.zeros(4)}, r"A must have shape \(D, N\), got \(4,\)"),
        ({"B": torch.zeros(1, 3, 5)}, r"B must have shape \(1, 3, 2\), got \(1, 3, 5\)"),
        ({"D": torch.zeros(1)}, r"D must have shape \(4,\), got \(1,\)"),
        ({"dt_bias": torch.zeros(4, device="meta")}, "dt_bias must be on cpu .*, got meta"),
        ({"z": torch.zeros(1, 3, 4, dtype=torch.bool)}, "z must be .*, got torch.bool"),
        ({"initial_state": torch.zeros(1, 4, 3)}, r"initial_state must have shape \(1, 4, 2\)"),
        (
            {"seq_idx": torch.zeros(1, 2, dtype=torch.int64)},
            r"seq_idx must have shape \(1, 3\), got \(1, 2\)",
        ),
        ({"seq_idx": torch.zeros(1, 3)}, "seq_idx must hold integers, got torch.float32"),
        ({"backend": "cuda"}, "backend must be auto, reference, cpu, triton, got 'cuda'"),
    ],
)
def test_wrong_scan_operands(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(scan_inputs(1, 3, 4, 2) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4)}, r"weight must have shape \(D, W\) with W >= 1, got \(4,\)"),
        ({"weight": torch.zeros(5, 4)}, r"weight must have shape \(4, 4\), got \(5, 4\)"),
        ({"activation": "relu"}, "activation must be 'silu' or None, got 'relu'"),
        ({"initial_state": torch.zeros(1, 4, 4)}, r"initial_state must have shape \(1, 4, 3\)"),
    ],
)
def test_wrong_conv_operands(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(conv_inputs(1, 3, 4, 4) | change))


@pytest.mark.parametrize("backend", FAST)
def test_a_fast_backend_refuses_what_it_cannot_do(backend):
    with pytest.raises(ValueError, match=r"takes float32, .*, got torch\.float64 on cpu"):
        selective_scan(**{k: x.double() for k, x in scan_inputs(1, 2, 4, 2).items()}, backend=backend)
    with pytest.raises(ValueError, match="N up to 64, got 65"):
        selective_scan(**placed(scan_inputs(1, 2, 4, 65), backend), backend=backend)


def test_the_exponential_is_good_to_one_unit_in_the_last_place():
    @njit
    def over(function, xs, ys):
        for i in range(len(xs)):
            ys[i] = function(xs[i])

    for low, high in ((-120.0, 120.0), (-1.0, 1.0), (-1e-3, 0.0)):
        x = torch.linspace(low, high, 100_001)
        y = torch.empty_like(x)
        over(cpu_loops.exp2, x.numpy(), y.numpy())
        error = (y.double() / torch.exp2(x.double()) - 1).abs()
        assert error.max() < 1.2 * torch.finfo(torch.float32).eps / 2 * 2
    special = torch.tensor([-math.inf, -1e30, 0.0, 128.0, math.inf, math.nan])
    y = torch.empty_like(special)
    over(cpu_loops.exp2, special.numpy(), y.numpy())
    assert y.tolist()[:5] == [2**-126, 2**-126, 1.0, math.inf, math.inf]
    assert y[5].isnan()


def test_boundaries_are_computed_once_and_again_after_a_change():
    triton_ops = pytest.importorskip("mamba_sft.kernels.triton_ops")
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    stops, begins = triton_ops.scan_boundaries(seq_idx, seq_idx)
    assert begins.tolist() == [[-1, -1, 2, 2, 2, 5], [-1, 1, 1, 1, 1, 1]]
    assert stops.tolist() == [[2, 2, 5, 5, 5, 6], [1, 6, 6, 6, 6, 6]]
    assert triton_ops.scan_boundaries(seq_idx, seq_idx)[0] is stops
    seq_idx[0, 1] = 7
    assert triton_ops.scan_boundaries(seq_idx, seq_idx)[1].tolist()[0] == [-1, 1, 2, 2, 2, 5]
