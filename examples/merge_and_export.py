"""A run as one checkpoint and as a GGUF file: `python examples/merge_and_export.py runs/quickstart`."""

import sys

from mamba_sft import MambaSFTError, Run, export, merge, report

try:
    run = Run.open(sys.argv[1]) if len(sys.argv) > 1 else Run.newest()
    merged = merge(run)
    files = export(run, quantization=["Q8_0"])
except MambaSFTError as error:
    sys.exit(f"error: {error}")

print(merged)
print(files)
print(report(run))
