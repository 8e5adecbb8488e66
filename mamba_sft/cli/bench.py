"""The verb `bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from mamba_sft.cli import bench_generate, bench_train, completing
from mamba_sft.cli.console import Json, out
from mamba_sft.cli.help import Verb, Verbs

PIPE_WIDTH = 160

bench_app = typer.Typer(
    no_args_is_help=True,
    cls=Verbs,
    help="""Measure this machine: training, generation, kernels.

    Example: mamba-sft bench train quickstart
    """,
)
bench_app.command("train", cls=Verb)(bench_train.bench_train)
bench_app.command("generate", cls=Verb)(bench_generate.bench_generate)


@bench_app.command("kernels", cls=Verb)
def bench_kernels(
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto (a GPU if there is one), cpu, cuda or cuda:N.",
            autocompletion=completing.devices,
        ),
    ] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer shapes and repeats, short rows for the slow peers.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure scan and convolution against peers and the hardware.

    Example: mamba-sft bench kernels --quick

    On a CPU: a training step (stock transformers, and mambapy if installed), the scan, longer rows, decoding.
    On a GPU, at the 7B shapes: scan, convolution and one mixer layer, against mamba_ssm and causal_conv1d if
    they are installed. They are never needed. Building them, for this GPU only (here 9.0, an H100) and with
    an nvcc of the CUDA version of torch, takes minutes:
      export TORCH_CUDA_ARCH_LIST=9.0 CAUSAL_CONV1D_FORCE_BUILD=TRUE
      export MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE
      pip install einops ninja setuptools wheel
      pip install --no-build-isolation --no-deps causal-conv1d mamba-ssm
    """
    from mamba_sft.diagnostics.kernel_benchmark import measure_kernels

    results = measure_kernels(device, quick=quick)
    if as_json:
        sys.stdout.write(json.dumps(results) + "\n")
        return
    for part in rendered(results):
        out.print(part, soft_wrap=not isinstance(part, Table), width=None if out.is_terminal else PIPE_WIDTH)


def rendered(results: dict[str, Any]) -> Iterator[Table | Text | str]:
    """Yields the machine as a line of text, then each table after its title, ready to be printed by rich."""
    yield "  ".join(f"{name} {value}" for name, value in results["machine"].items())
    for title, rows in results["tables"].items():
        table = Table(box=None, pad_edge=False)
        names = list(dict.fromkeys(name for row in rows for name in row))
        names = [name for name in names if any(row.get(name) is not None for row in rows)]
        for name in names:
            text = isinstance(rows[0].get(name), str)
            table.add_column(name.replace("_", " "), justify="left" if text else "right", overflow="fold")
        for row in rows:
            table.add_row(*(_cell(name, row.get(name)) for name in names))
        yield Text(f"\n{title}", "bold")
        yield table


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            f"{value:.0%}"
            if name.endswith("of_floor")
            else f"{value:,.3g}"
            if value < 1000
            else f"{value:,.0f}"
        )
    return f"{value}"
