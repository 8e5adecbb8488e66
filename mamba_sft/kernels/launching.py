"""How the scan's backward is cut up for a GPU: from a table of cards, or the fastest of a few ways.

Nothing of it changes what is computed, only the order in which float32 sums are taken. The plan of a run
counts what these choices take, and for it Triton need not be there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

try:
    TRITON = tuple(int(part) for part in version("triton").split(".")[:2])
except PackageNotFoundError:  # the plan is made for another machine
    TRITON = (0, 0)
RESIDENT = 8  # programs of the backward that a multiprocessor's registers hold: 255 each for 32 threads
FITTING = 0.85  # share of the L2 cache that the states of all of them may take
STRIDES = (64, 32, 16)  # steps between two states that the forward saves, the longest that fits
WAVES = 2  # how often the programs fill the GPU, unless another way was found to be faster
TILE_BYTES = 2048  # of the states of a program: 512 float32


@dataclass(frozen=True)
class Card:
    """What the launches depend on.

    Args:
        capability: Compute capability.
        multiprocessors: How many.
        l2_bytes: Of the second-level cache.
    """

    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int


MB = 1 << 20
CARDS = {
    "V100": Card((7, 0), 80, 6 * MB),
    "T4": Card((7, 5), 40, 4 * MB),
    "A100": Card((8, 0), 108, 40 * MB),
    "A10": Card((8, 6), 72, 6 * MB),
    "A10G": Card((8, 6), 80, 6 * MB),
    "RTX 3090": Card((8, 6), 82, 6 * MB),
    "RTX A6000": Card((8, 6), 84, 6 * MB),
    "L4": Card((8, 9), 58, 48 * MB),
    "L40S": Card((8, 9), 142, 96 * MB),
    "RTX 4090": Card((8, 9), 128, 72 * MB),
    "H100": Card((9, 0), 132, 50 * MB),
    "H200": Card((9, 0), 132, 50 * MB),
    "B200": Card((10, 0), 148, 126 * MB),
    "RTX 5090": Card((12, 0), 170, 96 * MB),
}
"""From NVIDIA's data sheets and architecture papers. The driver is asked first; this is for what it does not
say, and for the tests, which have no card."""


@dataclass(frozen=True)
class Choice:
    """One way to cut up the backward.

    Args:
        window: Steps whose states and decays are in registers at once, 2 or 4.
        waves: How often the programs fill the GPU; decides how many segments a row has.
    """

    window: int
    waves: int = WAVES

    @property
    def group_tile(self) -> int:
        """States times channels taken through a window together: half of them if the window is long."""
        return 256 if self.window == 4 else 512


def card_of(device: torch.device) -> Card:
    """Return what the driver says of a GPU; its table entry where that says nothing of the cache."""
    properties = torch.cuda.get_device_properties(device)
    return Card(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        getattr(properties, "L2_cache_size", 0) or card_named(properties.name).l2_bytes,
    )


def card_named(name: str) -> Card:
    """Return the table's entry for a GPU as it is sold or as the driver calls it; else the smallest."""
    return CARDS[max((known for known in CARDS if known in name), key=len, default="T4")]


def window(capability: tuple[int, int], N: int, rate_wanted: bool) -> int:
    """Return the longest window that the compiler keeps in registers, read from machine code.

    Two steps where the gradient of A takes 16 registers more, and where the compiler spills: for the B200,
    for the 5090 unless it is that of Triton 3.7 or 3.8, and that of 3.9 for Hopper too.
    """
    spills = capability[0] == 10 or (capability[0] >= 9 and TRITON >= (3, 9))
    spills |= capability[0] == 12 and TRITON < (3, 7)
    return 2 if N > 16 or rate_wanted or spills else 4


