"""Dropout off while a model answers or is scored, whoever else does the same with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_users: dict[int, tuple[int, list[Any]]] = {}
"""Models that are evaluated now, by id: by how many, and their modules to be put back into training mode."""


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Switches dropout off inside the block; each module is then put back into the mode it was in.

    A model in evaluation mode is not touched. Several threads, or several answers in progress, may use one
    model: the last one puts it back.

    Args:
        model: Any module.
    """
    with _lock:
        count, training = _users.get(id(model), (0, []))
        if count == 0:
            training = [module for module in model.modules() if module.training]
            if training:
                model.eval()
        _users[id(model)] = count + 1, training
    try:
        yield
    finally:
        with _lock:
            count, training = _users.pop(id(model))
            if count > 1:
                _users[id(model)] = count - 1, training
            else:
                for module in training:
                    module.training = True
