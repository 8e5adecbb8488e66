"""The first hour on a GPU: everything that has to be measured there, in one command of at most 25 minutes.

    python benchmarks/first_gpu_run.py                       # --minutes 25 --output benchmarks/results
    python benchmarks/first_gpu_run.py --only decode         # the parts whose names have this in them
    python benchmarks/first_gpu_run.py --device cpu --tiny   # tiny shapes, to try the script itself

Parts, the most valuable first: what `doctor` finds, the gpu tests, the kernels against mamba_ssm and
causal_conv1d where they are built, a training step of 7.27B random weights in 16 bits and in NF4 by rising
length, decoding, the largest residual, and the kernels' other tests, compiled. Needs no network and no
weights. Each part is a process of its own with a time limit taken from what is left: one that crashes, hangs
or is killed is a line of the entry, and the others still run. After each row of results the entry is written
anew, as `<date>-<card>.json` and as `.md`, which is ready to be put into `benchmarks/LOG.md`. What is
measured, and how, is in `first_gpu_parts.py`. Where torch sees no GPU, `doctor` says why and nothing else is
begun. What `--tiny` writes says of itself that it is a trial; nothing writes into `LOG.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamba_sft.planning.environment import nvidia_smi, package_versions, processor_name
from mamba_sft.run import write_atomically

ROOT = Path(__file__).parents[1]
PARTS = Path(__file__).with_name("first_gpu_parts.py")
LENGTHS, TINY_LENGTHS = (2048, 8192, 32_768), (64, 128)
FORMATS = {"16 bits": "none", "nf4": "nf4"}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
NO_GPU = "torch sees no CUDA device"
"""What a part fails with where all others would."""
LOG_LINES = 20
"""Of what a failed part printed, kept in the JSON."""
TABLES = {
    "tests": ("test", "outcome", "seconds"),
    "training": (
        "step", "layers", "tokens", "checkpointing", "tokens/s", "planned tokens/s", "MFU", "with repeats",
        "peak GB", "planned GB",
    ),
    "decoding": ("weights", "layers", "batch", "prompt", "read tokens/s", "tokens/s", "of bandwidth"),
    "residual": ("weights", "layers", "tokens", "largest", "after layer", "of float16's 65504", "logits off"),
}  # fmt: skip
"""Columns by the table that a row says it belongs to; of others, those that the rows have."""


@dataclass
class Part:
    """One process of the run.

    Args:
        name: Shown, and chosen by `--only`.
        command: What runs; `--rows FILE` is added, to which it appends its results as lines of JSON.
        least: Seconds without which it is not begun.
        most: Seconds after which it is ended, or earlier if later parts would not have their `least`.
        status: `waiting`, `running`, `done`, `failed`, `out of time` or `not run`.
        reason: Why it is not `done`.
        seconds: What it took.
        rows: Its results; a row belongs to the table it names, and one that has `note` is a line of text.
        log: The end of what it printed, if it failed.
    """

    name: str
    command: Sequence[str]
    least: float = 20
    most: float = 120
    status: str = "waiting"
    reason: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


@dataclass
class Entry:
    """What is written.

    Args:
        facts: Date, card, versions, command.
        parts: All of them, whether they have run or not.
        path: Of the JSON; the Markdown is beside it.
    """

    facts: dict[str, Any]
    parts: list[Part]
    path: Path

    def write(self) -> None:
        """Writes both files, each by a rename."""
        content: dict[str, Any] = {"benchmark": "first GPU run"} | self.facts
        content["parts"] = [dict(vars(part)) for part in self.parts]
        for part in content["parts"]:
            del part["command"]  # paths of this machine
        write_atomically(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        write_atomically(self.path.with_suffix(".md"), markdown(self.facts, self.parts))


def planned_parts(device: str, tiny: bool, base: str | None) -> list[Part]:
    """Returns the parts, the most valuable first."""
    size = ["--device", device, *(["--tiny"] if tiny else [])]

    def part(name: str, words: list[str], least: float, most: float) -> Part:
        return Part(name, [sys.executable, str(PARTS), *words, *size], least, most)

    parts = [
        part("doctor", ["doctor"], 10, 90),
        part("gpu tests", ["tests", "gpu"], 30, 300),
        part("kernels", ["kernels"], 30, 240),
    ]
    lengths = TINY_LENGTHS if tiny else LENGTHS
    for weights, quantization in FORMATS.items():
        for length in lengths:
            words = ["train", "--quantization", quantization, "--length", str(length)]
            parts.append(part(f"training step, {weights}, {length:,} tokens", words, 60, 180))
    words = ["train", "--length", str(max(lengths)), "--stream", "64" if tiny else "1024"]
    parts.append(part(f"training step, 16 bits, {max(lengths):,} tokens streamed", words, 60, 180))
    for weights, quantization in FORMATS.items():
        parts.append(part(f"decode, {weights}", ["decode", "--quantization", quantization], 40, 120))
    given = ["--base", str(Path(base).absolute())] if base else []
    parts.append(part("residual", ["residual", *given], 40, 120))
    if not tiny:
        parts.append(part("kernel tests", ["tests", "kernel"], 60, 600))
    return parts


def run_parts(entry: Entry, deadline: float) -> None:
    """Runs the parts one after another until the deadline, a time of `time.monotonic`."""
    entry.write()
    for number, part in enumerate(entry.parts, 1):
        left = deadline - time.monotonic()
        later = sum(other.least for other in entry.parts[number:])
        limit = max(part.least, min(part.most, left - later))  # one that hangs leaves some for each
        if left < part.least:
            part.status = "not run"
            part.reason = f"it needs about {part.least:.0f} s, and {max(left, 0):.0f} s were left"
        else:
            print(f"\n== {part.name} (at most {limit:.0f} s)", flush=True)
            try:
                run_part(entry, part, limit)
            except BaseException:
                part.status, part.reason = "failed", "the whole run was ended here"
                raise
        ending = f"{part.status} after {part.seconds:.0f} s" if part.seconds else part.status
        print(f"-- {part.name}: {ending}{part.reason and ': ' + part.reason}", flush=True)
        if part.reason == NO_GPU:
            for other in entry.parts[number:]:
                other.status, other.reason = "not run", NO_GPU
            print(f"\n{NO_GPU}, so nothing else was begun; to try the script itself: --device cpu --tiny")
            entry.write()
            return
        entry.write()


def run_part(entry: Entry, part: Part, limit: float) -> None:
    """Runs one part in a process group of its own, ends it at its limit, and keeps its rows."""
    with tempfile.TemporaryDirectory() as scratch:
        rows, log = Path(scratch) / "rows", Path(scratch) / "log"
        rows.touch()
        start = time.monotonic()
        part.status = "running"
        entry.write()
        with log.open("wb") as out:
            try:
                process = subprocess.Popen(
                    [*part.command, "--rows", str(rows)], stdout=out, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL, cwd=ROOT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                part.status, part.reason = "failed", str(error)
                return
        try:
            while process.poll() is None and time.monotonic() - start < limit:
                time.sleep(0.1)
                take_rows(entry, part, rows)
            ended = process.poll()
        finally:  # what it started goes with it, and so it does when this process is told to end
            end_group(process)
            part.seconds = round(time.monotonic() - start, 1)
        take_rows(entry, part, rows)
        part.status, part.reason = outcome(ended, limit, part.rows)
        if part.status != "done":
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            part.log = [line.replace(str(ROOT), ".").rstrip() for line in lines if line.strip()][-LOG_LINES:]
            if part.status == "failed" and not part.reason:
                part.reason = part.log[-1] if part.log else f"exit code {ended}"


def take_rows(entry: Entry, part: Part, path: Path) -> None:
    """Takes over what a part has written since the last time, prints it, and writes the entry."""
    whole, _, _cut_off = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    lines = whole.split("\n") if whole else []
    new = []
    for line in lines[len(part.rows) :]:
        try:
            new.append(json.loads(line))
        except ValueError:
            new.append({"note": f"unreadable: {line[:80]}"})
    if not new:
        return
    part.rows += new
    for row in new:
        device = row.get("facts", {}).get("device", {})
        if device.get("type") == "cuda":  # the one that is used, which need not be the first
            entry.facts["card"] = device["name"]
        print("   " + text_of(row), flush=True)
    entry.write()


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started, if there is anything left of them."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in a driver cannot be waited for
        process.wait(timeout=10)


def outcome(code: int | None, limit: float, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Returns a part's status and the reason for it, from its exit code; None: it was ended at its limit."""
    if code is None:
        return "out of time", f"ended after {limit:.0f} s; what it had by then is kept"
    if code < 0:
        with contextlib.suppress(ValueError):
            return "failed", f"killed by {signal.Signals(-code).name}"
        return "failed", f"killed by signal {-code}"
    if code:
        return "failed", next((row["error"] for row in reversed(rows) if "error" in row), "")
    return "done", ""


