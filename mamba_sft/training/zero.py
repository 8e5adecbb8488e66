"""ZeRO stage 2 as a run uses it: DeepSpeed's engine, by accelerate.

Each process has the whole model, and a part of the gradients and of the optimizer's numbers. To transformers
such a run is one of whole models, which is why its resume points are as all others. What differs is here: the
engine holds the gradients, and they are looked at before it takes its step, not after.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from mamba_sft.training.sharding import settle_kind


def use_engine(accelerator: Any, arguments: Any) -> None:
    """Has an accelerator prepare its model with DeepSpeed, stage 2.

    accelerate decides for DeepSpeed by an environment variable, before it knows of any plugin, and never on
    CPUs; so here its state is told once it is there, on GPUs and CPUs alike. DeepSpeed's own mixed precision
    stays off: it would make the adapter 16 bits.

    Args:
        accelerator: Of a trainer, before it has prepared anything.
        arguments: The trainer's.
    """
    from accelerate.utils import DeepSpeedPlugin

    config = {
        "zero_optimization": {"stage": 2, "contiguous_gradients": True, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,  # the recipe's, which is torch's
        "gradient_clipping": arguments.max_grad_norm,
        "train_micro_batch_size_per_gpu": arguments.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,  # to it, too, an optimizer step is one batch
        "steps_per_print": 1_000_000_000,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    plugin.select(_from_accelerator_state=True)
    accelerator.state.deepspeed_plugins = {"default": plugin}
    settle_kind(accelerator, DistributedType.DEEPSPEED)
    accelerator.deepspeed_engine_wrapped = None


def compute_mixed(model: Any, arguments: Any) -> None:
    """Has a model compute in the run's mixed precision, inside of the engine, which would switch it off.

    Args:
        model: The model in the engine.
        arguments: The trainer's.
    """
    own, device = model.forward, arguments.device.type

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=arguments.bf16):
            return own(*args, **kwargs)

    model.forward = MethodType(forward, model)


def full_gradient(parameter: Tensor) -> Tensor | None:
    """Returns the gradient of a parameter, put together from all processes, which ask for it together."""
    from deepspeed.utils import safe_get_full_grad

    gradient: Tensor | None = safe_get_full_grad(parameter)
    return gradient


class EngineBackward:
    """What accelerate calls for a backward: the engine's, which does not take its step yet.

    accelerate's own takes it at once, so that nobody could look at the gradients before.

    Args:
        engine: DeepSpeed's.
    """

    def __init__(self, engine: Any):
        self.engine = engine

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """The backward of a micro-batch; the last one of a step says so."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)

    def get_global_grad_norm(self) -> float:
        """The norm of the gradients of all processes, of the step that is about to be taken."""
        norm = float(self.engine.optimizer.scaled_global_norm())
        return norm if norm >= 0 else float("nan")  # it says -1 where it is no number


class EngineStep(torch.optim.Optimizer):
    """The optimizer that a trainer steps: accelerate's around the engine's, and a step is the engine's step.

    Args:
        wrapped: What accelerate made of the optimizer.
        engine: DeepSpeed's.
        groups: The groups of parameters before DeepSpeed took them; it drops those that are empty.
    """

    def __init__(self, wrapped: Any, engine: Any, groups: list[dict[str, Any]]):
        self.wrapped = wrapped
        self.engine = engine
        self.groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"], name)

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        """Those that a schedule sets the learning rates of: as without ZeRO, empty ones too."""
        inside = iter(self._inside.param_groups)
        return [next(inside) if group["params"] else group for group in self.groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clips, steps, gathers what was trained, and forgets the gradients."""
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: the engine forgets gradients itself."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as it would be without ZeRO, in host memory; all processes ask together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        numbers: dict[int, dict[str, Any]] = {}
        groups, parts = [], iter(self._zero.single_partition_of_fp32_groups)
        for own, group in zip(self.groups, self.param_groups, strict=True):
            kept = self._inside.state.get(next(parts), {}) if own["params"] else {}
            places = range(len(numbers), len(numbers) + len(own["params"]))
            for place, parameter in zip(places, own["params"], strict=True):
                numbers[place] = {  # of what all share, the count of steps, each gets its own
                    name: (safe_get_full_optimizer_state(parameter, name) if x.ndim else x.clone()).cpu()
                    for name, x in kept.items()
                }
            groups.append({**group, "params": list(places)})
        return {"state": {n: x for n, x in numbers.items() if x}, "param_groups": groups}

    def _link_states(self) -> None:
        """Has DeepSpeed find the numbers of all groups.

        It looks for them once, after the first group's first step, when the others have none (0.19.8).
        """
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes this process's part of a state that is not parted."""
        state = state_dict["state"]
        filled = [group for group in state_dict["param_groups"] if group["params"]]
        parts = self._zero.single_partition_of_fp32_groups
        for flat, group, saved in zip(parts, self._inside.param_groups, filled, strict=True):
            group.update({name: x for name, x in saved.items() if name != "params"})
            whole = [state[place] for place in saved["params"] if place in state]
            if whole:
                self._inside.state[flat] = {
                    name: self._own_part([numbers[name] for numbers in whole], flat)
                    if x.ndim
                    else x.to(flat.device if group.get("fused") else "cpu", copy=True)
                    for name, x in whole[0].items()
                }

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, which has this process's part of each group, flat, for the one inside."""
        return self.engine.optimizer

    @property
    def _inside(self) -> Any:
        return self._zero.optimizer

    def _own_part(self, tensors: list[Tensor], flat: Tensor) -> Tensor:
        """This process's part of the tensors of a group."""
        world = torch.distributed.get_world_size()
        line = torch.cat([x.flatten().to(flat) for x in tensors])
        line = torch.nn.functional.pad(line, (0, flat.numel() * world - line.numel()))
        return line.chunk(world)[torch.distributed.get_rank()].clone()
