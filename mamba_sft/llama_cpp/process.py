"""A GGUF file that runs in a process of its own, and the states of sequences in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from mamba_sft.errors import ModelError
from mamba_sft.llama_cpp.worker import read_message, write_message

Scores = np.ndarray[Any, np.dtype[np.float32]]
CHUNK = 512
"""Tokens that are asked for at a time: Ctrl-C waits for as many."""


class SequenceState:
    """What one sequence has read, held by the process; a copy goes its own way.

    Args:
        process: Who holds it.
        number: By which name.
    """

    def __init__(self, process: GGUFProcess, number: int):
        self._process, self.number = process, number

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceState:
        return self._process.copy(self)

    def __del__(self) -> None:
        self._process.forget(self.number)


class GGUFProcess:
    """Runs one GGUF file, and ends with the program that asks.

    Any number of threads may ask; one after the other is answered, by a thread of its own: a question that
    Ctrl-C interrupts is answered to its end, so that nothing is left half written, and nobody hears it.

    Args:
        path: The file.

    Raises:
        ModelError: llama.cpp does not load it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as this does
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mamba_sft.llama_cpp.worker", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
        )
        self._asking = ThreadPoolExecutor(1)
        self._states = count(1)
        self._forgotten: deque[int] = deque()
        hello, _ = self._ask({"do": "start"})
        self.ends: list[int] = hello["ends"]
        """Tokens that end an answer."""
        self.vocabulary: int = hello["vocabulary"]
        """How many tokens there are."""

    def read(self, ids: Sequence[int], state: SequenceState | None) -> tuple[Scores, SequenceState]:
        """Reads tokens on top of a state, which it moves on, or of nothing.

        Returns:
            The scores of the next token, (vocabulary,), and the state.

        Raises:
            ModelError: llama.cpp could not, or has ended.
        """
        state = state or SequenceState(self, next(self._states))
        for at in range(0, len(ids), CHUNK):
            chunk = np.asarray(ids[at : at + CHUNK], np.int32).tobytes()
            _, scores = self._ask({"do": "read", "state": state.number}, chunk)
        return np.frombuffer(scores, np.float32), state

    def copy(self, state: SequenceState) -> SequenceState:
        """Returns a state that has read the same."""
        new = SequenceState(self, next(self._states))
        self._ask({"do": "copy", "state": state.number, "new": new.number})
        return new

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text; special tokens written in it count as such."""
        head, _ = self._ask({"do": "tokenize"}, text.encode())
        return list(head["ids"])

    def forget(self, number: int) -> None:
        """Has a state dropped, with the next question."""
        self._forgotten.append(number)

    def close(self) -> None:
        """Ends the process."""
        self._asking.shutdown()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()
        self._said.close()

    def _ask(self, head: dict[str, Any], body: bytes = b"") -> tuple[dict[str, Any], bytes]:
        reply = self._asking.submit(self._exchange, head, body).result()
        if reply is None:
            raise self._ended()
        if "error" in reply[0]:
            raise ModelError(f"llama.cpp cannot go on with `{self.path}`: {reply[0]['error']}")
        return reply

    def _exchange(self, head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes] | None:
        drop = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
        if self._process.stdin is None or self._process.stdout is None:
            return None
        try:
            write_message(self._process.stdin, head | {"drop": drop}, body)
        except OSError:
            return None
        return read_message(self._process.stdout)

    def _ended(self) -> ModelError:
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        reason = " ".join(lines[-4:]).strip() or f"exit code {code}"
        if code == -signal.SIGKILL:
            reason = "it was killed, as the system does when memory runs out"
        return ModelError(f"llama.cpp cannot use `{self.path}`: {reason}")
