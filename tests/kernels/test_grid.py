"""The selective scan over the options and lengths that mamba_ssm's own test covers, for every backend.

Output, final state and every gradient against the definition: in float32 the definition of float64, in half
precision that of the rounded operands. Every backend that can run here takes part, on a GPU triton too.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from mamba_sft.kernels import selective_scan

from .cases import COMPILED_BACKENDS, relative_rms, results, scan_inputs, worst

LENGTHS = (8, 16, 32, 64, 128, 256, 372, 512, 784, 1024, 1134, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SWITCHES = tuple(itertools.product((True, False), repeat=4))
NAMES = ("z", "D", "dt_bias", "softplus")

pytestmark = pytest.mark.parametrize("backend", list(COMPILED_BACKENDS))


def operands(length, *, batch=2, channels=40, states=8, z=True, D=True, dt_bias=True, softplus=True):
    """Operands with some left out; step sizes stay positive without a softplus too.

    40 channels are more than one block of any backend, and enough that an error is an average.
    """
    inputs = scan_inputs(batch, length, channels, states)
    for name, wanted in (("z", z), ("D", D), ("dt_bias", dt_bias)):
        if not wanted:
            del inputs[name]
    if not softplus:
        inputs["dt"] = 0.1 * inputs["dt"].abs()
        if dt_bias:
            inputs["dt_bias"] = 0.01 * inputs["dt_bias"].abs()
    return inputs


def moved(operation, backend, dtype):
    """The operation on the backend's device in `dtype`, A in float32 as in a model; results come back."""
    device = COMPILED_BACKENDS.get(backend, "cpu")

    def run(*, A, **arguments):
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor):
                arguments[name] = x.to(device, dtype)
        return [output.cpu() for output in operation(A=A.to(device), **arguments)]

    return run


def too_far(inputs, dtype, backend, *, softplus=True, with_final_state=True):
    """What differs from the definition by more than it may, with its relative RMS error.

    In half precision the rounding of the results is allowed. In float32 it is 1e-6; over thousands of steps
    the roundings of the definition itself, run in float32, can come to more, and twice theirs is allowed.
    """

    def only_y(*, return_final_state, **arguments):
        y = selective_scan(**arguments)
        return y, 0 * y.sum()[None]

    def errors(backend):
        run = moved(operation, backend, dtype)
        values = results(run, inputs, torch.float32, dt_softplus=softplus, backend=backend)
        return {name: relative_rms(values[name], x) for name, x in expected.items()}

    inputs = {name: x if name == "A" else x.to(dtype).float() for name, x in inputs.items()}
    operation = selective_scan if with_final_state else only_y
    expected = results(operation, inputs, torch.float64, dt_softplus=softplus, backend="reference")
    if not with_final_state:
        del expected["final_state"]
    allowed = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    off = {name: error for name, error in errors(backend).items() if not error <= allowed}
    if off and dtype == torch.float32:
        definition = errors("reference")
        off = {name: error for name, error in off.items() if not error <= 2 * definition[name]}
    return off


@pytest.mark.parametrize(
    "switches", SWITCHES, ids=lambda on: "-".join(itertools.compress(NAMES, on)) or "bare"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination_of_options(backend, dtype, switches):
    wanted = dict(zip(NAMES, switches, strict=True))
    inputs = operands(37, **wanted)
    assert not too_far(inputs, dtype, backend, softplus=wanted["softplus"])


@pytest.mark.parametrize("with_final_state", [True, False], ids=["final-state", "output-only"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [n for n in LENGTHS if n <= 512])
def test_every_length(backend, length, dtype, with_final_state):
    assert not too_far(operands(length), dtype, backend, with_final_state=with_final_state)


@pytest.mark.parametrize("length", [n for n in LENGTHS if n > 512])
def test_long_rows(backend, length):
    assert not too_far(operands(length, batch=1, channels=8), torch.float32, backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [n for n in LENGTHS if n > 512])
@pytest.mark.parametrize(
    "switches", SWITCHES, ids=lambda on: "-".join(itertools.compress(NAMES, on)) or "bare"
)
def test_the_whole_grid(backend, length, dtype, switches):
    wanted = dict(zip(NAMES, switches, strict=True))
    inputs = operands(length, channels=8, **wanted)
    assert not too_far(inputs, dtype, backend, softplus=wanted["softplus"])


@pytest.mark.parametrize(("B_moves", "C_moves"), list(itertools.product((True, False), repeat=2)))
def test_input_and_output_weights_may_be_constant(backend, B_moves, C_moves):
    """A constant B or C is one that is expanded over time; its gradient is the sum over time."""
    inputs = operands(100)
    for name, moves in (("B", B_moves), ("C", C_moves)):
        if not moves:
            inputs[name] = inputs[name][:1, :1]

    def expanded(*, B, C, u, **rest):
        shape = (*u.shape[:2], -1)
        return selective_scan(u=u, B=B.expand(shape), C=C.expand(shape), **rest)

    expected = results(expanded, inputs, torch.float64, dt_softplus=True, backend="reference")
    run = moved(expanded, backend, torch.float32)
    values = results(run, inputs, torch.float32, dt_softplus=True, backend=backend)
    assert values["dB"].shape == inputs["B"].shape
    assert values["dC"].shape == inputs["C"].shape
    assert worst(values, expected) <= (1e-6, "")
