"""The simulated card as Python sees it: `start` before torch is imported, then `torch.cuda` has one card.

torch's own Python half of CUDA calls a driver that is not there, so its functions are stood in for. What the
host waits for is written down with the line that made it wait.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.simulated_cuda.build import build


@dataclass(frozen=True)
class Card:
    """What a card says of itself: its name, that it is none, or choices made for it would be taken for real.

    Args:
        name: As the driver has it.
        capability: Compute capability.
        nbytes: Its memory.
        processors: Streaming multiprocessors.
        cache: Bytes of second-level cache.
    """

    name: str
    capability: tuple[int, int]
    nbytes: int
    processors: int
    cache: int


CARDS = {
    "t4": Card("Tesla T4 (simulated)", (7, 5), 15_600_000_000, 40, 4 << 20),
    "4090": Card("NVIDIA GeForce RTX 4090 (simulated)", (8, 9), 25_300_000_000, 128, 72 << 20),
    "h100": Card("NVIDIA H100 80GB HBM3 (simulated)", (9, 0), 85_000_000_000, 132, 50 << 20),
}


@dataclass(frozen=True)
class Event:
    """Something that was watched.

    Args:
        kind: `wait`, `upload` or `mixed`.
        what: The operator, or what Python asked for.
        where: The innermost line outside torch, and the one of this package that it is for.
        ours: Whether the innermost line is this package's own.
    """

    kind: str
    what: str
    where: str
    ours: bool


class Device:
    """The one card of this process.

    Args:
        library: The compiled device.
        card: What it says of itself.
    """

    def __init__(self, library: ctypes.CDLL, card: Card):
        self.card = card
        self.events: collections.Counter[Event] = collections.Counter()
        self._library = library
        self.capture: Any = None
        """The graph capture under way, or None."""
        self._quiet = 0
        for function in ("card_bytes_in_use", "card_most_bytes"):
            getattr(library, function).restype = ctypes.c_int64
        library.card_limit.argtypes = [ctypes.c_int64]
        self._listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)(self._hear)
        library.card_listener(self._listener)

    @property
    def in_use(self) -> int:
        """Bytes that tensors take on the card."""
        return int(self._library.card_bytes_in_use())

    @property
    def most(self) -> int:
        """The most bytes in use since `forget_the_most`."""
        return int(self._library.card_most_bytes())

    def forget_the_most(self) -> None:
        """Counts the most bytes from now on."""
        self._library.card_forget_the_most()

    def limit(self, nbytes: int | None) -> None:
        """Refuses memory beyond `nbytes` from now on, as a full card does; None takes the card's own."""
        self._library.card_limit(self.card.nbytes if nbytes is None else nbytes)

    def waits(self) -> int:
        """Returns how often the host has waited for the card since `forget`."""
        return sum(count for event, count in self.events.items() if event.kind == "wait")

    def forget(self) -> None:
        """Begins to count events anew."""
        self.events.clear()

    def wait(self, what: str) -> None:
        """Counts a wait that Python asks for."""
        self._note("wait", what)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Counts nothing inside the block: what a stand-in copies is not the program's doing."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    def _hear(self, kind: bytes, what: bytes) -> None:
        self._note(kind.decode(), what.decode())

    def _note(self, kind: str, what: str) -> None:
        if not self._quiet:
            self.events[Event(kind, what, *_whose_line())] += 1


def _whose_line() -> tuple[str, bool]:
    frames = [f for f in traceback.extract_stack() if "/tests/simulated_cuda/device.py" not in f.filename]
    outside = [f for f in frames if "/torch/" not in f.filename][-1:]
    package = [f for f in frames if "/mamba_sft/" in f.filename][-1:]
    lines = [f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno}" for f in (*outside, *package)]
    return ", for ".join(dict.fromkeys(lines)), bool(outside) and outside[0] in package


def start(card: str = "4090") -> Device:
    """Gives this process a card; to be called before torch is imported, which asks for CUDA's hooks once.

    Args:
        card: A name of `CARDS`.
    """
    assert "torch" not in sys.modules, "torch is imported already"
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    libraries = Path(spec.origin).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(libraries / name), mode=os.RTLD_GLOBAL)
    library = ctypes.CDLL(str(build()), mode=os.RTLD_GLOBAL)
    import torch

    device = Device(library, CARDS[card])
    device.limit(None)
    import bitsandbytes  # noqa: F401  # before there is a card, or it would look for its CUDA library

    _stand_in(torch, device)
    return device


