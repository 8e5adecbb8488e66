"""The memory of a training step, by arithmetic: what each tensor that it holds takes, and when.

The peak is `weights + adapter + gradients + optimizer + states + kept + max(block, loss)`: what the forward
keeps of all layers, and on top of it either the loss with its gradient, or the backward of one block, which
peaks inside the scan. Every term is a count of tensors that can be found in the code it names; the counts are
compared with measured peaks in tests/planning/test_memory.py. Bytes throughout; D, d, N, R, r as in
`kernels/README.md`, `e` the bytes of a number of the base, 2 or 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from mamba_sft.kernels.launching import CARDS, STRIDES, WAVES, Card, scratch_bytes, state_stride, window
from mamba_sft.model.quantization import quantized_projections
from mamba_sft.model.shape import Shape
from mamba_sft.planning.gpus import Accelerator
from mamba_sft.recipe.fields import AdapterSection
from mamba_sft.recipe.recipe import Recipe

STATE_STRIDE = STRIDES[0]
"""Steps between two states that the scan saves, unless the card says otherwise (`cpu_loops.STATE_STRIDE`)."""
GROUPS = 32
"""Partial sums of dB and dC on a CPU (`cpu.GROUPS`); a GPU has one for `CHANNELS` channels."""
CHANNELS = 32
TILE_TOKENS, TILE_COLUMNS = 4096, 32768
"""What the fused head makes logits for at a time: TRL's `TOKEN_CHUNK_SIZE`, our `VOCABULARY_TILE`."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: 4 bits, a byte of scale for 64 of them, a float32 for 256 of those (double quantization)."""
CONTEXT = 600_000_000
"""CUDA context, cuBLAS workspace, loaded kernels. A constant that varies by driver, 0.4 to 0.8 GB."""
LIBRARIES = 700_000_000
"""Resident memory of a process that has imported torch, transformers and trl, on a CPU."""
SLACK = 0.04
"""Share of the moving memory that a caching allocator holds beyond what is asked of it."""
PARTIAL_SUMS = 256 << 20
"""The most that its partial sums of dB and dC take (`triton_ops.PARTIAL_BYTES`)."""

Part = Literal[
    "weights", "adapter", "gradients", "optimizer", "states", "kept", "block", "dequantized", "loss", "rows",
    "overhead",
]  # fmt: skip
Policy = Literal["none", "block", "mamba"]


