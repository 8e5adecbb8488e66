"""Time and peak memory of a merge, against copying the same files.

    python benchmarks/bench_merge.py                              # a random model of 0.4B parameters
    python benchmarks/bench_merge.py --base /tmp/random-7b        # one made by make_random_checkpoint.py

The base's pages are dropped from the file cache before each, so both read the disk. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from mamba_sft.model.base_facts import BaseFacts
from mamba_sft.model.checkpoint import base_fingerprint, read_tensors
from mamba_sft.model.checksums import tensor_checksums

_MERGE = """
import json, sys
from mamba_sft.merging.merge_run import merge
report = merge(sys.argv[1], dtype=sys.argv[2] or None, onto=sys.argv[3])
print(report.to_json().replace("\\n", " "))
"""


def make_run(path: Path, base: Path, *, quantization: str, rank: int = 16, dora: bool = False) -> None:
    """Writes a run with a random adapter on in_proj, x_proj and out_proj, without building a model."""
    adapter = path / "adapter"
    adapter.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, entry in read_tensors(base).items():
        if name.endswith(("in_proj.weight", "x_proj.weight", "out_proj.weight")):
            key = "base_model.model." + name.removesuffix(".weight")
            rows, columns = entry.shape
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * columns**-0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
            if dora:
                tensors[f"{key}.lora_magnitude_vector"] = torch.ones(rows)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = ["in_proj", "x_proj", "out_proj"]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        "use_dora": dora,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    BaseFacts(
        base=str(base),
        revision=None,
        fingerprint=base_fingerprint(base),
        quantization=quantization,
        dtype="bfloat16",
        resize_to=None,
        checksums=tensor_checksums(base),
    ).write(adapter)
    (path / "recipe.yaml").write_text("{}\n")


def forget_pages(directory: Path) -> None:
    """Drops the directory's files from the file cache."""
    os.sync()
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def time_copy(base: Path, target: Path) -> float:
    """Seconds to copy the base's files to the disk, not just to the cache."""
    forget_pages(base)
    started = time.perf_counter()
    target.mkdir()
    for path in sorted(base.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb+") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, help="a checkpoint; by default a random one is made")
    parser.add_argument("--work", type=Path, help="where to write, on the disk to be measured")
    parser.add_argument("--dtype", default="")
    parser.add_argument("--onto", choices=["base", "dequantized"], default="base")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--no-copy", action="store_true", help="leave the copy out")
    given = parser.parse_args(arguments)
    if given.work:
        Path(given.work).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bench-merge-", dir=given.work))
    try:
        base = given.base or work / "base"
        if given.base is None:
            make = [sys.executable, str(Path(__file__).with_name("make_random_checkpoint.py")), str(base)]
            tokenizer = ["--tokenizer", str(Path(__file__).parents[1] / "data" / "tiny-base")]
            size = ["--layers", "8", "--hidden", "1536", "--rank", "96", "--shard-gb", "0.3"]
            subprocess.run([*make, *size, *tokenizer], check=True)
        quantization = "nf4" if given.onto == "dequantized" else "none"
        make_run(work / "run", base, quantization=quantization, rank=given.rank, dora=given.dora)
        copy = None if given.no_copy else time_copy(base, work / "copy")
        forget_pages(base)
        command = [sys.executable, "-c", _MERGE, str(work / "run"), given.dtype, given.onto]
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        report = json.loads(finished.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = {
        "benchmark": "merge",
        "gb": round(report["nbytes"] / 1e9, 3),
        "onto": given.onto,
        "adapter": f"{'dora' if given.dora else 'lora'} r={given.rank}",
        "write_seconds": report["seconds"],
        "check_seconds": report["check_seconds"],
        "copy_seconds": copy and round(copy, 3),
        "write_over_copy": copy and round(report["seconds"] / copy, 3),
        "peak_rss_mb": report["peak_rss"] >> 20,
        "logit_difference": report["check"]["difference"],
        "tensors": report["tensors"],
    }
    for name, value in result.items():
        print(f"{name:18} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
