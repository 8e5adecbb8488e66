"""Tasks of lm-eval as it built them: their shots settled, their documents read once, from one seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SEED = 0
"""Some tasks draw the order of their answers when they are built; all are built from this seed."""


def settle(task: Any, shots: int | None) -> None:
    """Gives a task its shots: those asked for, or its own, or none; lm-eval leaves None where none are."""
    if shots is not None:
        task.set_config(key="num_fewshot", value=shots)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)  # as lm-eval's own command does


@contextmanager
def seeded() -> Iterator[None]:
    """What tasks draw in the block comes from the seed; afterwards the caller draws on as if nothing was."""
    before = random.getstate()
    random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(before)


class _Once:
    """A function of data sets that is computed once for each, and then remembered.

    Args:
        process: The function.
    """

    def __init__(self, process: Callable[[Any], Any]):
        self.process = process
        self.kept: list[tuple[Any, Any]] = []

    def __call__(self, dataset: Any) -> Any:
        """Returns what the function made of this very object."""
        for given, made in self.kept:
            if given is dataset:
                return made
        self.kept.append((dataset, self.process(dataset)))
        return self.kept[-1][1]


def read_once(task: Any) -> None:
    """Reads the documents of a task, so that every later look at them finds the same.

    lm-eval makes them anew whenever it looks: as it asks, and again as it scores. Where they are shuffled
    (GPQA), only a file that some earlier run left in a cache makes both the same, whoever's order that is.
    """
    for place in (getattr(task, "config", None), getattr(task, "fewshot_cfg", None)):
        if getattr(place, "process_docs", None) is not None:
            place.process_docs = _Once(place.process_docs)  # type: ignore[union-attr]
    with seeded():  # for each, so that what else is asked for changes nothing
        _ = task.eval_docs


def refused(name: str, task: Any) -> Iterator[str]:
    """Yields why a task cannot be run here."""
    if getattr(task, "UNSAFE_CODE", False):
        yield f"`{name}` runs code that the model writes, which is not done here"
    if getattr(task, "MULTIMODAL", False):
        yield f"`{name}` shows pictures, which this model does not see"


@contextmanager
def nothing_remembered() -> Iterator[None]:
    """Documents that are shuffled when they are read come from the seed, and not from an earlier reading."""
    import datasets

    if not datasets.is_caching_enabled():
        yield
        return
    datasets.disable_caching()
    try:
        yield
    finally:
        datasets.enable_caching()
