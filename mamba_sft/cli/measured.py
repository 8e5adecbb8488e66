"""What the benchmarks share: the file of a result, and the machine it was measured on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mamba_sft.errors import UsageError

OutputFile = Annotated[
    Path | None, typer.Option("--output", metavar="FILE.json", help="Write the result into a JSON file.")
]

BUSY = 0.3
"""Load for each core, before a measurement, above which others take part of the machine."""


def check_output_file(file: Path | None, ending: str, option: str) -> None:
    """Refuses a file that could not be written, before anything is measured.

    Args:
        file: The file, if one is asked for.
        ending: What its name has to end in, such as `.json`.
        option: The option that names it.

    Raises:
        UsageError: It is not named so, or there is no directory for it.
    """
    if file is None:
        return
    if file.suffix.lower() != ending:
        raise UsageError(
            f"`{option}` writes {ending[1:].upper()}, and `{file}` is not named so",
            hint=f"`{option} {file.with_suffix(ending)}`",
        )
    if file.is_dir() or not file.parent.is_dir():
        what = "is a directory" if file.is_dir() else f"has no directory `{file.parent}` to be written into"
        raise UsageError(f"`{option} {file}` {what}", hint="name a file in a directory that is there")


def write_output(text: str, file: Path, option: str) -> None:
    """Writes a file, whole or not at all.

    Raises:
        UsageError: It cannot be written.
    """
    from mamba_sft.run import write_atomically

    try:
        write_atomically(file, text)
    except OSError as error:
        raise UsageError(
            f"cannot write `{file}`: {error.strerror}", hint=f"name another with `{option}`"
        ) from None


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