@dataclass(frozen=True)
class Work:
    """What the memory of a training step depends on.

    Args:
        shape: The base model.
        rows: Rows of a micro-batch.
        length: Tokens of a row.
        chunk: Tokens of a row that are at work at once: `length`, or less when rows stream.
        itemsize: Bytes of a number of the base, e.
        device: `cuda` with the Triton kernels, or `cpu` with numba's.
        policy: `train.checkpointing`.
        quantization: `model.quantization`.
        optim: `train.optim`.
        adapter: Rank, targets, variants; None: all weights are trained.
        trained_rows: Rows of the vocabulary that are trained.
        card: What the kernels' launches depend on. None: a GPU that is not known, or none.
    """

    shape: Shape
    rows: int
    length: int
    chunk: int
    itemsize: int = 2
    device: Literal["cuda", "cpu"] = "cuda"
    policy: Policy = "block"
    quantization: Literal["none", "nf4", "int8"] = "none"
    optim: str = "adamw_torch_fused"
    adapter: AdapterSection | None = field(default_factory=AdapterSection)
    trained_rows: int = 0
    card: Card | None = None

    @classmethod
    def of(
        cls, recipe: Recipe, shape: Shape, accelerator: Accelerator, *, length: int, trained_rows: int
    ) -> Work:
        """Returns the work of a recipe's training step on rows of `length` tokens."""
        train = recipe.train
        float32 = ("float32",) if accelerator.type == "cuda" else ("float32", "auto")
        return cls(
            shape=shape,
            rows=train.per_device_train_batch_size,
            length=length,
            chunk=min(train.stream_tokens or length, length),
            itemsize=4 if recipe.model.dtype in float32 else 2,
            device="cuda" if accelerator.type == "cuda" else "cpu",
            policy=train.checkpointing,
            quantization=recipe.model.quantization,
            optim=train.optim,
            adapter=recipe.adapter,
            trained_rows=trained_rows,
            card=accelerator.card,
        )

    @property
    def quantized(self) -> list[str]:
        """The projections that are stored in 4 or 8 bits; the rest is `itemsize` bytes a number."""
        return quantized_projections(self.shape, self.quantization)

    @property
    def streams(self) -> bool:
        """Whether a row is taken in chunks."""
        return self.chunk < self.length

    @property
    def tokens(self) -> int:
        """Tokens at work at once."""
        return self.rows * self.chunk

    @property
    def mixed(self) -> bool:
        """Whether products are computed in 16 bits, under autocast, with what is trained in float32."""
        return self.itemsize < 4

    @property
    def is_full(self) -> bool:
        """Whether all weights are trained; they are float32 then."""
        return self.adapter is None

    @property
    def has_float32_residual(self) -> bool:
        """Whether the residual stream is float32: by the configuration, or because all weights are."""
        return self.shape.residual_in_fp32 or self.is_full

    @property
    def has_dora(self) -> bool:
        """Whether the adapter learns lengths apart from directions."""
        return self.adapter is not None and self.adapter.use_dora

    def targets(self, name: str) -> bool:
        """Whether projection `name` carries LoRA."""
        return self.adapter is not None and any(
            target.rpartition(".")[2] == name for target in self.adapter.target_modules
        )

    @property
    def state_stride(self) -> int:
        """Steps between two states that the scan saves; the rates A are trained with all weights only."""
        return STATE_STRIDE if self.card is None else state_stride(self.card, self.shape.states, self.is_full)

    @property
    def lora_values(self) -> int:
        """Values of the LoRA matrices and DoRA's magnitudes."""
        adapter = self.adapter
        if adapter is None:
            return 0
        sizes = [size for name, size in self.shape.projections.items() if self.targets(name)]
        each = sum(adapter.r * (inputs + outputs) + adapter.use_dora * outputs for inputs, outputs in sizes)
        return self.shape.layers * each

    @property
    def trained(self) -> int:
        """All values that are trained."""
        if self.is_full:
            return self.shape.parameters
        matrices = 1 if self.shape.tied else 2
        return self.lora_values + self.trained_rows * self.shape.hidden * matrices

    @property
    def boundaries(self) -> int:
        """Bytes of the states that streaming keeps in host memory, one for each chunk but the first."""
        return (-(-self.length // self.chunk) - 1) * self.rows * self.shape.state_bytes(self.itemsize)


def planned_parts(work: Work) -> dict[Part, int]:
    """Returns the bytes of each part of a training step's memory on the device.

    All but the last of `block` (with `dequantized`), `loss` and `rows` are there at the same time; of these
    three the largest counts: they are phases that follow one another. See `peak`.
    """
    states = 4 * work.rows * work.shape.state_bytes(work.itemsize) if work.streams else 0
    if work.streams and work.device == "cpu":  # host memory is the device's
        states += work.boundaries
    parts: dict[Part, int] = {
        "weights": weights(work),
        "adapter": 0 if work.is_full else 4 * work.trained,
        "gradients": 4 * work.trained,
        "optimizer": work.trained * (8 if work.optim == "adamw_torch_fused" else 2),
        "states": states,
        "kept": kept(work),
        "block": _block(work),
        "dequantized": _dequantized(work),
        "loss": _loss(work),
        "rows": _rows(work),
        "overhead": LIBRARIES,
    }
    if work.device == "cuda":
        moving = parts["kept"] + max(parts["block"] + parts["dequantized"], parts["loss"])
        parts["overhead"] = CONTEXT + int(SLACK * moving)
    return parts


def peak(parts: dict[Part, int]) -> int:
    """Returns the most bytes that are held at once."""
    phases = ("kept", "block", "dequantized", "loss", "rows")
    always = sum(size for name, size in parts.items() if name not in phases)
    at_work = max(parts["block"] + parts["dequantized"], parts["loss"])
    return always + max(parts["kept"] + at_work, parts["rows"])


def weights(work: Work) -> int:
    """Returns the bytes of the base model."""
    shape, e = work.shape, 4 if work.is_full else work.itemsize
    if work.quantization == "none":
        return shape.parameters * e
    sizes = [shape.projections[name] for name in work.quantized]
    values = shape.layers * sum(inputs * outputs for inputs, outputs in sizes)
    scales = shape.layers * sum(outputs for _, outputs in sizes)
    small = values * NF4_BYTES if work.quantization == "nf4" else values + 4 * scales
    return int(small + (shape.parameters - values) * e)


def kept(work: Work) -> int:
    """Returns the bytes that the forward of all layers keeps for the backward.

    `block` keeps the residual that enters a layer; `mamba` also the base's products of in_proj (xz, 2 D) and
    x_proj (R + 2 N); `none` everything (`_layer`). What comes once, at the end, is part of the loss.
    """
    shape, e = work.shape, work.itemsize
    residual = shape.hidden * (4 if work.has_float32_residual else e)
    if work.policy == "none":
        return shape.layers * _layer(work)
    boundary = residual
    if work.policy == "mamba":
        boundary += e * (2 * shape.inner + shape.rank + 2 * shape.states)
        boundary += e * shape.hidden * work.has_dora
    return shape.layers * (boundary + sum(_int8_inputs(work).values())) * work.tokens


def _int8_inputs(work: Work) -> dict[str, int]:
    """Bytes per token of the inputs that bitsandbytes keeps of int8 projections.

    It puts them beside what autograd knows of (`MatMul8bitLt` holds them on its context), so checkpointing
    does not reach them: those of all layers stay until the backward has passed.
    """
    if work.quantization != "int8":
        return {}
    return {name: work.itemsize * work.shape.projections[name][0] for name in work.quantized}


def _layer(work: Work) -> int:
    """Bytes that one layer keeps for its backward when nothing is checkpointed.

    The scan: xz (2 D), u, dt (D each), B, C (N each), and a state (D, N) of float32 for every `state_stride`
    steps. The norms before it: their inputs in float32. LoRA: the input of each target, which in float32 is
    a tensor that is there anyway, except out_proj's and in_proj's; under autocast PEFT makes a float32 copy
    of it and autocast a 16-bit one of that, which is kept.
    """
    shape, e, mixed = work.shape, work.itemsize, work.mixed
    d, D, N, R = shape.hidden, shape.inner, shape.states, shape.rank
    on = {name: work.targets(name) or work.is_full for name in shape.projections}
    token = e * (4 * D + 2 * N) + 4 * (R + 2 * N) + 4 * d  # xz, u, dt; B, C; x_dbl; the residual or its copy
    token += e * (D * on["out_proj"] + d * on["in_proj"] + R * on["dt_proj"])
    token += e * D * (work.targets("x_proj") and mixed)
    token += 4 * d * work.is_full  # what the block's norm multiplies by its weight
    rank = work.adapter.r if work.adapter is not None else 0
    token += e * rank * sum(on.values()) + 4 * 4  # A's products; a factor for each norm
    token += _variants(work, on)
    if work.policy == "none" and mixed:  # in float32 the adapter keeps the same tensors
        token += sum(size for name, size in _int8_inputs(work).items() if name != "x_proj")  # the scan has it
    chunks = work.rows * -(-work.chunk // work.state_stride)
    once = 4 * D * N * (1 + work.is_full)  # the rates, and what they are the negative of
    if mixed:
        once += e * (_projections(work) if work.is_full else work.lora_values // shape.layers)
    return token * work.tokens + 4 * D * N * chunks + once


def _projections(work: Work) -> int:
    """Weights of the projections of a layer, of which autocast makes 16-bit copies where they are float32."""
    return sum(inputs * outputs for inputs, outputs in work.shape.projections.values())


def _variants(work: Work, on: dict[str, bool]) -> int:
    """Bytes per token that dropout's masks and DoRA's products add to a layer."""
    token, adapter = 0, work.adapter
    for name, (inputs, outputs) in work.shape.projections.items():
        if on[name] and adapter is not None and adapter.lora_dropout:
            token += inputs * (1 if work.device == "cuda" else 4)
            token += 4 * inputs * (name == "x_proj" and not work.mixed)
        if on[name] and work.has_dora:
            token += 2 * outputs * work.itemsize
    return token


def _block(work: Work) -> int:
    """Bytes of the backward of one layer at its peak, beyond what was kept.

    Under checkpointing that starts with the layer's own tensors, computed again. At the peak, in the scan's
    backward, there are dy (which took the place of y), du, ddt and dz (D each), the partial sums of dB and
    dC, and the gradient of the residual. The CPU kernels hold the three gradients in float32 and, of 16-bit
    inputs, float32 copies of u, dt, z and dy. A GPU can peak before it, in out_proj's backward, where PEFT
    turns the adapter's part of dy (D) into float32.
    """
    shape, e, tokens = work.shape, work.itemsize, work.tokens
    D, N = shape.inner, shape.states
    dy = 0 if work.targets("out_proj") or work.is_full else e * D
    if work.device == "cpu":
        scan = 4 * 3 * D + (4 * 4 * D if work.mixed else 0)
        groups = min(-(-D // CHANNELS), GROUPS, max(4, D // (4 * N)))
        scan += 4 * 2 * (-(-N // 8) * 8) * groups
        scratch = 0
    else:
        partial = min(4 * 2 * N * -(-D // CHANNELS), PARTIAL_SUMS // tokens)
        scan = max(3 * e * D + partial, (2 * e + 4 * work.mixed) * D)
        scratch = _scratch(work)
    again = 0 if work.policy == "none" else _layer(work)
    if again and not work.mixed:  # the residual is not computed again
        again -= 4 * shape.hidden * tokens
    if not work.is_full:
        return again + (scan + dy + 4 * shape.hidden) * tokens + scratch
    rates = 4 * D * N * (work.rows + 1)
    gone = e * D * shape.hidden * work.mixed  # the 16-bit copy of out_proj
    in_scan = again + (scan + 4 * shape.hidden) * tokens + scratch + rates - gone
    return max(in_scan, _last_product(work))


def _last_product(work: Work) -> int:
    """Bytes of the backward of `in_proj`, the first product of a layer, where its weight is trained.

    Its input and the gradient of its output, the residual with its gradient and what the norm keeps; the
    weight's gradient and, under autocast, that in float32 too.
    """
    shape, e = work.shape, work.itemsize
    d, D = shape.hidden, shape.inner
    gone = _layer(work) if work.policy == "none" else 0  # counted as kept, and most of it is not any more
    tokens = (e * (2 * D + d) + 4 * 3 * d) * work.tokens
    inputs, outputs = shape.projections["in_proj"]
    return tokens + inputs * outputs * (e + 4 if work.mixed else 4) - gone


def _scratch(work: Work) -> int:
    """Bytes of the Triton backward's states before every window of a chunk, of all programs of a launch.

    It starts about as many programs as fill the GPU `WAVES` times, whatever the shape; fewer for short rows.
    Of a card that is not known, an H100's.
    """
    card = work.card or CARDS["H100"]
    steps = window(card.capability, work.shape.states, work.is_full)
    segments = work.rows * max(1, work.chunk // (4 * STATE_STRIDE))
    whole = 4 * work.shape.inner * work.shape.states * (work.state_stride // steps) * segments
    return min(WAVES * scratch_bytes(card, steps, work.state_stride), whole)


def _dequantized(work: Work) -> int:
    """Bytes of the weight that is unpacked at the time, the largest of them."""
    sizes = {name: inputs * outputs for name, (inputs, outputs) in work.shape.projections.items()}
    size = work.itemsize * max((sizes[name] for name in work.quantized), default=0)
    if work.has_dora:  # the norm of W + B A, in float32
        size += 2 * 4 * sizes["in_proj"]
    return size


def _loss(work: Work) -> int:
    """Bytes of TRL's chunked loss in its backward.

    The last residual and the last norm's output, which the forward kept. A tile of logits for up to 4,096
    tokens and 32,768 columns (allocated whole, however small the vocabulary), and the gradient of the hidden
    states in float32. Without a GPU seven float32 tensors of the size of the tile's used part. Where rows of
    the head are trained, PEFT hands TRL a copy of it and gets its whole gradient in float32, then in `e`.
    """
    shape, e = work.shape, work.itemsize
    tokens, columns = min(work.tokens, TILE_TOKENS), min(shape.vocabulary, TILE_COLUMNS)
    residual = 4 if work.has_float32_residual else e
    size = tokens * TILE_COLUMNS * e + (4 + 2 * residual) * work.tokens * shape.hidden
    if work.mixed:
        size += tokens * shape.hidden * e
    if work.device == "cpu":
        size += (7 * 4 + 1) * tokens * columns
    if work.is_full:
        size += 4 * shape.matrix + 4 * work.tokens * shape.hidden
        size += columns * shape.hidden * (e if work.mixed else 0)
    elif work.trained_rows:
        size += shape.matrix * (e + 4 + (e if work.mixed else 0))
    return size


def _rows(work: Work) -> int:
    """Bytes of the whole embedding gradients that trained rows are picked from, at the backward's end."""
    if work.is_full:
        return 4 * work.shape.matrix * (2 if work.shape.tied else 1)
    return 2 * work.shape.matrix * work.itemsize if work.trained_rows else 0


def with_length(work: Work, length: int) -> Work:
    """Returns the same work on rows of another length; those that stream still do, in the same chunks."""
    chunk = min(work.chunk, length) if work.streams else length
    return replace(work, length=length, chunk=chunk)
