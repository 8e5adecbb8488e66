"""The selective scan: every backend against the float64 definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mamba_sft.kernels import selective_scan

from .cases import (
    FAST,
    SCAN_OPTIONS,
    STATE_STRIDE,
    TOLERANCE,
    device_for,
    placed,
    relative_rms,
    results,
    scan_inputs,
    sequences,
    worst,
)

BACKENDS = ["reference", *FAST]


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize(
    ("backend", "batch", "length", "channels", "states"),
    [
        ("cpu", 2, 1, 8, 1),
        ("cpu", 3, 63, 40, 16),
        ("cpu", 1, 1000, 8, 16),
        ("cpu", 1, 129, 500, 3),
        ("cpu", 2, 65, 33, 64),
        ("triton", 2, 1, 8, 1),
        ("triton", 1, 19, 40, 16),
        ("triton", 2, 12, 8, 3),
        ("triton", 1, 5, 9, 64),
    ],
)
def test_matches_the_float64_definition(backend, batch, length, channels, states, packed):
    inputs = scan_inputs(batch, length, channels, states)
    options = {"dt_softplus": True, "seq_idx": sequences(batch, length) if packed else None}
    expected = results(selective_scan, inputs, torch.float64, **options)
    values = results(selective_scan, inputs, torch.float32, **options, backend=backend)
    assert worst(values, expected) <= (TOLERANCE[backend], "")


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
def test_a_row_cut_into_segments_is_the_same_row(packed, monkeypatch):
    triton_ops = pytest.importorskip("mamba_sft.kernels.triton_ops")
    chunk = STATE_STRIDE["triton"]
    monkeypatch.setattr(triton_ops, "_segments", lambda u, *more: (-(-u.shape[1] // chunk), chunk))
    lengths = [chunk - 2, 2, chunk // 2, chunk, 1]  # a boundary at an edge, and a segment without one
    inputs = scan_inputs(2, sum(lengths), 5, 2)
    seq_idx = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths)).expand(2, sum(lengths))
    options = {"dt_softplus": True, "seq_idx": seq_idx if packed else None}
    expected = results(selective_scan, inputs, torch.float64, **options)
    values = results(selective_scan, inputs, torch.float32, **options, backend="triton")
    assert worst(values, expected) <= (TOLERANCE["triton"], "")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("absent", [*SCAN_OPTIONS, "all"])
def test_options_may_be_absent(backend, absent):
    inputs = scan_inputs(2, 13, 40, 4)
    for name in SCAN_OPTIONS if absent == "all" else [absent]:
        del inputs[name]
    inputs["dt"] = inputs["dt"].abs() * 0.1
    with_softplus = "dt_bias" in inputs  # negative step sizes make the state explode
    expected = results(selective_scan, inputs, torch.float64, dt_softplus=with_softplus)
    values = results(selective_scan, inputs, torch.float32, dt_softplus=with_softplus, backend=backend)
    assert worst(values, expected) <= (TOLERANCE[backend], "")


def test_the_definition_passes_gradcheck():
    inputs = {name: x.double().requires_grad_() for name, x in scan_inputs(2, 5, 3, 2).items()}
    seq_idx = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 0]])

    def function(*operands: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(
            **dict(zip(inputs, operands, strict=True)),
            dt_softplus=True,
            seq_idx=seq_idx,
            return_final_state=True,
        )

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_are_what_they_are_alone(backend):
    chunk = STATE_STRIDE[backend]  # boundaries next to each other, at chunk ends, and last
    lengths = [3, 1, 1, chunk - 5, chunk + 2, 1, 4]
    inputs = scan_inputs(1, sum(lengths), 8, 4)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    del inputs["initial_state"]
    inputs, seq_idx = placed(inputs, backend), seq_idx.to(device_for(backend))
    whole = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y, final_state = selective_scan(
        **whole, dt_softplus=True, seq_idx=seq_idx, return_final_state=True, backend=backend
    )

    alone = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    timed = ("u", "dt", "B", "C", "z")
    parts = zip(*(alone[name].split(lengths, dim=1) for name in timed), strict=True)
    constant = {name: x for name, x in alone.items() if name not in timed}
    outputs = [
        selective_scan(
            **dict(zip(timed, part, strict=True)),
            **constant,
            dt_softplus=True,
            return_final_state=True,
            backend=backend,
        )
        for part in parts
    ]
    expected = torch.cat([output for output, _ in outputs], dim=1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(final_state, outputs[-1][1], rtol=0, atol=1e-6)

    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(gradient)
    expected.backward(gradient)
    for name, x in whole.items():
        assert relative_rms(x.grad, alone[name].grad) <= 1e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", ["first", "chunk", "several"])
def test_parts_that_hand_on_the_state_are_the_whole(backend, cuts):
    chunk = STATE_STRIDE[backend]
    length = chunk + 10
    cuts = {"first": [1], "chunk": [chunk], "several": [5, chunk + 2, chunk + 3]}[cuts]
    inputs = scan_inputs(2, length, 8, 4)
    expected = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend=backend)

    def in_chunks(return_final_state: bool, **operands: Tensor) -> tuple[Tensor, Tensor]:
        state = operands.pop("initial_state")
        timed = [name for name in operands if operands[name].ndim == 3]
        outputs = []
        for first, last in zip([0, *cuts], [*cuts, length], strict=True):
            chunk = operands | {name: operands[name][:, first:last] for name in timed}
            y, state = selective_scan(
                **chunk, initial_state=state, dt_softplus=True, return_final_state=True, backend=backend
            )
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    assert worst(results(in_chunks, inputs, torch.float32), expected) <= (1e-6, "")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_only_at_the_ends(backend, dtype):
    length = 3 * STATE_STRIDE[backend]
    inputs = {name: x.to(dtype) for name, x in scan_inputs(2, length, 20, 16).items()}
    expected = results(selective_scan, inputs, torch.float64, dt_softplus=True)
    values = results(selective_scan, inputs, dtype, dt_softplus=True, backend=backend)
    assert values["y"].dtype == values["du"].dtype == values["dA"].dtype == dtype
    assert values["final_state"].dtype == torch.float32
    # The Triton backward keeps y before the gate in the place of dz, and so in its type.
    bound = torch.finfo(dtype).eps / (1 if backend == "triton" else 2)
    assert worst(values, expected) <= (bound, "")


def test_results_do_not_depend_on_the_run_or_the_threads():
    inputs = scan_inputs(2, 100, 2100, 4)  # above the size where threads start
    first = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend="cpu")
            assert [name for name, x in first.items() if not torch.equal(x, again[name])] == []
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", FAST)
def test_nothing_uninitialised_is_read(backend, poisoned_memory):
    inputs = scan_inputs(2, STATE_STRIDE[backend] + 3, 40, 4)
    values = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend=backend)
    assert all(x.isfinite().all() for x in values.values())


@pytest.mark.parametrize("backend", FAST)
def test_any_strides_will_do(backend):
    inputs = scan_inputs(2, 10, 40, 4)
    expected = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend=backend)
    projected = torch.cat([inputs["u"], inputs["z"]], dim=-1)
    odd = inputs | {
        "u": projected[..., :40],
        "z": projected[..., 40:],
        "dt": inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2),
        "B": inputs["B"].mT.contiguous().mT,
        "A": inputs["A"].t().contiguous().t(),
        "initial_state": inputs["initial_state"].mT.contiguous().mT,
        "D": torch.stack([inputs["D"]] * 2, dim=1)[:, 0],
        "dt_bias": torch.stack([inputs["dt_bias"]] * 2, dim=1)[:, 0],
    }
    y, state = selective_scan(
        **placed(odd, backend), dt_softplus=True, return_final_state=True, backend=backend
    )
    assert torch.equal(y.cpu(), expected["y"])
    assert torch.equal(state.cpu(), expected["final_state"])


@pytest.mark.parametrize("backend", FAST)
def test_an_expanded_gradient_will_do(backend):
    inputs = placed(scan_inputs(2, 10, 40, 4), backend)
    u = inputs.pop("u").requires_grad_()
    y = selective_scan(u, **inputs, dt_softplus=True, backend=backend)
    (expected,) = torch.autograd.grad(y, u, torch.ones_like(y), retain_graph=True)
    y.sum().backward()  # its gradient has strides of zero
    assert torch.equal(u.grad, expected)


@pytest.mark.parametrize("backend", FAST)
def test_gradients_come_only_where_required(backend):
    inputs = placed(scan_inputs(1, 10, 8, 2), backend)
    inputs["B"].requires_grad_()
    inputs["initial_state"].requires_grad_()
    selective_scan(**inputs, backend=backend).sum().backward()
    assert {name for name, x in inputs.items() if x.grad is not None} == {"B", "initial_state"}


def test_the_final_state_alone_has_gradients():
    inputs = scan_inputs(1, 70, 8, 2)
    for x in inputs.values():
        x.requires_grad_()
    operands = {name: x.double().detach().requires_grad_() for name, x in inputs.items()}
    for leaves, backend in ((inputs, "cpu"), (operands, "reference")):
        _, state = selective_scan(**leaves, dt_softplus=True, return_final_state=True, backend=backend)
        state.sum().backward()
    for name in ("u", "dt", "A", "B", "dt_bias", "initial_state"):
        assert relative_rms(inputs[name].grad, operands[name].grad) <= 1e-6, name


@pytest.mark.parametrize("backend", FAST)
def test_extreme_step_sizes_and_gates(backend):
    extremes = torch.tensor([-1e4, -100.0, -30.0, -1e-3, 0.0, 1e-3, 19.0, 30.0, 100.0, 1e4])
    inputs = scan_inputs(1, 10, 10, 2)
    inputs |= {"dt": extremes.expand(1, 10, 10), "z": extremes[None, :, None].expand(1, 10, 10)}
    del inputs["dt_bias"]
    expected = results(selective_scan, inputs, torch.float64, dt_softplus=True)
    values = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend=backend)
    assert worst(values, expected) <= (TOLERANCE[backend], "")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ["u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"])
def test_not_a_number_is_not_hidden(backend, name):
    inputs = placed(scan_inputs(1, 3, 8, 2), backend)
    inputs[name].view(-1)[0] = torch.nan
    assert selective_scan(**inputs, dt_softplus=True, backend=backend).isnan().any()
