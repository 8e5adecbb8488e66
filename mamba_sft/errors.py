"""The errors a user can cause, each with one clear message and, where there is one, the likely fix.

`cli/app.py` prints `error: MESSAGE` (or another `heading`) and `hint: HINT` and exits with `exit_code`;
anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

from mamba_sft.framing import error_box


class MambaSFTError(Exception):
    """An expected failure: what went wrong, where, and how to mend it.

    Example: `except MambaSFTError as error: print(error.message, error.hint)`.

    Args:
        message: One or more lines: what, where (file and line), the value seen. No full stop on one sentence.
        hint: The likely fix, or None.
    """

    exit_code = 1
    heading = "error"

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """The message, and the hint on a line of its own: what a traceback of Python ends with."""
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def _render_traceback_(self) -> list[str]:
        """What IPython and Jupyter show in place of a traceback: one box, with the message and the hint."""
        return error_box(self.heading, self.message, self.hint)


class UsageError(MambaSFTError):
    """The command or call itself is wrong: a missing file, an argument that makes no sense."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe with problems; the message holds all of them, one a line, sorted by line number."""


class LockedError(MambaSFTError):
    """A directory that another process is writing into, or that no lock can be made for."""


class DataError(MambaSFTError):
    """Rows, templates or tokenizers that training data cannot be made from."""


class ModelError(MambaSFTError):
    """A base model that cannot be loaded, or is not the one expected."""


class AdapterError(MambaSFTError):
    """LoRA targets that match nothing, adapters that cannot learn, adapters that do not fit."""


class TrainingError(MambaSFTError):
    """A run that cannot start, or had to stop."""


class MergeError(MambaSFTError):
    """A merge that cannot be done, or whose check failed."""


class ExportError(MambaSFTError):
    """An export that cannot be done, or a file that failed its check."""
