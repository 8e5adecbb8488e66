"""The verbs of the command line that look at the machine: `doctor` and `bench`."""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mamba_sft.cli_talk import err, out

if TYPE_CHECKING:
    from mamba_sft.diagnostics.diagnosis import Diagnosis
    from mamba_sft.diagnostics.software import Finding

MARKS = {"ok": ("✓", "ok", "green"), "note": ("!", "!!", "yellow"), "problem": ("✗", "XX", "bold red")}
NAME_WIDTH, LEAST_WIDTH, PIPE_WIDTH = 17, 40, 160

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

bench_app = typer.Typer(no_args_is_help=True, help="Measure the kernels on this machine.")


def doctor(
    as_json: Json = False,
) -> None:
    """Say which versions, device and kernels will be used here, why, and what would make it faster.

    Exit code 1 only if something makes training impossible.
    """
    from mamba_sft.diagnostics.diagnosis import diagnose

    logging.getLogger("mamba_sft").setLevel(logging.ERROR)  # what the kernels would say is in the findings
    with err.status(
        "looking at this machine"
    ):  # seconds, most of them torch's start; shown on a terminal only
        diagnosis = diagnose()
    if as_json:
        sys.stdout.write(diagnosis.to_json() + "\n")
    else:
        _show_diagnosis(diagnosis)
    if diagnosis.status == "problem":
        raise typer.Exit(1)


def _show_diagnosis(diagnosis: Diagnosis) -> None:
    section = None
    for finding in diagnosis.findings:
        if finding.section != section:
            section = finding.section
            out.print(Text(section, style="bold"))
        out.print(_line(finding))
    counts = {status: sum(one.status == status for one in diagnosis.findings) for status in MARKS}
    if counts["problem"]:
        out.print(f"[bold red]{_count(counts['problem'], 'problem')}[/], {_count(counts['note'], 'note')}")
    else:
        out.print(f"[bold green]ready to train[/]; {_count(counts['note'], 'note')}")


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"


def _line(finding: Finding) -> Text:
    """A finding, wrapped beside its name on a terminal and on one line in a pipe; its fix on a line below."""
    mark, plain, style = MARKS[finding.status]
    if not out.encoding.lower().startswith("utf"):
        mark = plain
    line = Text(f"  {mark} ", style=style)
    line.append(f"{finding.name:<{NAME_WIDTH}}", style="default")
    indent = line.cell_len
    line.append(_wrapped(finding.text, indent), style="default")
    if finding.fix:
        line.append("\n" + " " * indent + _wrapped(f"-> {finding.fix}", indent + 3), style="cyan")
    return line


def _wrapped(text: str, indent: int) -> str:
    if not out.is_terminal:
        return text
    lines = textwrap.wrap(
        text, max(out.width - indent, LEAST_WIDTH), break_on_hyphens=False, break_long_words=False
    )
    return ("\n" + " " * indent).join(lines)


@bench_app.command("kernels")
def bench_kernels(
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer shapes and repeats, and the slow peers on short rows.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the scan and the convolution against their peers and against what the hardware allows.

    On a CPU: a training step (stock transformers, and mambapy if installed), the scan, longer rows, decoding.
    On a GPU, at the 7B shapes: scan, convolution and one mixer layer, against mamba_ssm and causal_conv1d if
    they are installed. They are never needed. Building them, for this card only (here 9.0, an H100) and with
    an nvcc of the CUDA version of torch, takes minutes:

        export TORCH_CUDA_ARCH_LIST=9.0

        export MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE

        export CAUSAL_CONV1D_FORCE_BUILD=TRUE

        pip install einops ninja setuptools wheel

        pip install --no-build-isolation --no-deps causal-conv1d mamba-ssm
    """
    from mamba_sft.diagnostics.kernel_benchmark import measure_kernels, rendered

    results = measure_kernels(device, quick=quick)
    if as_json:
        sys.stdout.write(json.dumps(results) + "\n")
        return
    for part in rendered(results):
        out.print(part, soft_wrap=isinstance(part, str), width=None if out.is_terminal else PIPE_WIDTH)
