"""The file that answers go to: each is on the disk as soon as it is given, and the file is whole or absent.

While answers come they are in a file beside it, `answers.unfinished.jsonl`, in the order they came; that one
becomes the file. It stays where something ends the work early, and where the disk fills.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from mamba_sft.credentials import without_secrets
from mamba_sft.disk import reason, sync
from mamba_sft.errors import UsageError
from mamba_sft.inference.generation import Answer
from mamba_sft.run import write_atomically
from mamba_sft.wording import count_text, size_text

logger = logging.getLogger(__name__)


class AnswerFile:
    """Takes answers as they come; a context manager, at whose end the file is there.

    Args:
        path: The file.
        prompts: What is answered, by the numbers of the answers.
    """

    def __init__(self, path: Path, prompts: Sequence[Any]):
        self.path, self._prompts = path, prompts
        self._rows: dict[int, bytes] = {}  # all answers so far, in the order they came
        self._written = 0  # how many of them are on the disk
        self._told = False

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _new_file(self.path)
        except OSError as error:
            raise UsageError(f"cannot write `{self.path}`: {reason(error, self.path)}") from error
        return self

    def add(self, number: int, answer: Answer) -> None:
        """Adds the answer to a prompt; what the disk does not take is kept, and tried again with the next."""
        row = answer_row(self._prompts[number], answer)
        text = without_secrets(json.dumps(row, ensure_ascii=False)) + "\n"
        self._rows[number] = text.encode("utf-8", "backslashreplace")
        error = self._write()
        if error is not None and not self._told:
            self._told = True
            logger.warning(
                "`%s` takes no more answers: %s. They are kept in memory and tried again; free some space",
                self._file.name, reason(error, self.path),
            )  # fmt: skip

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        refusal = self._write()
        unfinished = Path(self._file.name)
        if refusal is None:
            with suppress(OSError):
                sync(self._file.fileno())
        with suppress(OSError):
            self._file.close()
        if error is not None or refusal is not None:
            self._keep(unfinished, refusal, error)
        elif list(self._rows) == sorted(self._rows):
            os.replace(unfinished, self.path)
        else:
            self._put_in_order(unfinished)

    def _write(self) -> OSError | None:
        """Writes what is not on the disk yet, whole rows only; returns the refusal if it cannot."""
        end = self._file.tell()
        waiting = list(self._rows.values())[self._written :]
        try:
            for row in waiting:
                rest = memoryview(row)
                while rest:  # a disk takes what it has room for, and refuses only then
                    rest = rest[self._file.write(rest) :]
                end += len(row)
                self._written += 1
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            self._file.seek(end)
            return error
        return None

    def _put_in_order(self, unfinished: Path) -> None:
        text = b"".join(row for _, row in sorted(self._rows.items())).decode("utf-8")
        try:
            write_atomically(self.path, text)
        except OSError as error:
            raise UsageError(
                f"cannot write `{self.path}`: {reason(error, self.path)}; it takes {size_text(len(text))}",
                hint=f"all answers are in `{unfinished}`, in the order they came",
            ) from error
        unfinished.unlink(missing_ok=True)

    def _keep(self, unfinished: Path, refusal: OSError | None, error: BaseException | None) -> None:
        """Says where the answers are; those that the disk does not take go where temporary files go."""
        many, all_of_them = len(self._rows), len(self._prompts)
        if self._written:
            logger.warning("%d of %d answers are in `%s`", self._written, all_of_them, unfinished)
        else:
            unfinished.unlink(missing_ok=True)
        if refusal is None or self._written == many:
            return
        rest = list(self._rows.values())[self._written :]
        need = f"the other {count_text(len(rest), 'answer')} take {size_text(sum(map(len, rest)))}"
        message = f"cannot write `{self.path}`: {reason(refusal, self.path)}; {need}"
        try:
            with tempfile.NamedTemporaryFile("wb", prefix="answers-", suffix=".jsonl", delete=False) as other:
                other.writelines(rest)
            hint = f"they are in `{other.name}`, and {self._written} in `{unfinished}`"
        except OSError:
            hint = "free some space, or give `--output` a place on another disk"
        raise UsageError(message, hint=hint) from (error or refusal)


def answer_row(prompt: Any, answer: Answer) -> dict[str, Any]:
    """Returns a prompt, a text or messages, with its answer, as a file of answers has them."""
    return {
        "prompt" if isinstance(prompt, str) else "messages": prompt,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": answer.tokens,
    }


def _new_file(path: Path) -> IO[bytes]:
    """A file that was not there before, beside `path`: an earlier one may hold what is wanted still."""
    for number in count(1):
        name = f"{path.stem}.unfinished{number if number > 1 else ''}{path.suffix}"
        with suppress(FileExistsError):
            return path.with_name(name).open("xb", buffering=0)
    raise AssertionError
