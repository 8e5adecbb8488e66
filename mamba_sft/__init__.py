"""mamba-sft: turn Falcon-Mamba-7B into an instruct model.

The public names are imported on first use, so that `import mamba_sft` (and `mamba-sft --help`) never
imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mamba_sft.noise import drop_noise

if TYPE_CHECKING:
    from mamba_sft.errors import MambaSFTError
    from mamba_sft.exporting.request import GGUFOptions, HubOptions
    from mamba_sft.inference.sampling import Sampling
    from mamba_sft.notebook.verbs import (
        chat,
        doctor,
        evaluate,
        export,
        generate,
        memory,
        merge,
        plan,
        preview,
        report,
        train,
    )
    from mamba_sft.recipe.recipe import Recipe
    from mamba_sft.run import Run

drop_noise()  # before any module of ours imports a library that would make some

__version__ = "0.1.0"
__all__ = [
    "GGUFOptions",
    "HubOptions",
    "MambaSFTError",
    "Recipe",
    "Run",
    "Sampling",
    "chat",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "memory",
    "merge",
    "plan",
    "preview",
    "report",
    "train",
]

_HOMES = {
    "GGUFOptions": "exporting.request",
    "HubOptions": "exporting.request",
    "MambaSFTError": "errors",
    "Recipe": "recipe.recipe",
    "Run": "run",
    "Sampling": "inference.sampling",
}
"""Where the names come from that are not verbs."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mamba_sft' has no attribute {name!r}")
    return getattr(import_module(f"mamba_sft.{_HOMES.get(name, 'notebook.verbs')}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
