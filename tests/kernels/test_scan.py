"""The selective scan: every backend against the float64 definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mamba_sft.kernels import selective_scan

from .cases import SCAN_OPTIONS, relative_rms, results, scan_inputs, sequences, worst

BACKENDS = ["reference", "cpu"]


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"),
    [(2, 1, 8, 1), (3, 63, 40, 16), (1, 1000, 8, 16), (1, 129, 500, 3), (2, 65, 33, 64)],
)
def test_cpu_matches_the_float64_definition(batch, length, channels, states, packed):
    inputs = scan_inputs(batch, length, channels, states)
    options = {"dt_softplus": True, "seq_idx": sequences(batch, length) if packed else None}
    expected = results(selective_scan, inputs, torch.float64, **options)
    values = results(selective_scan, inputs, torch.float32, **options, backend="cpu")
    assert worst(values, expected) <= (1e-6, "")


@pytest.mark.parametrize("absent", [*SCAN_OPTIONS, "all"])
def test_options_may_be_absent(absent):
    inputs = scan_inputs(2, 40, 40, 4)
    for name in SCAN_OPTIONS if absent == "all" else [absent]:
        del inputs[name]
    inputs["dt"] = inputs["dt"].abs() * 0.1
    with_softplus = "dt_bias" in inputs  # negative step sizes make the state explode
    expected = results(selective_scan, inputs, torch.float64, dt_softplus=with_softplus)
    values = results(selective_scan, inputs, torch.float32, dt_softplus=with_softplus, backend="cpu")
    assert worst(values, expected) <= (1e-6, "")


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
    lengths = [3, 1, 1, 60, 66, 1, 9]  # boundaries next to each other, at chunk ends, and last
    inputs = scan_inputs(1, sum(lengths), 8, 4)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    del inputs["initial_state"]
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

    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(gradient)
    expected.backward(gradient)
    for name, x in whole.items():
        assert relative_rms(x.grad, alone[name].grad) <= 1e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [[1], [64], [5, 70, 71]])
def test_chunks_that_hand_on_the_state_are_the_whole(backend, cuts):
    inputs = scan_inputs(2, 100, 8, 4)
    expected = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend=backend)

    def in_chunks(return_final_state: bool, **operands: Tensor) -> tuple[Tensor, Tensor]:
        state = operands.pop("initial_state")
        timed = [name for name in operands if operands[name].ndim == 3]
        outputs = []
        for first, last in zip([0, *cuts], [*cuts, 100], strict=True):
            chunk = operands | {name: operands[name][:, first:last] for name in timed}
            y, state = selective_scan(
                **chunk, initial_state=state, dt_softplus=True, return_final_state=True, backend=backend
            )
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    assert worst(results(in_chunks, inputs, torch.float32), expected) <= (1e-6, "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_only_at_the_ends(dtype):
    inputs = {name: x.to(dtype) for name, x in scan_inputs(2, 200, 40, 16).items()}
    expected = results(selective_scan, inputs, torch.float64, dt_softplus=True)
    values = results(selective_scan, inputs, dtype, dt_softplus=True, backend="cpu")
    assert values["y"].dtype == values["du"].dtype == values["dA"].dtype == dtype
    assert values["final_state"].dtype == torch.float32
    assert worst(values, expected) <= (torch.finfo(dtype).eps / 2, "")


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


def test_nothing_uninitialised_is_read(poisoned_memory):
    inputs = scan_inputs(2, 70, 40, 4)
    values = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend="cpu")
    assert all(x.isfinite().all() for x in values.values())


def test_any_strides_will_do():
    inputs = scan_inputs(2, 30, 40, 4)
    expected = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend="cpu")
    projected = torch.cat([inputs["u"], inputs["z"]], dim=-1)
    odd = inputs | {
        "u": projected[..., :40],
        "z": projected[..., 40:],
        "dt": inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2),
        "B": inputs["B"].mT.contiguous().mT,
        "A": inputs["A"].t().contiguous().t(),
        "initial_state": inputs["initial_state"].mT.contiguous().mT,
    }
    y, state = selective_scan(**odd, dt_softplus=True, return_final_state=True, backend="cpu")
    assert torch.equal(y, expected["y"])
    assert torch.equal(state, expected["final_state"])


def test_an_expanded_gradient_will_do():
    inputs = scan_inputs(2, 30, 40, 4)
    u = inputs.pop("u").requires_grad_()
    y = selective_scan(u, **inputs, dt_softplus=True, backend="cpu")
    (expected,) = torch.autograd.grad(y, u, torch.ones_like(y), retain_graph=True)
    y.sum().backward()  # its gradient has strides of zero
    assert torch.equal(u.grad, expected)


def test_gradients_come_only_where_required():
    inputs = scan_inputs(1, 10, 8, 2)
    inputs["B"].requires_grad_()
    inputs["initial_state"].requires_grad_()
    selective_scan(**inputs, backend="cpu").sum().backward()
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


def test_extreme_step_sizes_and_gates():
    extremes = torch.tensor([-1e4, -100.0, -30.0, -1e-3, 0.0, 1e-3, 19.0, 30.0, 100.0, 1e4])
    inputs = scan_inputs(1, 10, 10, 2)
    inputs |= {"dt": extremes.expand(1, 10, 10), "z": extremes[None, :, None].expand(1, 10, 10)}
    del inputs["dt_bias"]
    expected = results(selective_scan, inputs, torch.float64, dt_softplus=True)
    values = results(selective_scan, inputs, torch.float32, dt_softplus=True, backend="cpu")
    assert worst(values, expected) <= (1e-6, "")


@pytest.mark.parametrize("name", ["u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"])
def test_not_a_number_is_not_hidden(name):
    inputs = scan_inputs(1, 3, 8, 2)
    inputs[name].view(-1)[0] = torch.nan
    assert selective_scan(**inputs, dt_softplus=True, backend="cpu").isnan().any()
