"""Time, peak memory and size of GGUF files, made straight from a base and an adapter.

    python benchmarks/bench_export.py                                # a random model of 0.3B parameters
    python benchmarks/bench_export.py --base /tmp/random-7b -q Q8_0  # one made by make_random_checkpoint.py

Each quantization is a process of its own, so that memory is its own. Random weights have no answers to lose,
so files are not compared with the model unless `--verify` is given. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_merge import forget_pages, make_run

_EXPORT = """
import json, re, sys, time
from mamba_sft import export
from mamba_sft.exporting.request import GGUFOptions

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024

stages, started = {}, time.perf_counter()
def progress(stage, done, total):
    now = time.perf_counter() - started
    stages.setdefault(stage, [now, now, 0])[1:] = [now, peak()]

options = GGUFOptions(verify=sys.argv[3] == "verify")
done = export(sys.argv[1], quantization=sys.argv[2].split(","), options=options, progress=progress)
files = [{"method": f.method, "bytes": f.nbytes, "kl": f.quality and f.quality.kl} for f in done.files]
total = time.perf_counter() - started
print(json.dumps({"files": files, "seconds": total, "peak_mb": peak(), "stages": stages}))
"""


def measure(run: Path, base: Path, quantization: str, verify: bool) -> dict[str, Any]:
    forget_pages(base)
    command = [sys.executable, "-c", _EXPORT, str(run), quantization, "verify" if verify else "plain"]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(run / "export")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    first, last, peak = found["stages"]["writing"]
    return {
        "quantization": quantization,
        "gib": [round(file["bytes"] / 2**30, 2) for file in found["files"]],
        "write_seconds": round(last - first, 1),
        "write_peak_mb": peak,
        "seconds": round(found["seconds"], 1),
        "peak_mb": found["peak_mb"],
        "kl": [file["kl"] for file in found["files"]],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, help="a checkpoint; by default a random one is made")
    parser.add_argument("--work", type=Path, help="where to write, on the disk to be measured")
    parser.add_argument(
        "-q", "--quantization", action="append", help="comma-separated ones go in one pass; default: three"
    )
    parser.add_argument("--verify", action="store_true", help="load the files and compare them")
    given = parser.parse_args(arguments)
    if given.work:
        Path(given.work).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bench-export-", dir=given.work))
    tokenizer = Path(__file__).parents[1] / "data" / "tiny-base"
    try:
        base = given.base or work / "base"
        if given.base is None:
            make = [sys.executable, str(Path(__file__).with_name("make_random_checkpoint.py")), str(base)]
            size = ["--layers", "8", "--hidden", "1536", "--rank", "96", "--shard-gb", "0.3"]
            subprocess.run([*make, *size, "--tokenizer", str(tokenizer)], check=True)
        make_run(work / "run", base, quantization="none")
        for path in base.glob("*token*"):
            shutil.copyfile(path, work / "run" / "adapter" / path.name)
        wanted = given.quantization or ["Q8_0", "Q4_K_M", "Q2_K"]
        rows = [measure(work / "run", base, quantization, given.verify) for quantization in wanted]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for row in rows:
        print(
            f"{row['quantization']:20} {row['gib']} GiB, written in {row['write_seconds']} s,"
            f" {row['write_peak_mb']} MB; in all {row['seconds']} s, {row['peak_mb']} MB, KL {row['kl']}"
        )
    print(json.dumps({"benchmark": "export", "files": rows}))


if __name__ == "__main__":
    main()
