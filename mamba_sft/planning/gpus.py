"""GPUs that people fine-tune on: how much of their memory a program gets, and how fast they are."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from mamba_sft.kernels.launching import Card, card_named
from mamba_sft.planning.gpu_names import GB, known_gpu
from mamba_sft.wording import GIB

LANES_ISSUED, LANES_MUFU = 128, 16
"""Per SM and clock: four warps issued; results of the special function unit (ex2, lg2, rcp). CUDA C++
Programming Guide, table of arithmetic throughput; both the same from compute capability 7.5 to 12.0."""


@dataclass(frozen=True)
class Counts:
    """Instructions per state update, an update being one (t, d, n).

    Args:
        issued: All of them.
        fp32: Those of the float32 pipe.
        mufu: Those of the special function unit.
    """

    issued: float
    fp32: float
    mufu: float = 1.0

    def clocks(self, fp32_lanes: int) -> float:
        """Returns the clocks of a multiprocessor that one update takes at least, on its busiest pipe."""
        return max(self.issued / LANES_ISSUED, self.fp32 / fp32_lanes, self.mufu / LANES_MUFU)


SCAN_FORWARD = Counts(issued=8.3, fp32=5.1, mufu=1.25)
SCAN_BACKWARD = Counts(issued=28.9, fp32=18.1, mufu=2.43)
"""Of the kernels as compiled for sm_90, both walks of the backward; `tests/kernels/test_triton_compile.py`
counts again and holds these numbers to what it finds. A training step is forward, forward again, backward."""


@dataclass(frozen=True)
class Accelerator:
    """Where a run would train.

    Args:
        name: As it is sold, or as the driver calls it.
        nominal_bytes: What the data sheet says.
        usable_bytes: What CUDA reports as the total; the rest is ECC, page tables and the display.
        flops: Dense matrix products in 16 bits with float32 sums, peak per second. 0: unknown.
        bandwidth: Bytes per second from memory, peak.
        multiprocessors: How many.
        clock_hz: Boost clock.
        fp32_lanes: float32 results of a multiprocessor in a clock.
        bfloat16: Whether it computes in bfloat16.
        type: `cuda` or `cpu`.
        card: What the kernels' launches depend on. None: no GPU.
    """

    name: str
    nominal_bytes: int
    usable_bytes: int
    flops: float = 0.0
    bandwidth: float = 0.0
    multiprocessors: int = 0
    clock_hz: float = 0.0
    fp32_lanes: int = 128
    bfloat16: bool = True
    type: str = "cuda"
    card: Card | None = None

    @property
    def name_with_memory(self) -> str:
        """Its name with the memory it is sold with: `GeForce RTX 4090 (24 GB)`, `A100 80GB`."""
        sold = f"{self.nominal_bytes / GIB:.0f}"
        known = self.nominal_bytes <= self.usable_bytes or re.search(rf"\b{sold} ?GB", self.name)
        return self.name if known else f"{self.name} ({sold} GB)"


def _gpu(key: str, name: str, usable: float, **speed: Any) -> Accelerator:
    """Memory as reported, in GiB; tflops, GB/s, MHz. The rest is in the kernels' table."""
    card = card_named(name)
    return Accelerator(
        name=name,
        nominal_bytes=GB[key] * GIB,
        usable_bytes=int(usable * GIB),
        flops=speed["tflops"] * 1e12,
        bandwidth=speed["gbs"] * 1e9,
        multiprocessors=card.multiprocessors,
        clock_hz=speed["mhz"] * 1e6,
        fp32_lanes=speed.get("lanes", 128),
        bfloat16=speed.get("bfloat16", True),
        card=card,
    )


_V100 = {"tflops": 125, "gbs": 900, "mhz": 1530, "lanes": 64, "bfloat16": False}
GPUS = {
    "t4": _gpu("t4", "Tesla T4", 14.56, tflops=65, gbs=320, mhz=1590, lanes=64, bfloat16=False),
    "v100-16": _gpu("v100-16", "Tesla V100 16GB", 15.77, **_V100),
    "v100-32": _gpu("v100-32", "Tesla V100 32GB", 31.73, **_V100),
    "l4": _gpu("l4", "L4", 22.03, tflops=121, gbs=300, mhz=2040),
    "a10g": _gpu("a10g", "A10G", 22.06, tflops=70, gbs=600, mhz=1710),
    "a10": _gpu("a10", "A10", 21.98, tflops=125, gbs=600, mhz=1695),
    "3090": _gpu("3090", "GeForce RTX 3090", 23.56, tflops=71, gbs=936, mhz=1695),
    "4090": _gpu("4090", "GeForce RTX 4090", 23.52, tflops=165, gbs=1008, mhz=2520),
    "5090": _gpu("5090", "GeForce RTX 5090", 31.36, tflops=210, gbs=1792, mhz=2407),
    "a6000": _gpu("a6000", "RTX A6000", 47.41, tflops=155, gbs=768, mhz=1800),
    "l40s": _gpu("l40s", "L40S", 44.40, tflops=362, gbs=864, mhz=2520),
    "a100-40": _gpu("a100-40", "A100 40GB", 39.38, tflops=312, gbs=1555, mhz=1410, lanes=64),
    "a100-80": _gpu("a100-80", "A100 80GB", 79.14, tflops=312, gbs=2039, mhz=1410, lanes=64),
    "h100": _gpu("h100", "H100 80GB", 79.11, tflops=989, gbs=3350, mhz=1830),
    "h200": _gpu("h200", "H200", 139.80, tflops=989, gbs=4800, mhz=1830),
    "b200": _gpu("b200", "B200", 178.30, tflops=2250, gbs=8000, mhz=1965),
}
"""By the name `--card` takes. Speeds are from NVIDIA's data sheets (GeForce and A10G: with float32 sums, half
the advertised figure); usable memory is what PyTorch's out-of-memory messages in public reports call the
total capacity, the lowest seen."""


def find_gpu(name: str) -> Accelerator:
    """Returns the GPU that `--card` names.

    Raises:
        UsageError: There is none of this name; lists those there are.
    """
    return GPUS[known_gpu(name)]


def recognized(facts: dict[str, Any]) -> Accelerator:
    """Returns the device of this machine, with the speeds of its kind where the table has it.

    Args:
        facts: From `environment.describe_device`.
    """
    memory = facts.get("memory_bytes") or 0
    if facts["type"] != "cuda":
        return Accelerator(facts["name"], memory, memory, multiprocessors=facts["threads"], type="cpu")
    name = facts["name"].lower()
    like = min(
        (gpu for key, gpu in GPUS.items() if re.search(rf"\b{key.split('-')[0]}\b", name)),
        key=lambda gpu: abs(gpu.usable_bytes - memory),
        default=Accelerator("", memory, memory),
    )
    major, minor = facts["compute_capability"].split(".")
    cache = facts["l2_bytes"] or card_named(facts["name"]).l2_bytes
    return replace(
        like, name=facts["name"], usable_bytes=memory, bfloat16=facts["bfloat16"],
        card=Card((int(major), int(minor)), facts["multiprocessors"], cache),
    )  # fmt: skip
