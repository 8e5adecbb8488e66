"""The file that answers go to: each is on the disk as soon as it is given, and the file is whole or absent.

While answers come they are in a file beside it, `answers.unfinished.jsonl`, in the order they came; that one
becomes the file. It stays where something ends the work early, and where the disk fills, and can be gone on
with (`unfinished`). Imports no torch.
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
from typing import IO, Self

from mamba_sft.disk import reason, sync
from mamba_sft.errors import UsageError
from mamba_sft.inference.answer import Answer, row_line
from mamba_sft.inference.prompt_rows import PromptRow
from mamba_sft.inference.unfinished import Asked, Unfinished, find_unfinished, name_of, record_of
from mamba_sft.run import write_atomically
from mamba_sft.wording import count_text, size_text

logger = logging.getLogger(__name__)


class AnswerFile:
    """Takes answers as they come; a context manager, once it was started, at whose end the file is there.

    Args:
        path: The file.
        resume: Go on with what was begun for it and not finished.
    """

    def __init__(self, path: str | Path, *, resume: bool = False):
        self.path, self._resume = Path(path), resume
        self.found: dict[int, Answer] = {}
        """The answers that an unfinished file has, by the numbers of their prompts."""
        self._prompts: Sequence[PromptRow] = ()
        self._asked: Asked = {}
        self._unfinished: Unfinished | None = None
        self._rows: dict[int, bytes] = {}  # all answers so far, in the order they came
        self._written = 0  # how many of them are on the disk
        self._told = False

    def start(self, prompts: Sequence[PromptRow], asked: Asked) -> Self:
        """Says what is answered, and reads back what is answered already; writes nothing.

        Args:
            prompts: What is answered, by the numbers of the answers.
            asked: What the answers depend on besides, from `asked_of`.

        Raises:
            UsageError: It is to be gone on with, and is finished, or was begun with something else.
        """
        self._prompts, self._asked = prompts, asked
        if not self._resume:
            return self
        self._unfinished = find_unfinished(self.path, prompts, asked)
        if self._unfinished is not None:
            self.found = self._unfinished.found
        elif self.path.exists():
            raise UsageError(
                f"`{self.path}` is there, and nothing of it is unfinished",
                hint="leave `--resume` out to answer all prompts anew",
            )
        return self

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._unfinished is None:
                self._file = _new_file(self.path)
                self._record = record_of(Path(self._file.name)).open("wb", buffering=0)
                self._record.write(json.dumps(self._asked).encode() + b"\n")
            else:
                self._go_on(self._unfinished)
        except OSError as error:
            raise UsageError(f"cannot write `{self.path}`: {reason(error, self.path)}") from error
        return self

    def _go_on(self, unfinished: Unfinished) -> None:
        """Opens an unfinished file behind its last whole answer."""
        self._file = unfinished.path.open("r+b", buffering=0)
        self._record = record_of(unfinished.path).open("r+b", buffering=0)
        lines = self._file.read(unfinished.size).splitlines(keepends=True)
        self._rows = dict(zip(unfinished.found, lines, strict=True))
        self._written = len(self._rows)
        self._file.truncate(unfinished.size)
        self._record.truncate(unfinished.record_size)
        self._record.seek(unfinished.record_size)

    def add(self, number: int, answer: Answer) -> None:
        """Adds the answer to a prompt; what the disk does not take is kept, and tried again with the next."""
        self._rows[number] = row_line(self._prompts[number], answer)
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
        with suppress(OSError):
            self._record.close()
        if error is not None or refusal is not None:
            self._keep(unfinished, refusal, error)
        elif list(self._rows) == sorted(self._rows):
            os.replace(unfinished, self.path)
            record_of(unfinished).unlink(missing_ok=True)
        else:
            self._put_in_order(unfinished)
            record_of(unfinished).unlink(missing_ok=True)

    def _write(self) -> OSError | None:
        """Writes what is not on the disk yet, whole rows only; returns the refusal if it cannot."""
        end = self._file.tell()
        waiting = list(self._rows.items())[self._written :]
        try:
            for number, row in waiting:
                rest = memoryview(row)
                while rest:  # a disk takes what it has room for, and refuses only then
                    rest = rest[self._file.write(rest) :]
                end += len(row)
                self._written += 1
                with suppress(OSError):  # without it the answer is given again when the file is gone on with
                    self._record.write(b"%d\n" % number)
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
            logger.warning(
                "%d of %d answers are in `%s`; `--resume` goes on", self._written, all_of_them, unfinished
            )
        else:
            unfinished.unlink(missing_ok=True)
            record_of(unfinished).unlink(missing_ok=True)
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


def _new_file(path: Path) -> IO[bytes]:
    """A file that was not there before, beside `path`: an earlier one may hold what is wanted still."""
    for number in count(1):
        with suppress(FileExistsError):
            return name_of(path, number).open("xb", buffering=0)
    raise AssertionError
