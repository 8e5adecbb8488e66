"""How fast the kernels are; the same as `mamba-sft bench kernels`, which an installed wheel has too.

    python benchmarks/bench_kernels.py [--device cpu] [--quick] [--stock-length 1024]

Prints tables and ends with one line of JSON. On a CPU the stock model materialises its states and loops over
time in Python: at the default length its step takes minutes, which is the point.
"""

from __future__ import annotations

import argparse
import json
import logging
import os

# OpenMP threads that wait by spinning keep the kernels' off the cores; to be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rich.console import Console

from mamba_sft.cli.bench import rendered
from mamba_sft.diagnostics.kernel_benchmark import measure_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats, shorter rows")
    parser.add_argument("--stock-length", type=int, help="tokens of the stock model's step; 0 leaves it out")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mamba_sft").setLevel(logging.INFO)

    results = measure_kernels(arguments.device, quick=arguments.quick, stock_length=arguments.stock_length)
    console = Console(highlight=False)
    for part in rendered(results):
        console.print(part, soft_wrap=isinstance(part, str))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