class _Stream:
    """The one stream: what is put into it is done already."""

    cuda_stream = 0
    device_index = 0
    device_type = 1
    stream_id = 0

    def __init__(self, *args: Any, **kwargs: Any):
        import torch

        self.device = torch.device("cuda", 0)

    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event

    def query(self) -> bool:
        return True


class _Within:
    """`torch.cuda.device(...)` and `torch.cuda.stream(...)`: there is one of each."""

    def __init__(self, *args: Any, **kwargs: Any): ...
    def __enter__(self) -> _Within:
        return self

    def __exit__(self, *args: Any) -> bool:
        return False


def _always(value: Any) -> Any:
    return lambda *args, **kwargs: value


def _stand_in(torch: Any, device: Device) -> None:
    """Puts functions in the place of those of `torch.cuda` that would call the driver."""
    card = device.card

    class Event:
        def __init__(self, *args: Any, **kwargs: Any): ...
        def record(self, *args: Any) -> None: ...
        def wait(self, *args: Any) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            device.wait("event.synchronize")

        def elapsed_time(self, other: Any) -> float:
            return 1.0

    properties = types.SimpleNamespace(
        name=card.name, major=card.capability[0], minor=card.capability[1], total_memory=card.nbytes,
        multi_processor_count=card.processors, L2_cache_size=card.cache, warp_size=32, uuid="simulated",
        max_threads_per_multi_processor=1536, regs_per_multiprocessor=65536, gcnArchName="",
        shared_memory_per_block_optin=101376, is_integrated=False,
    )  # fmt: skip
    functions = {
        "is_available": _always(True), "is_initialized": _always(True), "init": _always(None),
        "_lazy_init": _always(None), "device_count": _always(1), "current_device": _always(0),
        "set_device": _always(None), "get_device_properties": _always(properties),
        "get_device_capability": _always(card.capability), "get_device_name": _always(card.name),
        "get_arch_list": _always(["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]),
        "is_bf16_supported": lambda including_emulation=True: (
            including_emulation or card.capability >= (8, 0)
        ),
        "mem_get_info": lambda *args: (card.nbytes - device.in_use, card.nbytes),
        "synchronize": lambda *args: device.wait("torch.cuda.synchronize"),
        "empty_cache": _always(None), "ipc_collect": _always(None), "memory_stats": _always({}),
        "memory_allocated": lambda *args: device.in_use, "memory_reserved": lambda *args: device.in_use,
        "max_memory_allocated": lambda *args: device.most, "max_memory_reserved": lambda *args: device.most,
        "reset_peak_memory_stats": lambda *args: device.forget_the_most(),
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda state, *args: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "manual_seed": _always(None), "manual_seed_all": _always(None), "seed": _always(None),
        "seed_all": _always(None), "device": _Within, "device_of": _Within, "stream": _Within,
        "current_stream": _Stream, "default_stream": _Stream, "Stream": _Stream, "Event": Event,
        "can_device_access_peer": _always(False),
    }  # fmt: skip
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    for name in ("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all"):
        setattr(torch.cuda.random, name, functions[name])
    torch.UntypedStorage.clone = lambda storage: (  # a torch without CUDA makes storages for the host only
        torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone().untyped_storage()
    )
    torch.version.cuda = "13.0"
    torch.cuda.amp.common = types.SimpleNamespace(amp_definitely_not_available=_always(False))
    for name, value in {
        "_cuda_getCurrentRawStream": 0, "_cuda_getCurrentStream": (0, 0, 1), "_cuda_setStream": None,
        "_cuda_getDevice": 0, "_cuda_getDeviceCount": 1, "_cuda_getArchFlags": "sm_75 sm_89 sm_90",
        "_cuda_isInBadFork": False, "_cuda_init": None, "_cuda_emptyCache": None, "_cuda_exchangeDevice": 0,
        "_cuda_maybeExchangeDevice": 0,
    }.items():  # fmt: skip
        setattr(torch._C, name, _always(value))
