"""A row in chunks gives the gradients of the whole row, whatever the chunks and the adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from mamba_sft.data.packing import Collator
from mamba_sft.data.rows import IGNORED
from mamba_sft.kernels.carry import Carry
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model.adapter import adapter_tensors, attach_adapter
from mamba_sft.model.loading import load_model
from mamba_sft.recipe.fields import AdapterSection, ModelSection
from mamba_sft.training.activations import Policy, keep_activations
from mamba_sft.training.figures import Figures
from mamba_sft.training.fused_head import add_fused_head
from mamba_sft.training.streaming import backpropagate, split, sweep
from tests.conftest import build_model

SIZES = [1, 5, 8, 16, 37, 100]  # sequences begin at 10 and 16: inside a chunk, and exactly at a boundary


def with_adapter(model: Any, **section: Any) -> Any:
    """Adapter weights far from zero, two trained token rows, our head and TRL's."""
    model = attach_adapter(model, AdapterSection(r=4, **section), trained_token_ids=[3, 4])
    torch.manual_seed(0)
    for name, tensor in adapter_tensors(model).items():
        if "magnitude" not in name:
            tensor.data.normal_(0.0, 0.1)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    add_fused_head(model.get_base_model())
    return model.train()


def batch() -> dict[str, Tensor]:
    """A packed row of three sequences over one that is shorter and padded; the tokens 3 and 4 occur."""
    numbers = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for lengths in ([10, 6, 21], [30]):
        ids = torch.randint(0, 512, (sum(lengths),), generator=numbers)
        ids[4::7] = 3
        ids[6::7] = 4
        labels = torch.where(torch.rand(len(ids), generator=numbers) < 0.3, IGNORED, ids)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "seq_lengths": lengths})
    return Collator(pad_token_id=11)(rows)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: tensor.grad.clone() for name, tensor in adapter_tensors(model).items()}


def whole(model: Any, inputs: dict[str, Tensor], scale: float = 1.0) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    loss = -model(**tensors, fused_lm_head=True).log_probs.sum() / 50
    (loss * scale).backward()
    return loss.item(), gradients(model)


def streamed(
    model: Any, inputs: dict[str, Tensor], tokens: int, scale: float = 1.0, **more: Any
) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    chunks = split(inputs, tokens)
    losses = []

    def run(chunk: Any, carry: Carry, close: Any) -> None:
        loss = Figures.of(model, chunk, carry=carry).loss / 50
        losses.append(loss.item())
        close(loss * scale).backward()

    backpropagate(chunks, sweep(model.get_base_model().backbone, chunks, **more), run)
    return sum(losses), gradients(model)


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    for name, expected in theirs[1].items():
        assert expected.norm() > 0, f"{name} would prove nothing"
        error = (ours[1][name] - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"target_modules": ["dt_proj", "x_proj"]}])
def test_gradients_are_those_of_the_whole_row(variant: dict[str, Any], tokens: int) -> None:
    model = with_adapter(install(build_model()), **variant)
    assert_same(streamed(model, batch(), tokens), whole(model, batch()))


def test_nothing_is_lost_in_double_precision() -> None:
    """In float64 only the mathematics is left."""
    model = install(with_adapter(install(build_model())).double(), "reference")
    theirs = whole(model, batch())
    for tokens in (1, 8, 10, 16):
        ours = streamed(model, batch(), tokens)
        # TRL's head computes in float32; what it gives is the same for both up to its own rounding.
        assert_same(ours, theirs, 1e-6)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_bases(tiny_base: Any, quantization: Any) -> None:
    section = ModelSection(base=str(tiny_base), dtype="float32", quantization=quantization, kernels="cpu")
    model = with_adapter(load_model(section, device="cpu"))
    tolerance = 1e-5 if quantization == "nf4" else 0.05  # int8 rounds the activations of each chunk anew
    assert_same(streamed(model, batch(), 8), whole(model, batch()), tolerance)


@pytest.mark.parametrize("policy", ["none", "block", "mamba"])
def test_checkpointing_inside_a_chunk(policy: Policy) -> None:
    model = with_adapter(install(build_model()))
    theirs = whole(model, batch())
    keep_activations(model, policy)
    assert_same(streamed(model, batch(), 8), theirs)


def test_a_scaled_loss_scales_the_gradients_once() -> None:
    """As float16's loss scaling does: what chunks hand back is scaled already."""
    model = with_adapter(install(build_model()))
    loss, theirs = whole(model, batch(), scale=1024.0)
    assert_same(streamed(model, batch(), 8, scale=1024.0), (loss, theirs))


