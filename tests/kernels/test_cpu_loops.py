"""What the compiled loops do with sizes and values that a trained model seldom has."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from mamba_sft.kernels import cpu_loops, cpu_rows, cpu_steps, selective_scan

from .cases import results, scan_inputs, worst


@pytest.mark.parametrize("module", [cpu_loops, cpu_steps], ids=lambda module: module.__name__[-5:])
def test_compiled_code_cannot_be_older_than_the_rows_it_is_made_of(module):
    checksum = hashlib.sha256(Path(cpu_rows.__file__).read_bytes()).hexdigest()[:16]
    assert checksum == module.ROWS_CHECKSUM, f"set ROWS_CHECKSUM to {checksum!r} in {module.__file__}"


@pytest.mark.parametrize("channels", [5, cpu_rows.LANES - 1, cpu_rows.LANES, 2 * cpu_rows.LANES + 1])
@pytest.mark.parametrize("states", [1, 7, 8, 9, 17, 64])
def test_any_number_of_channels_and_states(channels, states):
    inputs = scan_inputs(1, cpu_loops.STATE_STRIDE + 3, channels, states)
    expected = results(selective_scan, inputs, torch.float64, dt_softplus=True)
    values = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend="cpu")
    assert worst(values, expected) <= (1e-6, "")


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("rate", [0.0, 1e-6, 1.0, 1e3])
def test_steps_and_rates_of_any_size(size, rate):
    inputs = scan_inputs(1, 2 * cpu_loops.STATE_STRIDE + 5, 20, 4)
    del inputs["dt_bias"]
    inputs["dt"] = inputs["dt"].abs() * size
    inputs["A"] = inputs["A"] * rate
    expected = results(selective_scan, inputs, torch.float64)
    values = results(selective_scan, inputs, torch.float32, backend="cpu")
    for name, x in expected.items():
        if x.abs().max() < 1e-30:  # decays below 2**-126, where float32 ends
            assert values.pop(name).abs().max() < 1e-30, name
    assert worst(values, {name: expected[name] for name in values}) <= (1e-6, "")


def test_the_exponential_with_and_without_clamps_agree_where_chunks_meet():
    """One long step sends its chunk, and no other, through the exponential for steps of any length."""
    inputs = scan_inputs(1, 3 * cpu_loops.STATE_STRIDE, 20, 4)
    inputs["dt"][0, cpu_loops.STATE_STRIDE + 9, 3] = 200.0
    expected = results(selective_scan, inputs, torch.float64, dt_softplus=True)
    values = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend="cpu")
    assert worst(values, expected) <= (1e-6, "")


def test_growth_beyond_all_numbers_is_infinite():
    inputs = {name: torch.ones_like(x) for name, x in scan_inputs(1, 2, 8, 2).items()}
    inputs["A"] *= 1e4
    assert selective_scan(**inputs, backend="cpu").isposinf().all()


def test_zeros_stay_zeros():
    inputs = {name: torch.zeros_like(x) for name, x in scan_inputs(1, 70, 20, 4).items()}
    values = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend="cpu")
    assert not any(x.any() for name, x in values.items() if name in ("y", "final_state", "du", "dB"))
    assert all(x.isfinite().all() for x in values.values())


@pytest.mark.parametrize(
    "payload", [0x7FC00000, 0x7FC00001, 0x7F800001], ids=["plain", "quiet", "signalling"]
)
@pytest.mark.parametrize("name", ["u", "dt", "B", "C", "z"])
def test_not_a_number_goes_where_the_definition_sends_it(name, payload):
    inputs = scan_inputs(2, cpu_loops.STATE_STRIDE + 9, 20, 4)
    inputs[name][0, cpu_loops.STATE_STRIDE + 2, 1] = torch.tensor(payload, dtype=torch.int32).view(
        torch.float32
    )
    seq_idx = (torch.arange(cpu_loops.STATE_STRIDE + 9) // 35).expand(
        2, -1
    )  # the next sequence is clean again
    options = {"dt_softplus": True, "seq_idx": seq_idx}
    expected = results(selective_scan, inputs, torch.float32, **options, backend="reference")
    values = results(selective_scan, inputs, torch.float32, **options, backend="cpu")
    for output in ("y", "final_state"):
        assert torch.equal(values[output].isnan(), expected[output].isnan()), output
    for gradient in ("du", "ddt", "dz"):
        assert not values[gradient][1].isnan().any(), gradient
        assert not values[gradient][0, :35].isnan().any(), gradient
        assert not values[gradient][0, 70:].isnan().any(), gradient