def text_of(row: dict[str, Any]) -> str:
    """Returns a row as a line for the terminal."""
    for name in ("note", "error"):
        if name in row:
            return str(row[name])
    shown = {
        name: cell(value)
        for name, value in row.items()
        if name not in {"table", "facts"} and value is not None and not isinstance(value, list)
    }
    return "  ".join(f"{name} {value}" for name, value in shown.items()) or "facts of the machine"


def cell(value: Any) -> str:
    """Returns a value as tables have it: three figures, nothing for what is not known."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def markdown(facts: dict[str, Any], parts: list[Part]) -> str:
    """Returns the entry in the form of `benchmarks/LOG.md`."""
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items() if value)
    lines = [f"## {facts['date']}: first run on {facts['card']}", ""]
    if facts["tiny"]:
        lines += ["A trial of the script on tiny shapes: its numbers say nothing about a GPU or a 7B.", ""]
    driver = f"driver {facts['driver']}; " if facts["driver"] else ""
    lines += [f"{driver}{versions}; commit {facts['commit']}. Random weights of one seed.", ""]
    lines += [f"    {facts['command']}", ""]
    results = [part.status + (part.reason and f": {part.reason}") for part in parts]
    lines += markdown_table(
        [
            {"part": part.name, "result": result, "s": part.seconds or None}
            for part, result in zip(parts, results, strict=True)
        ]
    )
    for title, rows in tables_of(parts):
        lines += [f"{title}:", "", *markdown_table(rows, TABLES.get(title))]
    notes = [row["note"] for part in parts for row in part.rows if "note" in row]
    if notes:
        lines += ["Notes:", "", *(f"- {one_line(note)}" for note in notes), ""]
    return "\n".join(lines)


def tables_of(parts: list[Part]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields the title and the rows of each table, in the order in which they began."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in (row for part in parts for row in part.rows if "table" in row):
        tables.setdefault(row["table"], []).append(row)
    yield from tables.items()


def markdown_table(rows: list[dict[str, Any]], names: Sequence[str] | None = None) -> list[str]:
    """Returns rows as the lines of a table, columns without a value left out, and an empty line."""
    names = names or [name for name in dict.fromkeys(name for row in rows for name in row) if name != "table"]
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(one_line(cell(row.get(name))) for name in names) + " |" for row in rows]
    return [*lines, ""]


def one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def facts_of(options: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Returns what the numbers must be quoted with, asking nothing that could hang or crash."""
    card, driver = None, None
    if options.device == "cuda":
        card, driver = nvidia_smi("name,driver_version") or (None, None)
    shown = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "mamba-ssm", "causal-conv1d")
    packages = package_versions("mamba-ssm", "causal-conv1d")
    return {
        "date": datetime.date.today().isoformat(),
        "card": card or ("an unknown GPU" if options.device == "cuda" else processor_name() or "a CPU"),
        "driver": driver,
        "versions": {"python": platform.python_version()} | {name: packages[name] for name in shown},
        "commit": commit(),
        "command": " ".join(["python benchmarks/first_gpu_run.py", *words]),
        "tiny": options.tiny,
    }