def test_bfloat16_is_as_good_as_without_streaming() -> None:
    model = with_adapter(install(build_model().bfloat16()))
    exact = whole(with_adapter(install(build_model().bfloat16().float())), batch())
    with torch.autocast("cpu", torch.bfloat16):
        one = whole(model, batch())
    model.zero_grad()
    chunks = split(batch(), 8)

    def run(chunk: Any, carry: Carry, close: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = Figures.of(model, chunk, carry=carry).loss / 50
        close(loss).backward()

    with torch.autocast("cpu", torch.bfloat16):
        boundaries = sweep(model.get_base_model().backbone, chunks)
    backpropagate(chunks, boundaries, run)
    many = gradients(model)
    for name, truth in exact[1].items():
        error_whole, error_streamed = ((g - truth).norm() / truth.norm() for g in (one[1][name], many[name]))
        assert error_streamed < 1.5 * error_whole + 0.01, name


def test_dropout_draws_the_same_numbers_in_both_passes() -> None:
    """Against one graph over all chunks, which draws the numbers of each chunk once."""
    model = with_adapter(install(build_model()), lora_dropout=0.3)
    chunks = split(batch(), 8)
    torch.manual_seed(5)
    model.zero_grad()
    states, loss = None, torch.zeros(())
    for chunk in chunks:
        carry = Carry(chunk.enter(states))
        loss = loss - model(**chunk.inputs, carry=carry, fused_lm_head=True).log_probs.sum() / 50
        states = carry.after
    loss.backward()
    theirs = loss.item(), gradients(model)
    drawn_next = torch.rand(1)
    torch.manual_seed(5)
    assert_same(streamed(model, batch(), 8), theirs)
    assert torch.equal(torch.rand(1), drawn_next), "later random numbers are those of a single pass"


def test_a_sequence_that_starts_at_a_boundary_starts_from_nothing() -> None:
    """Other tokens before the boundary change nothing behind it, and behind it nothing reaches back."""
    model = with_adapter(install(build_model()))
    inputs = batch()
    other = copy.deepcopy(inputs)
    other["input_ids"][0, :16] = 200
    losses = []
    for each in (inputs, other):
        each["labels"][0, :17] = IGNORED
        each["labels"][1] = IGNORED
        each["trained"][0, :16] = each["trained"][1] = False
        losses.append(streamed(model, each, 16)[0])
    assert losses[0] == losses[1]


def test_labels_are_those_of_the_next_token_across_boundaries() -> None:
    inputs = batch()
    chunks = split(inputs, 8)
    shifted = torch.cat([chunk.inputs["shift_labels"] for chunk in chunks], dim=1)
    assert torch.equal(shifted[:, :-1], inputs["labels"][:, 1:])
    assert (shifted[:, -1] == IGNORED).all()
    assert chunks[0].continues is None
    assert [chunk.continues.flatten().tolist() for chunk in chunks[1:]] == [
        [True, True], [False, True], [True, True], [True, True]
    ]  # fmt: skip


def test_states_keep_nothing_else_alive() -> None:
    """A view into the activations of its chunk would keep them."""
    model = with_adapter(install(build_model()))
    carry = Carry()
    inputs = {name: x for name, x in split(batch(), 8)[0].inputs.items() if name != "shift_labels"}
    model.get_base_model().backbone(**inputs, carry=carry)
    for state in carry.after:
        for tensor in state:
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_row_can_start_from_given_states() -> None:
    """The second half of a row, started from the states after the first, is what it is in the whole row."""
    model = with_adapter(install(build_model()))
    inputs = {name: x[1:] for name, x in batch().items() if name != "where"}
    first, second = split(inputs, 20)
    after_first = sweep(model.get_base_model().backbone, [first, second]).restore(1)
    after_first = [(conv.detach(), scan.detach()) for conv, scan in after_first]
    rest = {name: x[:, 20:] for name, x in inputs.items()}
    later = {**inputs, "labels": inputs["labels"].clone()}
    later["labels"][:, :21] = IGNORED
    later["trained"] = inputs["trained"].copy()
    later["trained"][:, :20] = False
    rest["labels"], rest["trained"] = later["labels"][:, 20:], later["trained"][:, 20:]
    assert streamed(model, rest, 4, initial=after_first)[0] == pytest.approx(whole(model, later)[0], rel=1e-5)


def test_a_cache_and_a_carry_do_not_go_together() -> None:
    from transformers.cache_utils import DynamicCache

    model = install(build_model())
    with pytest.raises(ValueError, match="either cache_params or carry"):
        model(batch()["input_ids"], cache_params=DynamicCache(config=model.config), carry=Carry())
