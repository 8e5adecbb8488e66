"""CUDA graphs on the simulated card: operators are written down, and done again on the same memory.

As on a card, nothing of a capture happens: memory that it wrote to is put back when it ends. And as there, a
capture in which the host would wait is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.simulated_cuda.device import Device


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Graph:
    """`torch.cuda.CUDAGraph`."""

    replays = 0
    """Of all graphs."""
    spoils = False
    """Whether a replay goes wrong, as a control."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.steps: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def replay(self) -> None:
        """Does everything again that was written down."""
        Graph.replays += 1
        with torch.no_grad():
            for do, operands, options, made in self.steps:
                given = {_place(tensor) for tensor in _tensors((operands, options))}
                for old, new in zip(_tensors(made), _tensors(do(*operands, **options)), strict=True):
                    if _place(old) not in given and old.numel():
                        old.copy_(new + 1 if self.spoils and new.is_floating_point() else new)


class Capture(TorchDispatchMode):  # type: ignore[misc]
    """`torch.cuda.graph`: writes down what happens inside.

    Args:
        device: Whose waits are errors meanwhile.
        graph: What it is written into.
    """

    def __init__(self, device: Device, graph: Graph):
        super().__init__()
        self._device, self._graph = device, graph
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __enter__(self) -> Any:
        self._waits = self._device.waits()
        self._device.capture = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._device.capture = None
        with self._device.quiet(), torch.no_grad():
            for tensor, earlier in self._before.values():
                tensor.copy_(earlier)
        if self._device.waits() > self._waits:
            raise RuntimeError("operation not permitted when stream is capturing (simulated)")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    if tensor.is_cuda and tensor.numel():
                        self._before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        return self.write_down(func, args, kwargs)

    def write_down(self, do: Callable[..., Any], operands: Any, options: Any) -> Any:
        """Does something, and notes how to do it again."""
        made = do(*operands, **options)
        self._graph.steps.append((do, operands, options, made))
        return made


def stand_in(device: Device) -> None:
    """Gives `torch.cuda` its graphs."""
    torch.cuda.CUDAGraph = Graph
    torch.cuda.graph = lambda graph, **options: Capture(device, graph)
    torch.cuda.is_current_stream_capturing = lambda: device.capture is not None