def scratch_bytes(card: Card, steps: int, stride: int) -> int:
    """Return what all programs at work keep in scratch: a state for every window of a chunk."""
    return RESIDENT * card.multiprocessors * (stride // steps) * TILE_BYTES


def stride(card: Card, steps: int) -> int:
    """Return how many steps lie between saved states so that the scratch of a chunk stays in the L2 cache."""
    fitting = (s for s in STRIDES if scratch_bytes(card, steps, s) <= FITTING * card.l2_bytes)
    return next(fitting, STRIDES[-1])


def state_stride(card: Card, N: int, rate_wanted: bool) -> int:
    """Return how many steps lie between the states that the forward saves on a card."""
    return stride(card, window(card.capability, N, rate_wanted))


def forward_options(capability: tuple[int, int], known: frozenset[str]) -> dict[str, str | int]:
    """Return what to tell ptxas of the forward's registers, read from machine code.

    For the 5090 it takes 128 by itself and copies between them. With this limit it takes 168, so that twelve
    programs are on a multiprocessor as on the other cards; with 168 as the limit its code is longer.
    """
    if capability != (12, 0):
        return {}
    return {"maxnreg": 200} | ({"ptx_options": "--register-usage-level=7"} if "ptx_options" in known else {})


def backward_options(capability: tuple[int, int], steps: int, known: frozenset[str]) -> dict[str, str]:
    """Return what to tell ptxas of the backward's registers: with its own level it spills a few."""
    level = {(7, 5): 7, (9, 0): 7, (12, 0): 3}.get(capability)
    if capability in {(8, 6), (8, 9)} and (steps == 4 or TRITON >= (3, 9)):
        level = 7
    if level is None or "ptx_options" not in known:
        return {}
    return {"ptx_options": f"--register-usage-level={level}"}


def candidates(best: Choice) -> list[Choice]:
    """Return the handful of ways that are tried on a card, the table's first."""
    ways = [Choice(steps, waves) for steps in sorted({best.window, 2}, reverse=True) for waves in (2, 1, 4)]
    return [best, *(way for way in ways if way != best)]


def cache_directory() -> Path:
    """Return where choices are kept: under `MAMBA_SFT_CACHE`, as all that is kept; else where caches are."""
    general = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mamba-sft"
    return Path(os.environ.get("MAMBA_SFT_CACHE") or general).expanduser() / "launches"


_found: dict[str, Choice] = {}  # by key, in this process


def fastest(key: str, ways: Sequence[Choice], seconds: Callable[[Choice], float]) -> Choice:
    """Return the fastest way, as remembered, as read from the cache, or by trying them all.

    A cache that cannot be read or written costs the search again in the next process, and nothing else. Two
    processes may search at once: each writes a whole file and renames it, and the last one stays.

    Args:
        key: Whatever the choice depends on: card, shape, number formats, versions.
        ways: What to choose from; a choice in the cache that is not among them is not taken.
        seconds: How long one takes. What raises `OutOfMemoryError` is not chosen.
    """
    if key not in _found:
        _found[key] = _read(key, ways) or _searched(key, ways, seconds)
    return _found[key]


def _searched(key: str, ways: Sequence[Choice], seconds: Callable[[Choice], float]) -> Choice:
    times: dict[Choice, float] = {}
    for way in ways:
        with suppress(torch.OutOfMemoryError):
            times[way] = seconds(way)
    if not times:
        return ways[0]
    best = min(times, key=lambda way: times[way])
    logger.debug("scan backward, %s: %s of %s", key, best, times)
    _write(key, best)
    return best


def _path(key: str) -> Path:
    return cache_directory() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read(key: str, ways: Sequence[Choice]) -> Choice | None:
    try:
        entry = json.loads(_path(key).read_text(encoding="utf-8"))
        choice = Choice(**entry["choice"])
        return choice if entry["key"] == key and choice in ways else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(key: str, choice: Choice) -> None:
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as place:  # goes, whatever the disk takes
            whole = Path(place, path.name)
            whole.write_text(json.dumps({"key": key, "choice": asdict(choice)}), encoding="utf-8")
            os.replace(whole, path)
    except OSError as error:
        logger.debug("the choice is not kept: %s", error)
