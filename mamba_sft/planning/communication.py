"""What processes tell each other in an optimizer step, and how long that takes.

Rings, as NCCL builds them: of n processes each sends `(n - 1) / n` of a tensor to the next one for a
reduce-scatter or an all-gather, in n - 1 hops, and twice that for an all-reduce, which is both in turn
(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009; nccl-tests
counts its bus bandwidth so, PERFORMANCE.md). A ring enters and leaves each machine once, so the slowest of
its edges, within or between machines, sets the pace for all: `bytes / rate + hops * latency`.

Nothing is counted as hidden behind computation, though DDP and FSDP hide some of it: what comes out is the
most that it adds to a step. No figure of it has been measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mamba_sft.errors import UsageError
from mamba_sft.planning.gpus import Accelerator
from mamba_sft.planning.memory import Work, weights

Mode = Literal["ddp", "fsdp", "zero2"]
MODES: tuple[Mode, ...] = get_args(Mode)
GRADIENT_BYTES = 4
"""Of a trained value: the adapter, its gradients and what is sent of them are float32. In 16 bits the 42.2M
values of r=16 would be 84 MB; they are 169 MB."""
BUCKET = 25 << 20
"""Bytes that DDP sends at a time (`bucket_cap_mb`)."""
SUSTAINED = 0.8
"""Of a link's peak, for large tensors."""
HOP_INSIDE, HOP_BETWEEN = 5e-6, 20e-6
"""Seconds from one process to the next, within a machine and over a network. Assumed."""
LINK = 100.0
"""Gb/s between machines where nothing is said."""
_INSIDE = {
    "B200": (900e9, "NVLink 5"),
    "H200": (450e9, "NVLink 4"),
    "H100": (450e9, "NVLink 4"),
    "A100": (300e9, "NVLink 3"),
    "V100": (150e9, "NVLink 2"),
    "5090": (64e9, "PCIe 5 x16"),
    "T4": (16e9, "PCIe 3 x16"),
}
"""Bytes per second that a GPU sends within a machine, one way, from NVIDIA's data sheets (SXM where there is
one; they give both ways together). GeForce cards without peer access send through host memory, slower."""
_ELSE = (32e9, "PCIe 4 x16")


@dataclass(frozen=True)
class Cluster:
    """Processes, one for each GPU.

    Args:
        processes: On each machine.
        nodes: Machines.
        link: Gb/s of each machine's connection to the others.
    """

    processes: int
    nodes: int = 1
    link: float = LINK

    def __post_init__(self) -> None:
        for option, value in (("processes", self.processes), ("nodes", self.nodes), ("link", self.link)):
            if not 0 < value < math.inf:
                raise UsageError(f"`--{option}` takes more than zero, not {value:g}")

    @property
    def total(self) -> int:
        """Processes of all machines."""
        return self.processes * self.nodes


@dataclass(frozen=True)
class Links:
    """How fast a process can send to the next.

    Args:
        inside: Bytes per second within a machine.
        name: What that goes over.
        between: Bytes per second between machines, None: there is one.
    """

    inside: float
    name: str
    between: float | None

    @classmethod
    def of(cls, accelerator: Accelerator, cluster: Cluster) -> Links:
        """Returns those of a cluster of these GPUs; PCIe 4 where the table has no other."""
        rate, name = next((link for key, link in _INSIDE.items() if key in accelerator.name), _ELSE)
        return cls(rate, name, cluster.link * 1e9 / 8 if cluster.nodes > 1 else None)

    def seconds(self, traffic: Traffic) -> float:
        """Returns how long it takes when nothing else is done meanwhile."""
        slowest = self.inside if self.between is None else min(self.inside, self.between)
        hop = HOP_INSIDE if self.between is None else HOP_BETWEEN
        return traffic.sent / (slowest * SUSTAINED) + traffic.hops * hop


@dataclass(frozen=True)
class Traffic:
    """What a process sends in an optimizer step.

    Args:
        sent: Bytes.
        hops: Times that it waits for a neighbour.
    """

    sent: float = 0.0
    hops: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.hops + other.hops)

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.sent * times, self.hops * times)


def gathered(size: float, processes: int, messages: int = 1) -> Traffic:
    """Returns the traffic of an all-gather or a reduce-scatter of `size` bytes in `messages` parts."""
    return Traffic((processes - 1) / processes * size, messages * (processes - 1))


def reduced(size: float, processes: int, messages: int = 1) -> Traffic:
    """Returns the traffic of an all-reduce: a reduce-scatter and an all-gather."""
    return gathered(size, processes, messages) * 2


def step_traffic(mode: Mode, work: Work, processes: int, accumulation: int) -> Traffic:
    """Returns what a process sends in an optimizer step.

    ddp: gradients of the adapter, all-reduced in buckets, in the last micro-batch (`no_sync` before it; Li et
    al., "PyTorch Distributed", VLDB 2020). fsdp: the weights of each layer, all-gathered for the forward and
    again for the backward of every micro-batch, and once in a step the gradients, reduce-scattered, which are
    the adapter's alone (Zhao et al., "PyTorch FSDP", VLDB 2023, section 3). zero2: gradients reduce-scattered
    in every micro-batch, because no process keeps all of them, and once in a step what was trained,
    all-gathered (Rajbhandari et al., "ZeRO", SC 2020, section 7).

    Args:
        mode: How the processes share the work.
        work: A micro-batch of one of them.
        processes: All of them.
        accumulation: Micro-batches of an optimizer step.
    """
    trained, layers = GRADIENT_BYTES * work.trained, work.shape.layers + 1  # the rest is a group of its own
    buckets = math.ceil(trained / BUCKET)
    if mode == "ddp":
        return reduced(trained, processes, buckets)
    if mode == "fsdp":
        whole = gathered(weights(work) + trained, processes, layers)
        return whole * (2 * accumulation) + gathered(trained, processes, layers)
    scattered = gathered(trained, processes, buckets)
    return scattered * accumulation + scattered
