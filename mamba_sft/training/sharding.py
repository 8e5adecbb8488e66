"""FSDP as a run uses it: torch's `fully_shard`, by accelerate's plugin, each block of the model a unit.

Each process holds a part of the parameters, their gradients and the optimizer's numbers; a block's weights
are together while it computes and no longer. What is trained is float32 and the base is what it is: nothing
is rounded on the way, and the gradients meet in float32, as under DDP.

On disk nothing is sharded. A resume point holds whole tensors, as every other does, so that a run goes on
with any number of processes, or with one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from mamba_sft.kernels.falcon_mamba import FalconMambaBlock
from mamba_sft.model.shards import part_of, whole_tensors

SETTINGS = {
    "version": 2,
    "transformer_layer_cls_to_wrap": [FalconMambaBlock.__name__],
    "reshard_after_forward": True,
}
"""What transformers is told of the plugin. Every process loads the base, and keeps its part of it."""


def round_nothing(arguments: Any) -> None:
    """Has the plugin keep all numbers as they are; left alone it would round them to the run's 16 bits.

    Args:
        arguments: The trainer's, with `SETTINGS`; changed in place.
    """
    arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(cast_forward_inputs=False)


def shard_anywhere(accelerator: Any, arguments: Any) -> None:
    """Has an accelerator of GPUs or CPUs shard as it was asked to, from the first to the last.

    accelerate takes the plugin on GPUs only. On CPUs it drops it without a word and runs DDP, while torch can
    do both; so there it is said here what its state says by itself on a GPU. All that follows is the same.

    Args:
        accelerator: Of a trainer, before it has prepared anything.
        arguments: The trainer's.
    """
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    settle_kind(accelerator, DistributedType.FSDP)


def settle_kind(accelerator: Any, kind: DistributedType) -> None:
    """Writes down of which kind an accelerator is, so that it stays so.

    Each `AcceleratorState()`, of which every optimizer makes one, copies the kind from `PartialState`.
    """
    PartialState().distributed_type = kind
    accelerator.state.distributed_type = kind


@contextmanager
def own_environment() -> Iterator[None]:
    """Takes back what accelerate writes into the environment in the block: the next run may do otherwise."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() | before.keys():
            if name.startswith(("ACCELERATE_", "FSDP_")):
                if name in before:
                    os.environ[name] = before[name]
                else:
                    del os.environ[name]


def compute_as_ddp(accelerator: Any, model: Any) -> None:
    """Has a model compute in the run's mixed precision, as accelerate has one that it does not shard.

    Args:
        accelerator: Which says the precision.
        model: After it was sharded.
    """
    own = model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return own(*args, **kwargs)

    model.forward = MethodType(forward, model)


def whole_state(optimizer: Any, *, keep: bool) -> dict[str, Any]:
    """Returns the state of an optimizer as it is without shards, in host memory.

    All processes ask for it together, and one of its tensors at a time is whole on their GPUs.

    Args:
        optimizer: Of sharded parameters.
        keep: Whether this process wants it; else it only helps, and gets no numbers.
    """
    state: dict[str, Any] = optimizer.state_dict()
    numbers: dict[Any, dict[str, Any]] = {}
    for place, values in state["state"].items():
        tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
        together = whole_tensors(tensors, keep=keep)
        if keep:
            numbers[place] = values | together
    return state | {"state": numbers}


def load_whole_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Gives an optimizer of sharded parameters its part of a state that is not sharded.

    Args:
        optimizer: Of the parameters that the state is of, in the same order.
        state: From `whole_state`, or of a run that shards nothing; the same in every process.
    """
    parameters = dict(enumerate(_parameters(optimizer)))
    numbers = {
        place: {
            name: part_of(x, parameters[place]) if getattr(x, "shape", None) == parameters[place].shape else x
            for name, x in values.items()
        }
        for place, values in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": numbers})


def _parameters(optimizer: Any) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