def commit() -> str:
    """Returns the commit of the checkout, and whether it has been changed."""
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def free_path(directory: Path, facts: dict[str, Any]) -> Path:
    """Returns the JSON's path: an earlier run of the same day stays what it is."""
    card = re.sub(r"[^a-z0-9]+", "-", facts["card"].lower()).strip("-")
    stem = f"{facts['date']}-{card}" + ("-tiny" if facts["tiny"] else "")
    names = (f"{stem}{f'-{number}' if number > 1 else ''}.json" for number in range(1, 10_000))
    return next(directory / name for name in names if not (directory / name).exists())


def stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25, help="for everything together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script itself")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="parts whose names have one of these")
    parser.add_argument("--base", help="directory of real weights, for the residual")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(words)
    if options.device == "cpu" and not options.tiny:
        parser.error("7B shapes are for a GPU: on a CPU add --tiny")
    deadline = time.monotonic() + 60 * options.minutes
    os.environ |= dict.fromkeys(OFFLINE, "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    facts = facts_of(options, words)
    parts = planned_parts(options.device, options.tiny, options.base)
    if options.only:
        parts = [part for part in parts if any(word in part.name for word in options.only)]
        if not parts:
            parser.error("no part has such a name")
    entry = Entry(facts, parts, free_path(options.output, facts))
    try:
        run_parts(entry, deadline)
    finally:
        entry.write()
        print(f"\n{entry.path}\n{entry.path.with_suffix('.md')}", flush=True)
    return 0 if all(part.status == "done" for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
