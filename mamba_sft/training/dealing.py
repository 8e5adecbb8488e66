"""Work that is dealt out to the processes that train together, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

Item = TypeVar("Item")
Result = TypeVar("Result")


def deal_out(do: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> list[Result]:
    """Has each process do a share of something, and gives all results to all, in the order of `items`.

    Args:
        do: Does it for some of the items, which may be none.
        items: All of them, the same in every process.

    Raises:
        torch.OutOfMemoryError: Memory ran out in one of the processes; it is raised in all, so that none
            waits for another.
    """
    state = PartialState()
    if state.num_processes == 1:
        return do(items)
    own: list[Result] | str
    try:
        own = do(items[state.process_index :: state.num_processes])
    except torch.OutOfMemoryError as error:
        own = str(error)
    shares = gather_object([own])
    for share in shares:
        if isinstance(share, str):
            raise torch.OutOfMemoryError(share)
    return [shares[n % len(shares)][n // len(shares)] for n in range(len(items))]
