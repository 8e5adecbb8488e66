"""Which projections are quantized, by shape alone, and that no CPU computes with them differently."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open

from mamba_sft.errors import ModelError
from mamba_sft.model import quantization
from mamba_sft.model.adapter import adapter_tensors, attach_adapter
from mamba_sft.model.checkpoint import read_config
from mamba_sft.model.loading import load_model
from mamba_sft.model.quantization import (
    check_nf4,
    misfits,
    nf4_misfit,
    quantized_projections,
    quantizes,
)
from mamba_sft.model.shape import KNOWN_7B, Shape, find_shape
from mamba_sft.recipe.builtin import find_path
from mamba_sft.recipe.fields import AdapterSection, ModelSection
from tests.conftest import build_model

IDS = torch.arange(12, 44).view(2, 16)
TINY = Shape.from_config(read_config(find_path("data/tiny-base")))


def section(base: Path, quantization: str = "nf4") -> ModelSection:
    return ModelSection(base=str(base), dtype="float32", quantization=quantization)  # type: ignore[arg-type]


def pack(weight: torch.Tensor) -> None:
    """Quantizes a matrix and packs it as bitsandbytes does for CPUs with AVX512-BF16."""
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    functional._convert_weight_packed_for_cpu(codes, state)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 36, 44, 64, 288])
@pytest.mark.parametrize("columns", [32, 64, 96, 100, 128, 192, 384])
def test_the_rule_is_that_of_the_packed_layout(rows: int, columns: int) -> None:
    if nf4_misfit(rows, columns) is None:
        pack(torch.randn(rows, columns))
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            pack(torch.randn(rows, columns))


def test_shapes_of_the_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.model.shape._cached_config", lambda section: None)
    seven_b, _ = find_shape(ModelSection(base=KNOWN_7B[0]))
    for shape in (seven_b, TINY):
        assert quantized_projections(shape, "int8") == ["in_proj", "x_proj", "out_proj"]
        assert quantized_projections(shape, "none") == []
        assert misfits(shape, "int8") == misfits(shape, "none") == {}
    assert quantized_projections(seven_b, "nf4") == ["in_proj", "x_proj", "out_proj"]
    assert misfits(seven_b, "nf4") == {}
    assert quantized_projections(TINY, "nf4") == ["in_proj", "out_proj"]
    assert misfits(TINY, "nf4") == {"x_proj": "its 44 rows are not a multiple of 32"}
    assert nf4_misfit(64, 2000) == "its 2,000 columns are not a multiple of 64"


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_what_is_quantized_is_what_the_rule_says(
    tiny_base: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mamba_sft.model.loading"):
        model = load_model(section(tiny_base, kind))
    with safe_open(tiny_base / "model.safetensors", "pt") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    stored = {f"{name}.weight" for name, module in model.named_modules() if _is_quantized(module)}
    assert stored == {name for name, size in sizes.items() if quantizes(name, size, kind)}
    whole = {"none": set(), "nf4": {"in_proj", "out_proj"}, "int8": {"in_proj", "x_proj", "out_proj"}}
    assert {name.split(".")[-2] for name in stored} == whole[kind]
    said = [r.getMessage() for r in caplog.records if "stays in" in r.getMessage()]
    expected = ["`x_proj` stays in float32: its 36 rows are not a multiple of 32"]
    assert said == (expected if kind == "nf4" else [])


def _is_quantized(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.")


def test_every_4_bit_weight_could_be_packed(tiny_base: Path) -> None:
    """So plain `transformers` and bitsandbytes, which pack, run what we quantize, on any CPU."""
    layers = [m for m in load_model(section(tiny_base)).modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 4
    for layer in layers:
        functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)


def test_a_cpu_that_packs_computes_and_trains_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training follows an evaluation, as the sample prompts make it; all projections are in 4 bits."""
    build_model(time_step_rank=32).save_pretrained(tmp_path)
    found = []
    for packs in (False, True):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda packs=packs: packs)
        torch.manual_seed(0)
        model = attach_adapter(load_model(section(tmp_path)), AdapterSection(r=4))
        with torch.no_grad():
            logits = model.eval()(input_ids=IDS).logits
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients = [tensor.grad for tensor in adapter_tensors(model).values()]
        found.append((logits, *gradients))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# What `doctor` runs


def test_the_probe_has_the_smallest_real_shape() -> None:
    sizes = [TINY.projections[name] for name in quantized_projections(TINY, "nf4")]
    inputs, outputs = min(sizes, key=lambda size: size[0] * size[1])
    assert (outputs, inputs) == quantization.SMALLEST
    check_nf4()


def test_the_probe_passes_on_a_cpu_that_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    check_nf4()


def allow_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that packs, whose product is right and which, as the library's, has no gradient."""

    def product(a: torch.Tensor, b: torch.Tensor, out: Any = None, state: Any = None) -> torch.Tensor:
        codes, state = functional._convert_weight_packed_for_cpu_inverse(b.clone(), state)
        weight = functional.dequantize_4bit(codes, state).float()
        functional._convert_weight_packed_for_cpu(codes, state)
        return (a.detach() @ weight.T).requires_grad_(a.requires_grad)

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    monkeypatch.setattr(functional, "gemv_4bit", product)
    monkeypatch.setattr(quantization, "never_pack", lambda model: None)


def test_the_probe_sees_a_gradient_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_packing(monkeypatch)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        check_nf4()


def test_the_probe_sees_a_shape_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_packing(monkeypatch)
    monkeypatch.setattr(quantization, "SMALLEST", (44, 384))
    with pytest.raises(AssertionError, match="divisible by block_n"):
        check_nf4()


def test_the_probe_sees_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: 1.5 * real(self, x))
    with pytest.raises(ModelError, match=r"an evaluated product of a 4-bit weight is off by 5\d%"):
        check_nf4()
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: (1 + self.training / 2) * real(self, x))
    with pytest.raises(ModelError, match="a trained product"):
        check_nf4()

    def halved(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = real(self, x)
        return y.detach() + (y - y.detach()) / 2

    monkeypatch.setattr(Linear4bit, "forward", halved)
    with pytest.raises(ModelError, match="a gradient of a 4-bit weight"):
        check_nf4()
