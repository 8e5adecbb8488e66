"""The cell that runs: whether there is one, what our messages look like in it, and outputs that change."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any
from uuid import uuid4

from mamba_sft.credentials import without_secrets
from mamba_sft.noise import quiet_libraries
from mamba_sft.wording import printable


def in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook; IPython in a terminal is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def speak_here() -> None:
    """Lets our messages appear in the cell that runs, and those of the libraries not; elsewhere, nothing.

    Whoever has given the logger `mamba_sft` a handler keeps it. (Colab has one on the root logger, which
    shows warnings only.)
    """
    if not in_notebook():
        return
    logger = logging.getLogger("mamba_sft")
    if not logger.handlers:
        logger.addHandler(_CellHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, and as early
    quiet_libraries()


class _CellHandler(logging.Handler):
    """Writes messages where the cell's `print` goes: stderr is red in most notebooks, as if it went wrong."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = printable(without_secrets(self.format(record)))
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except Exception:  # as every handler does: a message is never the end of a run
            self.handleError(record)


class Output:
    """An output of the cell that can be replaced; nothing outside of notebooks."""

    def __init__(self) -> None:
        self._id = uuid4().hex
        self._shown = False

    def show(self, html: str, text: str) -> None:
        """Shows HTML, and text to those who cannot see it, in place of what was there."""
        if not in_notebook():
            return
        from IPython.display import display

        bundle: Any = {"text/html": html, "text/plain": text}
        display(bundle, raw=True, display_id=self._id, update=self._shown)
        self._shown = True
