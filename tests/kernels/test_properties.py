"""What holds for any operands: shapes, boundaries, dtypes and values that no one would choose by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba_sft.kernels import causal_conv1d, selective_scan

from .cases import (
    FAST,
    STATE_STRIDE,
    TOLERANCE,
    conv_inputs,
    device_for,
    placed,
    relative_rms,
    results,
    scan_inputs,
    worst,
)

EXAMPLES = {"cpu": 40, "triton": 5 if device_for("triton") == "cpu" else 40}
QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@st.composite
def packed_rows(draw: st.DrawFn, longest: int) -> tuple[int, int, Tensor]:
    """A batch, a length, and sequence numbers with boundaries anywhere."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    starts = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    return batch, length, torch.tensor(starts).view(batch, length).long().cumsum(1)


def run_scan(backend: str, shape: tuple[int, int, Tensor], channels: int, states: int, seed: int) -> None:
    batch, length, seq_idx = shape
    inputs = scan_inputs(batch, length, channels, states, seed)
    options = {"dt_softplus": True, "seq_idx": seq_idx}
    expected = results(selective_scan, inputs, torch.float64, **options)
    values = results(selective_scan, inputs, torch.float32, **options, backend=backend)
    # Sums of a few terms that nearly cancel have a large relative error in any order.
    exact = {name: x for name, x in expected.items() if x.numel() >= 16}
    assert worst(values, exact or expected) <= (2 * TOLERANCE[backend], "")


@pytest.mark.parametrize("backend", FAST)
def test_any_shape_and_any_boundaries(backend):
    @settings(max_examples=EXAMPLES[backend], deadline=None, derandomize=True, suppress_health_check=QUIET)
    @given(packed_rows(STATE_STRIDE[backend] + 4), st.integers(1, 40), st.integers(1, 20), st.integers(0, 99))
    def check(shape, channels, states, seed):
        run_scan(backend, shape, channels, states, seed)

    check()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("place", range(1, 5))
def test_a_boundary_at_every_place_of_a_window(backend, place):
    seq_idx = (torch.arange(STATE_STRIDE[backend] + 4) >= STATE_STRIDE[backend] - 4 + place).long()[None]
    run_scan(backend, (1, seq_idx.shape[1], seq_idx), 4, 2, seed=place)


@pytest.mark.parametrize("backend", FAST)
def test_a_convolution_of_any_shape_and_any_boundaries(backend):
    @settings(max_examples=EXAMPLES[backend], deadline=None, derandomize=True, suppress_health_check=QUIET)
    @given(packed_rows(12), st.integers(1, 140), st.integers(1, 6), st.integers(0, 99))
    def check(shape, channels, width, seed):
        batch, length, seq_idx = shape
        inputs = conv_inputs(batch, length, channels, width, seed)
        expected = results(causal_conv1d, inputs, torch.float64, seq_idx=seq_idx)
        values = results(causal_conv1d, inputs, torch.float32, seq_idx=seq_idx, backend=backend)
        exact = {name: x for name, x in expected.items() if x.numel() >= 16}
        assert worst(values, exact or expected) <= (2 * TOLERANCE[backend], "")

    check()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("step", [1e-30, 1e-10, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("rate", [-1e-6, -1.0, -1e4])
def test_any_step_size_and_decay_without_softplus(backend, step, rate):
    inputs = scan_inputs(1, 6, 4, 2)
    inputs["dt"] = step * (1 + torch.rand_like(inputs["dt"]))
    inputs["A"] = torch.full_like(inputs["A"], rate)
    del inputs["dt_bias"]
    expected = results(selective_scan, inputs, torch.float64)
    values = results(selective_scan, inputs, torch.float32, backend=backend)
    # A decay below 2**-126 is zero or the like; what it multiplies does not count beside what flows in.
    assert worst(values, {n: x for n, x in expected.items() if n not in ("dA", "dinitial_state")}) <= (
        4 * TOLERANCE[backend],
        "",
    )
    for name in ("dA", "dinitial_state"):
        scale = expected[name].abs().max().clamp(min=1e-30)
        assert (values[name] - expected[name]).abs().max() <= 1e-5 * scale + 1e-30, name


@pytest.mark.parametrize("backend", FAST)
def test_softplus_is_exact_in_both_tails(backend):
    raw = torch.tensor([-80.0, -30.0, -15.0, -8.0, -2.0, -1e-3, 0.0, 1e-3, 3.0, 16.0, 21.0, 60.0, 1e3])
    ones = torch.ones(1, 1, 13)
    state = selective_scan(
        **placed(
            {
                "u": ones,
                "dt": raw.view(1, 1, 13),
                "A": torch.zeros(13, 1),
                "B": ones[..., :1],
                "C": ones[..., :1],
            },
            backend,
        ),
        dt_softplus=True,
        return_final_state=True,
        backend=backend,
    )[1]  # with no decay, and u = B = 1, the state is the step size
    expected = torch.nn.functional.softplus(raw.double())
    error = (state.cpu().view(13).double() / expected - 1).abs()
    assert (error <= 5e-7 + 6e-8 * raw.abs()).all(), error  # x log2(e) alone is rounded that much


@pytest.mark.parametrize("backend", FAST)
def test_zeros_give_zeros(backend):
    inputs = {name: torch.zeros_like(x) for name, x in scan_inputs(1, 5, 4, 2).items()}
    values = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend=backend)
    assert not any(values[name].any() for name in ("y", "final_state", "dA", "du"))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("operand", ["u", "dt", "B", "C", "z"])
def test_not_a_number_stays_in_its_sequence(backend, operand):
    inputs = placed(scan_inputs(1, 9, 8, 2), backend)
    del inputs["initial_state"]
    inputs[operand][0, 4, 0] = torch.nan
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]]).to(device_for(backend))
    timed = {name: inputs[name].requires_grad_() for name in ("u", "dt", "B", "C", "z")}
    y = selective_scan(**inputs, dt_softplus=True, seq_idx=seq_idx, backend=backend)
    assert y[0, 3:6].isnan().any()
    y.sum().backward()
    for row in (y, *(x.grad for x in timed.values())):
        assert row[0, :3].isfinite().all()
        assert row[0, 6:].isfinite().all()
    if operand in ("u", "dt", "z"):  # and in its channel, where it does not enter the others'
        assert y[0, :, 1:].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_not_a_number_stays_in_its_sequence_in_the_convolution(backend):
    inputs = placed(conv_inputs(1, 9, 8, 4), backend)
    del inputs["initial_state"]
    inputs["x"][0, 4, 0] = torch.nan
    x = inputs["x"].requires_grad_()
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]]).to(device_for(backend))
    y = causal_conv1d(**inputs, seq_idx=seq_idx, backend=backend)
    y.sum().backward()
    for row in (y, x.grad):
        assert row[0, 3:6].isnan().any()
        assert row[0, :3].isfinite().all()
        assert row[0, 6:].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_half_precision_never_breaks_where_single_does_not(backend):
    inputs = scan_inputs(1, 12, 8, 4)
    inputs |= {name: 200 * inputs[name] for name in ("u", "B")}  # the state leaves the range of float16
    inputs["C"] *= 1e-3
    options = {"dt_softplus": True, "return_final_state": True, "backend": backend}
    single = placed(inputs, backend)
    half = {name: x.half() for name, x in single.items()}
    y, state = selective_scan(**half, **options)
    expected, expected_state = selective_scan(**single, **options)
    assert expected_state.abs().max() > torch.finfo(torch.float16).max / 100
    assert state.isfinite().all()
    fits = expected.abs() < torch.finfo(torch.float16).max
    assert y[fits].isfinite().all()
    assert relative_rms(state, expected_state) < 1e-2


