"""A verb that ends lets its model go, also when it ends in an error: the next cell may need the memory."""

from __future__ import annotations

import gc
from types import TracebackType

from mamba_sft.errors import MambaSFTError
from mamba_sft.notebook.cell import in_notebook


class LettingGo:
    """Gives memory back at the end that nothing holds any more.

    A notebook keeps the last error for `%debug`, and with its traceback all that the functions held: after
    *Stop* a whole model, beside which the next one would not fit. So what a user can mend, and *Stop*, lose
    theirs there; a bug keeps it. (Emptying the frames would not do: each keeps its function, and a function
    what it closes over.)
    """

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del trace
        if isinstance(error, MambaSFTError | KeyboardInterrupt) and in_notebook():
            _drop_tracebacks(error)
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _drop_tracebacks(error: BaseException | None) -> None:
    """Of an error and of those that led to it."""
    if error is not None:
        error.__traceback__ = None
        _drop_tracebacks(error.__cause__)
        _drop_tracebacks(error.__context__)
