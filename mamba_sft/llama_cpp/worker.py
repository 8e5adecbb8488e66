"""The process that runs one GGUF file: it reads tokens on top of states, and answers with scores.

Run as `python -m mamba_sft.llama_cpp.worker FILE` by `process`, which talks to it over its standard input and
output. Each message either way is two lengths, a JSON object and bytes. llama.cpp has one sequence here; the
states of others are kept as bytes beside it, and change places with it when they are asked for.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np

from mamba_sft.errors import MambaSFTError
from mamba_sft.llama_cpp import library as llama_cpp

LENGTHS = struct.Struct("<II")
"""Bytes of the JSON object and of what follows it."""


def write_message(file: IO[bytes], head: dict[str, Any], body: bytes = b"") -> None:
    """Writes one message, and has it sent."""
    text = json.dumps(head).encode()
    file.write(LENGTHS.pack(len(text), len(body)) + text + body)
    file.flush()


def read_message(file: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Reads one message; None where the other side is gone."""
    lengths = file.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    head, body = LENGTHS.unpack(lengths)
    text = file.read(head)
    rest = file.read(body)
    return (json.loads(text), rest) if len(rest) == body else None


class _States:
    """Sequences by number, of which one is in llama.cpp."""

    def __init__(self, model: llama_cpp.LoadedModel):
        self._model = model
        self._live: int | None = None
        self._kept: dict[int, Any] = {}
        self._read: dict[int, int] = {}
        """How many tokens each has read."""

    def read(self, number: int, ids: list[int]) -> bytes:
        """Reads tokens on top of a sequence, or of none where the number is new; returns the next scores."""
        self._bring(number)
        at = self._read.get(number, 0)
        scores = self._model.read(ids, at)
        self._read[number] = at + len(ids)
        return scores.tobytes()

    def copy(self, number: int, new: int) -> None:
        """Makes a sequence that has read what another has."""
        self._kept[new] = self._model.state() if number == self._live else self._kept[number]
        self._read[new] = self._read[number]

    def drop(self, numbers: list[int]) -> None:
        """Forgets sequences."""
        for number in numbers:
            self._kept.pop(number, None)
            self._read.pop(number, None)
            if number == self._live:
                self._live = None

    def _bring(self, number: int) -> None:
        if number == self._live:
            return
        if self._live is not None:
            self._kept[self._live] = self._model.state()
        if number in self._kept:
            self._model.restore(self._kept.pop(number))
        else:
            self._model.clear()
        self._live = number


def _serve(path: Path, requests: IO[bytes], replies: IO[bytes]) -> None:
    # One thread for each 64 MiB: llama.cpp's threads wait for each other by spinning.
    threads = max(1, min(os.cpu_count() or 1, path.stat().st_size >> 26))
    model = llama_cpp.LoadedModel(llama_cpp.load(mapped=False), path, threads)
    states = _States(model)
    while (message := read_message(requests)) is not None:
        head, body = message
        reply: dict[str, Any] = {}
        scores = b""
        try:
            states.drop(head["drop"])
            if head["do"] == "start":
                reply = {"ends": model.end_tokens(), "vocabulary": model.n_tokens}
            elif head["do"] == "read":
                scores = states.read(head["state"], np.frombuffer(body, np.int32).tolist())
            elif head["do"] == "copy":
                states.copy(head["state"], head["new"])
            else:
                reply["ids"] = model.tokenize(body.decode())
        except MambaSFTError as error:
            reply["error"] = error.message
        write_message(replies, reply, scores)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks, and this side ends with it
    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native code prints is no reply
    try:
        _serve(Path(sys.argv[1]), sys.stdin.buffer, own)
    except MambaSFTError as problem:
        raise SystemExit(problem.message) from None  # written to stderr, exit code 1
