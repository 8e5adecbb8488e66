"""The Triton kernels on a card, at the shapes they are for. `pytest -m gpu` on a machine that has one.

All other tests of the operations run there too, compiled instead of interpreted.
"""

from __future__ import annotations

import pytest
import torch

from mamba_sft.kernels import causal_conv1d, selective_scan

from .cases import conv_inputs, results, scan_inputs, worst

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def numbers(length: int) -> torch.Tensor:
    """Sequences of 1 to some hundreds of positions, as packing makes them."""
    lengths = torch.randint(1, 700, (length,), generator=torch.Generator().manual_seed(0))
    return torch.repeat_interleave(torch.arange(length), lengths)[:length][None]


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)]
)
def test_the_scan_of_a_real_layer(dtype, bound, packed):
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card has no bfloat16")
    inputs = {name: x.to(dtype).float() for name, x in scan_inputs(1, 4133, 8192, 16).items()}
    options = {"dt_softplus": True, "seq_idx": numbers(4133) if packed else None}
    expected = results(selective_scan, inputs, torch.float32, **options, backend="cpu")
    values = results(selective_scan, inputs, dtype, **options, backend="triton")
    assert worst(values, expected) <= (bound, "")


@pytest.mark.parametrize("batch", [1, 4])
def test_two_runs_give_the_same_bits(batch):
    inputs = scan_inputs(batch, 2048, 4096, 16)
    first, second = (
        results(selective_scan, inputs, torch.bfloat16, dt_softplus=True, backend="triton") for _ in range(2)
    )
    assert [name for name, x in first.items() if not torch.equal(x, second[name])] == []


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
def test_the_convolution_of_a_real_layer(packed):
    inputs = conv_inputs(2, 4133, 8192, 4)
    seq_idx = numbers(4133).expand(2, -1) if packed else None
    expected = results(causal_conv1d, inputs, torch.float32, seq_idx=seq_idx, backend="cpu")
    values = results(causal_conv1d, inputs, torch.float32, seq_idx=seq_idx, backend="triton")
    assert worst(values, expected) <= (1e-5, "")


def test_rows_beyond_two_to_the_31_elements():
    length = 2**31 // 8192 + 77
    u = torch.randn(1, length, 8192, dtype=torch.float16, device="cuda")
    dt = torch.full_like(u[:, :1], -4.0).expand_as(u)
    B = torch.randn(1, length, 16, device="cuda")
    A = -torch.ones(8192, 16, device="cuda")
    y = selective_scan(u, dt, A, B, B, dt_softplus=True, backend="triton")
    tail = selective_scan(
        u[:, -2000:], dt[:, -2000:], A, B[:, -2000:], B[:, -2000:], dt_softplus=True, backend="triton"
    )
    assert (
        y[:, -100:] - tail[:, -100:]
    ).abs().max() <= 1e-2 * tail.abs().max()  # what came before has decayed
