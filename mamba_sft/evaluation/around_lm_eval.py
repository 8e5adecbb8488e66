"""What surrounds a call of lm-eval: its chatter left out, and where it finds data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval tells what it does in hundreds of lines; what matters of it is told here."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def data_from(directory: Path | None) -> Any:
    """`datasets` takes `owner/name` from below the working directory before it asks the hub."""
    return chdir(directory) if directory is not None and directory.is_dir() else nullcontext()
