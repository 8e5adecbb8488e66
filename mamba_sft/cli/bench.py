"""The verb `bench`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from mamba_sft.cli.console import Json, out

PIPE_WIDTH = 160

bench_app = typer.Typer(no_args_is_help=True, help="Measure the kernels on this machine.")


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
    they are installed. They are never needed. Building them, for this GPU only (here 9.0, an H100) and with
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
