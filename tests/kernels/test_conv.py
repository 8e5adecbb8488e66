"""The causal convolution: every backend against the float64 definition, and the definition against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mamba_sft.kernels import causal_conv1d

from .cases import FAST, TOLERANCE, conv_inputs, device_for, placed, relative_rms, results, sequences, worst

BACKENDS = ["reference", *FAST]


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "width"),
    [(2, 1, 8, 4), (2, 2, 8, 4), (3, 63, 40, 4), (1, 60, 140, 4), (2, 30, 33, 1), (2, 30, 8, 9)],
)
@pytest.mark.parametrize("backend", FAST)
def test_matches_the_float64_definition(backend, batch, length, channels, width, packed):
    inputs = conv_inputs(batch, length, channels, width)
    seq_idx = sequences(batch, length) if packed else None
    expected = results(causal_conv1d, inputs, torch.float64, seq_idx=seq_idx)
    values = results(causal_conv1d, inputs, torch.float32, seq_idx=seq_idx, backend=backend)
    assert worst(values, expected) <= (TOLERANCE[backend], "")


def test_the_definition_is_a_padded_grouped_convolution():
    inputs = conv_inputs(2, 20, 8, 4)
    expected = torch.nn.functional.conv1d(
        inputs["x"].mT, inputs["weight"][:, None], inputs["bias"], padding=3, groups=8
    )[..., :20]
    y = causal_conv1d(inputs["x"], inputs["weight"], inputs["bias"], activation=None, backend="reference")
    torch.testing.assert_close(y, expected.mT)


def test_the_definition_passes_gradcheck():
    inputs = {name: x.double().requires_grad_() for name, x in conv_inputs(2, 5, 3, 3).items()}
    seq_idx = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 0]])

    def function(*operands: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, operands, strict=True))
        return causal_conv1d(**named, seq_idx=seq_idx, return_final_state=True)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("absent", ["bias", "initial_state", "activation"])
def test_options_may_be_absent(backend, absent):
    inputs = conv_inputs(2, 20, 40, 4)
    inputs.pop(absent, None)
    options = {"activation": None if absent == "activation" else "silu"}
    expected = results(causal_conv1d, inputs, torch.float64, **options)
    values = results(causal_conv1d, inputs, torch.float32, **options, backend=backend)
    assert worst(values, expected) <= (TOLERANCE[backend], "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_are_what_they_are_alone(backend):
    lengths = [3, 1, 1, 2, 9, 1]
    inputs = conv_inputs(1, sum(lengths), 8, 4)
    del inputs["initial_state"]
    seq_idx = torch.repeat_interleave(torch.tensor([0, 1, 0, 1, 5, 2]), torch.tensor(lengths))[None]
    inputs, seq_idx = placed(inputs, backend), seq_idx.to(device_for(backend))
    whole, alone = ({name: x.clone().requires_grad_() for name, x in inputs.items()} for _ in range(2))
    y, state = causal_conv1d(**whole, seq_idx=seq_idx, return_final_state=True, backend=backend)
    outputs = [
        causal_conv1d(x, alone["weight"], alone["bias"], return_final_state=True, backend=backend)
        for x in alone["x"].split(lengths, dim=1)
    ]
    expected = torch.cat([output for output, _ in outputs], dim=1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    assert torch.equal(state, outputs[-1][1])
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(gradient)
    expected.backward(gradient)
    for name, x in whole.items():
        assert relative_rms(x.grad, alone[name].grad) <= 1e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [[1], [2, 3, 10], [16, 19]])
def test_chunks_that_hand_on_the_state_are_the_whole(backend, cuts):
    inputs = conv_inputs(2, 20, 8, 4)
    expected = results(causal_conv1d, inputs, torch.float32, backend=backend)

    def in_chunks(
        x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor, return_final_state: bool
    ) -> tuple[Tensor, Tensor]:
        state, outputs = initial_state, []
        for first, last in zip([0, *cuts], [*cuts, 20], strict=True):
            y, state = causal_conv1d(
                x[:, first:last], weight, bias, initial_state=state, return_final_state=True, backend=backend
            )
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    assert worst(results(in_chunks, inputs, torch.float32), expected) <= (1e-6, "")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_only_at_the_ends(backend, dtype):
    inputs = {name: x.to(dtype) for name, x in conv_inputs(2, 100, 40, 4).items()}
    expected = results(causal_conv1d, inputs, torch.float64)
    values = results(causal_conv1d, inputs, dtype, backend=backend)
    assert values["y"].dtype == values["final_state"].dtype == dtype
    assert worst(values, expected) <= (torch.finfo(dtype).eps / 2, "")


def test_results_do_not_depend_on_the_run_or_the_threads():
    inputs = conv_inputs(2, 200, 1100, 4)
    first = results(causal_conv1d, inputs, torch.float32, backend="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = results(causal_conv1d, inputs, torch.float32, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert [name for name, x in first.items() if not torch.equal(x, again[name])] == []


@pytest.mark.parametrize("backend", FAST)
def test_nothing_uninitialised_is_read(backend, poisoned_memory):
    values = results(causal_conv1d, conv_inputs(2, 2, 40, 4), torch.float32, backend=backend)
    assert all(x.isfinite().all() for x in values.values())


@pytest.mark.parametrize("backend", FAST)
def test_half_of_a_projection_needs_no_copy(backend):
    inputs = placed(conv_inputs(2, 20, 40, 4), backend)
    wide = torch.cat([torch.full_like(inputs["x"], torch.nan), inputs["x"]], dim=-1)
    y = causal_conv1d(wide[..., 40:], inputs["weight"], backend=backend)
    assert torch.equal(y, causal_conv1d(inputs["x"], inputs["weight"], backend=backend))
