"""The plan's memory against what torch's allocator hands out in a training step, within 10%."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.profiler import ProfilerActivity, profile

from mamba_sft.data.packing import Collator
from mamba_sft.kernels import cpu, cpu_loops, launching
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model.adapter import attach_adapter
from mamba_sft.model.full_weights import train_all_weights, without_wrapper
from mamba_sft.model.loading import load_model
from mamba_sft.model.shape import Shape, find_shape
from mamba_sft.planning import memory
from mamba_sft.planning.environment import describe_device
from mamba_sft.planning.gpus import GPUS, recognized
from mamba_sft.planning.memory import Work, peak, planned_parts, weights, with_length
from mamba_sft.recipe.fields import AdapterSection, ModelSection
from mamba_sft.training.activations import keep_activations
from mamba_sft.training.figures import Figures
from mamba_sft.training.fused_head import add_fused_head
from mamba_sft.training.streaming import backpropagate, split, sweep
from tests.conftest import build_model

TOLERANCE = 0.1
SEVEN_B = Shape(layers=64, hidden=4096, inner=8192, states=16, rank=256, width=4, vocabulary=65024)


class Case(NamedTuple):
    policy: str = "block"
    dtype: torch.dtype = torch.float32
    hidden: int = 256
    length: int = 1024
    rows: int = 1
    layers: int = 4
    stream: int | None = None
    vocabulary: int = 256
    states: int = 16
    packed: bool = False
    trained: tuple[int, ...] = ()
    adapter: tuple[tuple[str, Any], ...] | None = ()
    backend: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.backend == "triton" and torch.cuda.is_available() and not triton_is_interpreted()

    @property
    def work(self) -> Work:
        shape = Shape(
            layers=self.layers, hidden=self.hidden, inner=2 * self.hidden, states=self.states,
            rank=-(-self.hidden // 16), width=4, vocabulary=self.vocabulary,
        )  # fmt: skip
        return Work(
            shape=shape, rows=self.rows, length=self.length,
            chunk=min(self.stream or self.length, self.length),
            itemsize=self.dtype.itemsize, device="cuda" if self.backend == "triton" else "cpu",
            policy=self.policy, trained_rows=len(self.trained),
            adapter=None if self.adapter is None else AdapterSection(**dict(self.adapter)),
            card=launching.card_of(torch.device("cuda")) if self.on_gpu else None,
        )  # fmt: skip


def triton_is_interpreted() -> bool:
    """As it is on the simulated card, whose kernels then save states as for any."""
    from mamba_sft.kernels import triton_ops

    return bool(triton_ops.INTERPRETED)


bf16 = torch.bfloat16
FULL = [
    Case("none", adapter=None),
    Case("block", adapter=None),
    Case("none", hidden=512, length=512, adapter=None),
    Case("block", hidden=1024, length=512, layers=2, adapter=None),
    Case("block", length=512, rows=3, packed=True, adapter=None),
    Case("none", bf16, length=256, adapter=None),
    Case("block", bf16, length=256, adapter=None),
    Case("block", bf16, length=512, rows=2, packed=True, adapter=None),
    Case("none", stream=256, length=2048, adapter=None),
    Case("block", bf16, stream=128, length=512, adapter=None),
    Case("block", states=64, length=512, adapter=None),
    Case("none", vocabulary=4096, adapter=None),
    Case("block", bf16, vocabulary=8192, length=256, adapter=None),
    Case("block", bf16, hidden=1024, length=64, layers=2, adapter=None),
    Case("block", bf16, hidden=1024, length=256, layers=2, adapter=None),
    Case("none", bf16, hidden=512, length=64, layers=3, adapter=None),
    Case("block", hidden=1024, length=64, layers=2, adapter=None),
]
"""Without an adapter."""
CASES = [
    *FULL,
    Case("none"),
    Case("block"),
    Case("mamba"),
    Case("none", hidden=512, length=512),
    Case("block", hidden=1024, length=512, layers=2),
    Case("mamba", length=4096, layers=3),
    Case("block", length=512, rows=3, packed=True),
    Case("none", packed=True),
    Case("none", bf16, length=256),
    Case("block", bf16, length=256),
    Case("mamba", bf16, length=256, rows=2, packed=True),
    Case("none", stream=256, length=2048),
    Case("block", stream=512, length=4096),
    Case("mamba", stream=256, length=1000, packed=True),
    Case("block", bf16, stream=128, length=512),
    Case("block", states=64, length=512),
    Case("none", vocabulary=4096, trained=(1, 2)),
    Case("block", bf16, vocabulary=8192, trained=(1, 2), length=256),
    Case("none", adapter=(("lora_dropout", 0.1),), length=512),
    Case("none", adapter=(("target_modules", ["in_proj"]),), length=512),
    Case("none", adapter=(("target_modules", ["x_proj", "dt_proj"]), ("r", 64)), length=512),
]


def prepared(case: Case, device: str = "cpu") -> Any:
    work = case.work
    model = build_model(
        hidden_size=case.hidden, num_hidden_layers=case.layers, state_size=case.states,
        vocab_size=case.vocabulary, time_step_rank=work.shape.rank, intermediate_size=work.shape.inner,
    )  # fmt: skip
    dtype = torch.float32 if work.is_full else case.dtype
    model = install(model.to(device, dtype), "auto" if device == "cuda" else case.backend)
    if work.adapter is None:
        model = train_all_weights(model)
    else:
        model = attach_adapter(model, work.adapter, trained_token_ids=case.trained)
    add_fused_head(without_wrapper(model))
    keep_activations(model, case.policy)
    return model.train()


def step(model: Any, case: Case, device: str = "cpu") -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, case.vocabulary, (case.rows, case.length)).tolist()
    rows: list[dict[str, Any]] = [{"input_ids": row, "labels": row} for row in ids]
    if case.packed:
        third = case.length // 3
        rows = [row | {"seq_lengths": [third, third, case.length - 2 * third]} for row in rows]
    batch: dict[str, Any] = Collator(pad_token_id=0)(rows)
    batch |= {name: batch[name].to(device) for name in ("input_ids", "labels", "seq_idx")}
    cache = case.adapter is not None
    mixed = (
        nullcontext()
        if case.dtype == torch.float32
        else torch.autocast(device, case.dtype, cache_enabled=cache)
    )

    def run(chunk: Any, carry: Any, close: Any) -> None:
        with mixed:
            loss = Figures.of(model, chunk, carry=carry).loss / case.length
        close(loss).backward()

    chunks = split(batch, case.stream)
    with mixed:
        boundaries = sweep(without_wrapper(model).backbone, chunks)
    backpropagate(chunks, boundaries, run)


def measured_peak(case: Case) -> int:
    """The most bytes that torch's CPU allocator had handed out in a second step, beyond those before it."""
    model = prepared(case)
    step(model, case)
    with (
        pytest.MonkeyPatch.context() as patch,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        patch.setattr(cpu, "_empty", torch.empty)  # which the allocator sees; numpy's it does not
        step(model, case)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most


def planned_peak(work: Work) -> int:
    """The plan's peak without what was there before the step."""
    still = ("weights", "adapter", "gradients", "optimizer", "overhead")
    return peak({name: 0 if name in still else size for name, size in planned_parts(work).items()})


@pytest.fixture
def small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the blocks be what the peak consists of: TRL's tile of logits would hide them in small models."""
    monkeypatch.setattr("mamba_sft.training.fused_head.VOCABULARY_TILE", 64)
    monkeypatch.setattr(memory, "TILE_COLUMNS", 64)


@pytest.mark.usefixtures("small_tile")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_ten_percent_of_what_is_allocated(case: Case) -> None:
    assert planned_peak(case.work) == pytest.approx(measured_peak(case), rel=TOLERANCE)


@pytest.mark.parametrize(
    "case", [Case("none", length=512), Case("block", bf16, length=256, vocabulary=4096)], ids=str
)
def test_with_the_loss_in_its_own_size(case: Case) -> None:
    assert planned_peak(case.work) == pytest.approx(measured_peak(case), rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tile")
def test_the_triton_kernels_memory() -> None:
    """In Triton's interpreter, whose kernels get the tensors that they would get on a card.

    It keeps the arguments of the last launch, which on so small a shape makes 9% of the peak.
    """
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles here; see the test on the GPU")
    case = Case("none", bf16, hidden=128, length=64, layers=2, backend="triton")
    assert planned_peak(case.work) == pytest.approx(measured_peak(case), rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("policy", ["none", "block", "mamba"])
@pytest.mark.parametrize("stream", [None, 1024])
def test_on_a_gpu(policy: str, stream: int | None) -> None:
    case = Case(policy, bf16, 2048, 4096, layers=4, stream=stream, vocabulary=32000, backend="triton")
    model = prepared(case, "cuda")
    step(model, case, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(model, case, "cuda")
    assert planned_peak(case.work) == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=TOLERANCE)


def test_sizes_are_those_of_the_libraries() -> None:
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

    from mamba_sft.training.fused_head import VOCABULARY_TILE

    triton_ops = pytest.importorskip("mamba_sft.kernels.triton_ops")
    assert memory.STATE_STRIDE == cpu_loops.STATE_STRIDE == triton_ops.STATE_STRIDE
    assert memory.PARTIAL_SUMS == triton_ops.PARTIAL_BYTES
    assert (memory.GROUPS, memory.CHANNELS) == (cpu.GROUPS, triton_ops.BACKWARD_CHANNELS)
    assert (memory.TILE_TOKENS, memory.TILE_COLUMNS) == (
        TOKEN_CHUNK_SIZE,
        VOCABULARY_TILE,
    )


@pytest.mark.parametrize("name", GPUS)
def test_a_card_is_planned_with_the_states_that_its_kernels_save(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Asked of both with the same driver: the table's card, with a cache that it says or does not say."""
    triton_ops = pytest.importorskip("mamba_sft.kernels.triton_ops")
    card = GPUS[name].card
    assert card is not None
    for cache in (card.l2_bytes, 0, 1 << 20, 1 << 30):
        driver = SimpleNamespace(
            name=GPUS[name].name, major=card.capability[0], minor=card.capability[1],
            multi_processor_count=card.multiprocessors, L2_cache_size=cache, total_memory=1 << 34,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            patch.setattr(torch.cuda, "get_device_properties", lambda device: driver)  # noqa: B023
            patch.setattr(triton_ops, "INTERPRETED", False)
            here = recognized(describe_device()).card
            for states in (16, 64):
                shape = replace(SEVEN_B, states=states)
                saved = triton_ops._stride(SimpleNamespace(is_cuda=True, device="cuda"), states, False)
                assert Work(shape, 1, 2048, 2048, card=here).state_stride == saved
                if cache in (card.l2_bytes, 0):
                    assert Work(shape, 1, 2048, 2048, card=card).state_stride == saved


def test_a_small_cache_costs_states_saved_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a T4 every 16 steps, on an H100 every 64; 8192 channels of 16 states in float32, for one layer."""
    monkeypatch.setattr("mamba_sft.kernels.launching.TRITON", (3, 7))  # another would spill on the H100
    t4, h100 = (Work(SEVEN_B, 1, 2048, 2048, policy="none", card=GPUS[name].card) for name in ("t4", "h100"))
    more = 4 * 8192 * 16 * (2048 // 16 - 2048 // 64)
    assert planned_parts(t4)["kept"] - planned_parts(h100)["kept"] == 64 * more


def test_parameters_are_counted_exactly() -> None:
    assert SEVEN_B.parameters == 7_272_665_088  # as published
    for settings in ({}, {"tie_word_embeddings": True}, {"use_bias": True, "use_conv_bias": False}):
        model = build_model(**settings)
        shape = Shape.from_config(model.config.to_dict())
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
        wrapped = attach_adapter(install(model), AdapterSection(use_dora=True), trained_token_ids=[1, 2])
        work = Work(shape, 1, 64, 64, adapter=AdapterSection(use_dora=True), trained_rows=2)
        trained = sum(p.numel() for p in {id(p): p for p in wrapped.parameters() if p.requires_grad}.values())
        assert work.trained == trained


def plan_7b(**settings: Any) -> int:
    settings = {"rows": 1, "length": 8192, "trained_rows": 2, "chunk": 0} | settings
    settings["chunk"] = settings["chunk"] or settings["length"]
    return peak(planned_parts(Work(SEVEN_B, **settings)))


def test_7b_nf4_streams_any_length_under_12_gb() -> None:
    peaks = [
        plan_7b(length=length, chunk=1024, quantization="nf4", optim="paged_adamw_8bit")
        for length in (4096, 32_768, 1_048_576)
    ]
    assert peaks[0] == peaks[1] == peaks[2] < 12e9


def test_7b_bf16_trains_32k_tokens_under_24_gb() -> None:
    assert plan_7b(length=32_768, chunk=1024) < 24e9


def test_7b_bf16_trains_packed_rows_of_8k_under_80_gb_without_streaming() -> None:
    assert plan_7b(length=8192, policy="block") < 80e9
    assert plan_7b(length=8192, policy="mamba") < 80e9


def test_whole_rows_grow_with_their_length_and_streamed_ones_do_not() -> None:
    whole = Work(SEVEN_B, 1, 2048, 2048)
    assert peak(planned_parts(with_length(whole, 8192))) > peak(planned_parts(whole)) + 4e9
    streamed = Work(SEVEN_B, 1, 2048, 1024)
    assert planned_parts(with_length(streamed, 8192)) == planned_parts(streamed)
    assert with_length(streamed, 8192).boundaries == 7 * SEVEN_B.state_bytes(2)


def test_nf4_weights_take_what_bitsandbytes_stores() -> None:
    assert weights(Work(SEVEN_B, 1, 64, 64, quantization="nf4")) == pytest.approx(4.75e9, rel=0.01)


def test_nf4_weights_of_a_small_base_are_those_that_are_loaded() -> None:
    """The tiny base's `x_proj` has 44 rows, which 4 bits do not take."""
    section = ModelSection(base="data/tiny-base", dtype="float32", quantization="nf4")
    shape, _ = find_shape(section)
    model = load_model(section, device="cpu")
    stored = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            stored += state.absmax.nbytes + state.state2.absmax.nbytes
    work = Work(shape, 1, 64, 64, itemsize=4, device="cpu", quantization="nf4")
    assert work.quantized == ["in_proj", "out_proj"]
    assert weights(work) == pytest.approx(stored, rel=0.002)


def test_the_weight_that_is_unpacked_is_the_largest_in_4_bits() -> None:
    """In bytes of a number of the base; `in_proj` of 96 columns stays as it is, `x_proj` of 44 rows too."""

    def unpacked(hidden: int, inner: int, rank: int) -> int:
        shape = Shape(layers=1, hidden=hidden, inner=inner, states=16, rank=rank, width=4, vocabulary=64)
        return planned_parts(Work(shape, 1, 64, 64, quantization="nf4"))["dequantized"]

    assert unpacked(64, 128, 32) == 2 * 64 * 256
    assert unpacked(96, 192, 12) == 2 * 192 * 96
    assert unpacked(48, 96, 12) == 0
