"""How fast this machine's processor trains: measured once, kept, and named wherever it is used.

A few pieces of a training step are timed: a layer of our mixer with an adapter, with hardly any tokens and
with many; a matrix product; the loss of some logits. What a recipe's step takes is put together of these by
`speed`. They are timed in processor time of all threads, which other programs cannot take away: what a plan
says is for a machine that has nothing else to do.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mamba_sft.data.cache import cache_home, key_of
from mamba_sft.planning.environment import package_versions, processor_name
from mamba_sft.run import write_atomically
from mamba_sft.wording import count_text

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of what is kept: raised when the same processor would be measured in another way."""
LAYERS, HIDDEN, FEW, MANY = 2, 192, 16, 512
"""Of the model whose layers are timed, and its tokens."""
SEQUENCE = 45
"""Tokens of a sequence in a packed row."""
ROWS, COLUMNS, INNER = 256, 4096, 1024
"""Of the matrix product."""
TARGETS, VOCABULARY = 256, 1536
"""Tokens and logits of the loss."""
LOSS_PRODUCTS = 4
"""Of the loss: the logits twice, the gradients of the hidden states and of the head's trained rows."""
SECONDS = 0.5
"""Of processor time that each piece is repeated for; by the clock ten times as long at most."""
PAUSE = 30.0
"""Seconds between two looks at whether a machine that was busy still is."""
_asked_again = [0.0]  # when, by the clock of `time.monotonic`
_FEWEST, _MOST = 4, 60
_ALONE = 0.85  # of the time by the clock that a thread which never waits gets, where nobody else is at work


@dataclass(frozen=True)
class Processor:
    """What parts of a training step take on a processor, in seconds of processor time.

    Args:
        name: As the system gives it.
        threads: With which it was measured.
        dtype: Number format of the base.
        date: When.
        busy: Whether other programs took part of it then.
        layer: Seconds of a layer, forward and backward, however few its tokens.
        channel: Seconds of a layer for each token and inner channel, products left out.
        forward: The forward's share of both.
        products: Operations of matrix products per second.
        logit: Seconds of the loss for each logit, products left out.
    """

    name: str
    threads: int
    dtype: str
    date: str
    busy: bool
    layer: float
    channel: float
    forward: float
    products: float
    logit: float

    @property
    def described(self) -> str:
        """When and how it was measured, for people."""
        busy = ", when it was busy" if self.busy else ""
        return f"measured {self.date} with {count_text(self.threads, 'thread')}{busy}"


def this_processor(dtype: str) -> Processor:
    """Returns what is known of this machine's processor with the threads that torch uses; measures it once.

    What was measured while other programs were at work is measured again once they are not, which is looked
    for twice a minute at most.

    Args:
        dtype: Number format of the base: `float32`, `bfloat16` or `float16`.
    """
    import torch

    threads = torch.get_num_threads()
    path = place_of(threads, dtype)
    kept = _kept(path)
    if kept is not None and not (kept.busy and _is_alone_now()):
        return kept
    logger.info(
        "measuring this processor with %s in %s, once: some seconds", count_text(threads, "thread"), dtype
    )
    found = measure_processor(dtype)
    with contextlib.suppress(OSError):  # it is measured again then
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(found), indent=1) + "\n")
    return found


def place_of(threads: int, dtype: str) -> Path:
    """Returns the file that a measurement of this machine is kept in."""
    versions = _versions()
    parts = {
        "format": FORMAT, "processor": processor_name(), "threads": threads, "dtype": dtype,
        "torch": versions["torch"], "numba": versions["numba"], "mamba-sft": versions["mamba-sft"],
    }  # fmt: skip
    return cache_home() / "processors" / f"{key_of(parts)}.json"


@cache
def _versions() -> dict[str, str | None]:
    """The installed versions, looked up once: a plan asks for this processor dozens of times."""
    return package_versions()


