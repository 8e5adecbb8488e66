"""How long it takes until something is said, and whose time the imports before the first step are.

    python benchmarks/bench_start.py

Two tables: processor seconds of `--help` (the bar is half a second) and of commands that are wrong, until
they say so (the bar is one second); and the self time of all imports of one training step of the quickstart,
by library, as Python's own `-X importtime` counts it, which adds some of its own.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

WRONG = [
    "train nosuch",
    "train quickstart train.learning_rat=1",
    "train quickstart data.sources=[{path:~nosuch.jsonl}]",
    "train quickstart eval.prompts=nosuch.jsonl",
    "train quickstart model.base=nosuch/x/y",
    "merge nosuch",
    "chat nosuch/x/y",
    "generate quickstart",
    "export nosuch",
]
"""`~` is a blank inside a word."""
STEP = ["train", "quickstart", "train.max_steps=1", "eval.prompts=null"]
LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \| +(\w+)")
SHOWN = 14


def main() -> None:
    """Prints both tables."""
    environment = os.environ | {"MAMBA_SFT_CACHE": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1"}
    print(f"{'command':<58}{'processor s':>12}")
    print(f"{'--help':<58}{_processor_seconds(['--help'], environment, refused=False):>12.2f}")
    for line in WRONG:
        words = [word.replace("~", " ") for word in line.split()]
        print(f"{line.replace('~', ' '):<58}{_processor_seconds(words, environment):>12.2f}")
    seconds, modules = _imports(environment)
    print(f"\n{'imports of one step of the quickstart':<40}{'s':>6}{'modules':>9}")
    for name, spent in seconds.most_common(SHOWN):
        print(f"{name:<40}{spent:>6.2f}{modules[name]:>9,}")
    rest = sum(seconds.values()) - sum(spent for _, spent in seconds.most_common(SHOWN))
    print(f"{'others':<40}{rest:>6.2f}\n{'all':<40}{sum(seconds.values()):>6.2f}{sum(modules.values()):>9,}")


def _processor_seconds(words: list[str], environment: dict[str, str], *, refused: bool = True) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "mamba_sft", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if refused and (done.returncode not in (1, 2) or "error:" not in done.stderr):
        sys.exit(f"`{' '.join(words)}` was not refused: {done.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _imports(environment: dict[str, str]) -> tuple[Counter[str], Counter[str]]:
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-X", "importtime", "-m", "mamba_sft", *STEP, f"output_dir={place}/run"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not (Path(place) / "run/adapter").is_dir():
            sys.exit(done.stderr[-2000:])
    seconds: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for microseconds, name in LINE.findall(done.stderr):
        seconds[name] += int(microseconds) / 1e6
        modules[name] += 1
    return seconds, modules


if __name__ == "__main__":
    main()
