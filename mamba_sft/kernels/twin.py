"""A second module object over the same weights, so that it can differ without the first one changing.

What a call needs otherwise than a module has it (a projection without its bias, a layer without its adapter)
is done on a twin: the module that other threads are calling stays as it is.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def make_twin(module: Module) -> Module:
    """Return a module with dictionaries of parameters and children of its own, over the same tensors.

    Everything else is shared: buffers, hooks, settings. A `forward` that was put on the object itself (by
    accelerate, or to keep activations) is bound to the twin.

    Args:
        module: Any module.
    """
    twin: Module = object.__new__(type(module))
    state = twin.__dict__
    state.update(module.__dict__)
    state["_parameters"] = dict(state["_parameters"])
    state["_modules"] = dict(state["_modules"])
    for name in ("forward", "_old_forward"):
        if name in state:
            state[name] = _rebound(state[name], module, twin)
    return twin


def _rebound(forward: Any, module: nn.Module, twin: nn.Module) -> Any:
    if isinstance(forward, MethodType) and forward.__self__ is module:
        return MethodType(forward.__func__, twin)
    if isinstance(forward, partial) and forward.args and forward.args[0] is module:
        return partial(forward.func, twin, *forward.args[1:], **forward.keywords)
    return forward
