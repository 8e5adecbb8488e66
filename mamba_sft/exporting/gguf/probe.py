"""Loads one GGUF file through llama.cpp in a process of its own, and writes down what it sees.

A file that llama.cpp takes exception to can end the whole process, so the exporting one does not load it
itself. Run as `python -m mamba_sft.exporting.gguf.probe JOB.json RESULT.npz`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mamba_sft.errors import ExportError, MambaSFTError
from mamba_sft.llama_cpp import library as llama_cpp

Tokens = list[int]


@dataclass(frozen=True)
class Job:
    """What to do with a file.

    Args:
        file: The GGUF file.
        texts: To be tokenized.
        windows: Token ids whose logits are wanted.
        prompt: Token ids to be continued, likeliest token first.
        limit: Longest continuation.
        adapter: A GGUF LoRA to put on the model, or None.
    """

    file: str
    texts: list[str]
    windows: list[Tokens]
    prompt: Tokens
    limit: int
    adapter: str | None = None


@dataclass(frozen=True)
class Seen:
    """What llama.cpp made of it.

    Args:
        tokens: Of each text.
        logits: Of each window, (L, vocabulary) in float32.
        answer: The continuation of the prompt.
    """

    tokens: list[Tokens]
    logits: list[llama_cpp.Floats]
    answer: Tokens


def run_probe(job: Job) -> Seen:
    """Does the job in a fresh process.

    Raises:
        ExportError: llama.cpp does not load or run the file.
    """
    with tempfile.TemporaryDirectory(prefix="mamba-sft-probe-") as directory:
        work = Path(directory)
        (work / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(work / "job.json"), str(work / "result.npz")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            reason = " ".join(done.stderr.split("\n")[-4:]).strip() or f"exit code {done.returncode}"
            if done.returncode == -signal.SIGKILL:
                reason = "it was killed, as the system does when memory runs out"
            raise ExportError(
                f"llama.cpp cannot use `{job.file}`: {reason}",
                hint="`--no-verify` keeps a file that was not loaded" if done.returncode < 0 else None,
            )
        with np.load(work / "result.npz") as result:
            words = json.loads(str(result["words"]))
            logits = [result[f"logits{i}"] for i in range(len(job.windows))]
    return Seen(words["tokens"], logits, words["answer"])


def _work(job: Job) -> Seen:
    # One thread for each 64 MiB: llama.cpp's threads wait for each other by spinning, which a small model on
    # a busy machine pays for a hundredfold.
    threads = max(1, min(os.cpu_count() or 1, Path(job.file).stat().st_size >> 26))
    adapter = Path(job.adapter) if job.adapter else None
    model = llama_cpp.LoadedModel(llama_cpp.load(), Path(job.file), threads, adapter)
    try:
        too_long = max([len(window) for window in job.windows] + [len(job.prompt)])
        if too_long > model.n_ctx:
            raise MambaSFTError(f"a window of {too_long} tokens is longer than the context of {model.n_ctx}")
        answer = model.greedy(job.prompt, job.limit) if job.prompt else []
        tokens = [model.tokenize(text) for text in job.texts]
        return Seen(tokens, [model.logits(window) for window in job.windows], answer)
    finally:
        model.close()


def _run(job_file: Path, result_file: Path) -> None:
    job = Job(**json.loads(job_file.read_text(encoding="utf-8")))
    seen = _work(job)
    words = json.dumps({"tokens": seen.tokens, "answer": seen.answer})
    arrays: dict[str, Any] = {f"logits{i}": rows for i, rows in enumerate(seen.logits)}
    np.savez(result_file, words=words, **arrays)


if __name__ == "__main__":
    try:
        _run(Path(sys.argv[1]), Path(sys.argv[2]))
    except MambaSFTError as error:
        raise SystemExit(error.message) from None  # written to stderr, exit code 1
