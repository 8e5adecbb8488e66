"""What will be used here and why: versions, device, kernels, disk; and what to do about what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mamba_sft import __version__
from mamba_sft.diagnostics.software import Finding, Status, software_findings, storage
from mamba_sft.errors import MambaSFTError
from mamba_sft.planning.environment import describe_environment
from mamba_sft.recipe.builtin import builtin_recipes
from mamba_sft.showing import Showing
from mamba_sft.wording import size_text

ADVICE = (
    ("instruct", 70e9, True),
    ("instruct-qlora", 20e9, True),
    ("instruct-t4", 12e9, False),
)
"""Recipe, the memory of the GPU it is for in bytes, and whether it computes in bfloat16."""


@dataclass(frozen=True)
class Diagnosis(Showing):
    """All findings, in the order in which they are shown.

    Args:
        findings: One each.
        environment: `environment.describe_environment()`; empty if torch cannot be imported.
    """

    findings: tuple[Finding, ...]
    environment: dict[str, Any]

    @property
    def status(self) -> Status:
        """The worst of the findings."""
        seen = {finding.status for finding in self.findings}
        return "problem" if "problem" in seen else "note" if "note" in seen else "ok"

    def to_json(self) -> str:
        """Returns everything as one JSON object."""
        content = {
            "mamba_sft": __version__,
            "status": self.status,
            "findings": [asdict(finding) for finding in self.findings],
            "environment": self.environment,
        }
        return json.dumps(content, ensure_ascii=False, indent=2)


def diagnose() -> Diagnosis:
    """Looks at this machine. Takes seconds, changes nothing, reaches no network."""
    found = list(software_findings())
    try:
        machine, environment = _hardware()
    except Exception as error:  # a torch or a driver that breaks at import can raise anything
        reason = f"torch does not work: {type(error).__name__}: {error}"
        machine, environment = [], {}
        fix = "install torch again: https://pytorch.org/get-started"
        found.append(Finding("device", "torch", "problem", reason, fix))
    return Diagnosis((*found, *machine, *storage(), *_advice(environment)), environment)


def _hardware() -> tuple[list[Finding], dict[str, Any]]:
    from mamba_sft.diagnostics import hardware

    with hardware.start_nf4_probe() as probe:
        try:
            environment = describe_environment()
            facts = environment["device"]
            found = [*hardware.device(facts), *hardware.compute(facts)]
            return [*found, hardware.nf4(probe, facts["type"])], environment
        finally:
            probe.kill()


def _advice(environment: dict[str, Any]) -> Iterator[Finding]:
    try:
        known = builtin_recipes()
    except MambaSFTError as error:
        yield Finding("recipe", "start with", "problem", error.message, error.hint)
        return
    if environment:
        name, why = recommended_recipe(environment["device"])
        if name in known:
            yield Finding("recipe", "start with", "ok", f"mamba-sft train {name}   ({why})")


def recommended_recipe(device: dict[str, Any]) -> tuple[str, str]:
    """Returns the built-in recipe to start with on a device, and why.

    Args:
        device: From `environment.describe_device`.
    """
    if device["type"] == "cpu":
        return "quickstart", "the tiny base, made for a CPU"
    memory = device["memory_bytes"]
    for name, needed, bfloat16 in ADVICE:
        if memory >= needed and (device["bfloat16"] or not bfloat16):
            return name, f"for a GPU of {size_text(memory)}"
    return "quickstart", f"{size_text(memory)} are too few for the 7B base"
