"""What the benchmarks share: the file of a result, and the machine it was measured on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mamba_sft.cli.output_files import write_output

OutputFile = Annotated[
    Path | None, typer.Option("--output", metavar="FILE.json", help="Write the result into a JSON file.")
]

BUSY = 0.3
"""Load for each core, before a measurement, above which others take part of the machine."""


def write_result(result: dict[str, Any], file: Path | None) -> None:
    """Writes a result as JSON, if a file is asked for."""
    if file is not None:
        write_output(json.dumps(result, indent=2) + "\n", file, "--output")


def machine_line(machine: dict[str, Any]) -> str:
    """Returns what a number must be quoted with, on one line, and whether others were at work."""
    line = "  ".join(f"{name} {value}" for name, value in machine.items())
    load, cores = machine.get("load"), os.cpu_count() or 1
    busy = load is not None and load > BUSY * cores
    return (
        f"{line}\nthe machine was busy before (load {load} on {cores} cores): times say little"
        if busy
        else line
    )