def _kept(path: Path) -> Processor | None:
    try:
        return Processor(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_alone_now() -> bool:
    """`is_alone`, looked at now and then: one plan may ask for this processor a hundred times."""
    now = time.monotonic()
    if now < _asked_again[0]:
        return False
    alone = is_alone()
    _asked_again[0] = time.monotonic() + PAUSE
    return alone


def is_alone(seconds: float = 0.05) -> bool:
    """Returns whether a thread that never waits gets nearly all of a core: no other program needs it."""
    started, begun = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        pass
    return time.process_time() - begun > _ALONE * (time.perf_counter() - started)


def measure_processor(dtype: str) -> Processor:
    """Times the pieces of a training step with the threads that torch uses.

    Args:
        dtype: As `this_processor` takes it.
    """
    import torch

    busy = not is_alone()
    number = getattr(torch, dtype)
    products = 2 * ROWS * COLUMNS * INNER / quiet_seconds(_product(number))
    forward, both = _layer(number, few=False)
    _, few = _layer(number, few=True)
    operations = _layer_operations()
    per_token = (both - few) / (MANY - FEW)
    inner = 2 * HIDDEN
    logit = quiet_seconds(_loss(number)) / (TARGETS * VOCABULARY) - LOSS_PRODUCTS * 2 * HIDDEN / products
    return Processor(
        name=processor_name(),
        threads=torch.get_num_threads(),
        dtype=dtype,
        date=datetime.date.today().isoformat(),
        busy=busy or not is_alone(),
        layer=max(few - FEW * per_token, 0.0),
        channel=max(per_token - operations / products, 0.0) / inner,
        forward=min(forward / both, 0.5),
        products=products,
        logit=max(logit, 0.0),
    )


def quiet_seconds(step: Callable[[], object], seconds: float = SECONDS) -> float:
    """Returns the processor time that a quarter of all repeats stays below, after one that does not count."""
    step()
    found: list[float] = []
    started = time.perf_counter()
    while len(found) < _FEWEST or (
        len(found) < _MOST and sum(found) < seconds and time.perf_counter() - started < 10 * seconds
    ):
        begun = time.process_time()
        step()
        found.append(time.process_time() - begun)
    return sorted(found)[len(found) // 4]


def _product(number: Any) -> Callable[[], object]:
    import torch

    left, right = torch.randn(ROWS, INNER, dtype=number), torch.randn(COLUMNS, INNER, dtype=number)
    return lambda: torch.nn.functional.linear(left, right)


def _layer_operations() -> int:
    """Operations of a layer's products for each token, forward and backward, with the adapter."""
    from mamba_sft.recipe.fields import AdapterSection

    section, (inner, rank) = AdapterSection(), (2 * HIDDEN, HIDDEN // 16)
    sizes = {
        "in_proj": (HIDDEN, 2 * inner), "x_proj": (inner, rank + 32), "dt_proj": (rank, inner),
        "out_proj": (inner, HIDDEN),
    }  # fmt: skip
    lora = sum(section.r * sum(sizes[name]) for name in section.target_modules)
    return 4 * sum(inputs * outputs for inputs, outputs in sizes.values()) + 6 * lora


def _layer(number: Any, *, few: bool) -> tuple[float, float]:
    """Seconds of the forward, and of forward and backward, of one layer with LoRA on a packed row."""
    import torch
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    from mamba_sft.kernels.falcon_mamba import install
    from mamba_sft.model.adapter import attach_adapter
    from mamba_sft.recipe.fields import AdapterSection

    config = FalconMambaConfig(
        vocab_size=8, hidden_size=HIDDEN, num_hidden_layers=LAYERS, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = attach_adapter(install(FalconMambaForCausalLM(config).to(number)), AdapterSection())
        tokens = torch.randn(1, FEW if few else MANY, HIDDEN, dtype=number)
    backbone = model.train().get_base_model().backbone
    inputs = tokens.requires_grad_()
    sequences = (torch.arange(tokens.shape[1]) // SEQUENCE).int()[None]

    def forward() -> Any:
        with _mixed(number):
            return backbone(inputs_embeds=inputs, use_cache=False, seq_idx=sequences).last_hidden_state

    def both() -> None:
        forward().float().sum().backward()

    return quiet_seconds(forward) / LAYERS, quiet_seconds(both) / LAYERS


def _loss(number: Any) -> Callable[[], object]:
    """The passes over logits that TRL's chunked loss takes, forward and backward, gradients in float32."""
    import torch

    hidden, head = (torch.randn(rows, HIDDEN, dtype=number) for rows in (TARGETS, VOCABULARY))

    def step() -> None:
        logits = torch.mm(hidden, head.t()).float()
        most = logits.amax(-1, keepdim=True)
        weights = (logits - most).exp()
        total = weights.sum(-1, keepdim=True)
        (logits * weights).sum(-1)  # entropy
        logits = torch.mm(hidden, head.t()).float()
        gradient = (logits - most).exp().div_(total).to(number).float()
        torch.mm(gradient, head.float())
        torch.mm(gradient.t(), hidden.float())

    return step


def _mixed(number: Any) -> Any:
    import torch

    return contextlib.nullcontext() if number == torch.float32 else torch.autocast("cpu", number)