@pytest.mark.parametrize("backend", FAST)
def test_two_uses_in_one_graph_and_two_runs(backend):
    inputs = {name: x.requires_grad_() for name, x in placed(scan_inputs(1, 6, 8, 2), backend).items()}

    def gradients() -> tuple[Tensor, ...]:
        y = selective_scan(**inputs, dt_softplus=True, backend=backend)
        again = selective_scan(**(inputs | {"u": y}), dt_softplus=True, backend=backend)
        return torch.autograd.grad((again * y).sum(), list(inputs.values()))

    first, second = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    y = selective_scan(**double, dt_softplus=True, backend="reference")
    again = selective_scan(**(double | {"u": y}), dt_softplus=True, backend="reference")
    expected = torch.autograd.grad((again * y).sum(), list(double.values()))
    for name, value, true in zip(inputs, first, expected, strict=True):
        assert relative_rms(value, true) <= 4 * TOLERANCE[backend], name


@pytest.mark.parametrize("backend", FAST)
def test_checkpointing_and_compiling_around_the_operations_change_nothing(backend):
    inputs = placed(scan_inputs(1, 6, 8, 2), backend)
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(device_for(backend))
    u = inputs.pop("u").requires_grad_()

    def block(x: Tensor) -> Tensor:
        x = causal_conv1d(torch.sin(x), weight, backend=backend)
        return selective_scan(x, **inputs, dt_softplus=True, backend=backend).cos()

    y = block(u)
    (expected,) = torch.autograd.grad(y.sum(), u)
    for wrapped in (
        lambda x: checkpoint(block, x, use_reentrant=False),
        torch.compile(block, backend="eager"),
    ):
        output = wrapped(u)
        assert torch.equal(output, y)
        assert torch.equal(torch.autograd.grad(output.sum(), u)[0], expected)


def test_decays_over_thousands_of_steps_are_not_biased():
    steps = 4096
    inputs = {
        "u": torch.zeros(1, steps, 32),
        "dt": 1e-3 * (0.5 + torch.rand(1, steps, 32, generator=torch.Generator().manual_seed(0))),
        "A": torch.full((32, 1), -0.25),
        "B": torch.zeros(1, steps, 1),
        "C": torch.ones(1, steps, 1),
        "initial_state": torch.ones(1, 32, 1),
    }
    _, state = selective_scan(**inputs, return_final_state=True, backend="cpu")
    expected = torch.exp(inputs["dt"].double().sum(1) * -0.25)
    assert (state.view(-1) / expected.view(-1) - 1).abs().max() < 1e-5  # 4e-5 if each were 1e-8 too small
