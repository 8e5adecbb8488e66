"""What a run keeps of its data, in data.json: what was seen of it, and whether it is still the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mamba_sft.data.preparing import PreparedData
from mamba_sft.data.shown import length_histogram, shown_rows
from mamba_sft.errors import DataError
from mamba_sft.evaluation.prompts import Prompt, prompts_digest
from mamba_sft.planning.extent import RunLength
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from mamba_sft.training.resume_points import step_in_name
from mamba_sft.wording import count_text

logger = logging.getLogger(__name__)

_SHOWN = 3
"""Rows that are kept to be looked at."""


def record_data(
    recipe: Recipe, data: PreparedData, tokenizer: Any, length: RunLength, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Returns what `mamba-sft data` shows of the rows, and digests of them and of the prompts, for JSON.

    Args:
        recipe: What is trained.
        data: The prepared rows.
        tokenizer: The one that made them.
        length: What they come to.
        prompts: The sample prompts.
    """
    names = ("where", "text", "trained_text")
    rows = [{name: row[name] for name in names} for row in shown_rows(data, tokenizer, _SHOWN)]
    record: dict[str, Any] = data.summary.to_dict() | {"rows": rows, "length": length.to_dict()}
    record["lengths"] = length_histogram(data.summary.lengths)
    record["warnings"] += length.warnings()
    if data.packing:
        record["packed"] = data.packing.to_dict()
    if prompts:
        found = {"rows": len(prompts), "digest": prompts_digest(prompts)}
        record["prompts"] = {"path": recipe.eval.prompts} | found
    return record | {"start": recipe.model.adapter, "changes": []}


def settle_changes(
    run: Run, record: dict[str, Any], resume_point: Path | None, *, allowed: bool
) -> list[dict[str, Any]]:
    """Compares the data with what a run was started with, or with what it last went on with.

    Args:
        run: The run that is to go on.
        record: Of the data as it is now.
        resume_point: What it goes on from; None: it begins again.
        allowed: Whether the data may have changed.

    Returns:
        Every change since the run began: after which step, and a line for each source.

    Raises:
        DataError: Something changed and that is not allowed.
    """
    before = run.read_data()
    if not before:
        logger.warning("`%s` kept nothing of its data, so whether it is the same is not known", run.path)
    found = list(_changes(before, record))
    if not found:
        return list(before.get("changes", []))
    lines = "\n".join(f"  {line}" for line in found)
    if not allowed:
        raise DataError(
            f"`{run.path}` was started with other data:\n{lines}",
            hint="bring the rows back as they were, start anew with `--overwrite`, or go on with what is "
            "there now: `--resume --allow-changed-data`",
        )
    step = step_in_name(resume_point) if resume_point else 0
    logger.warning("going on after step %d with other data:\n%s", step, lines)
    return [*before.get("changes", []), {"after_step": step, "what": found}]


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for old, new in zip(before.get("sources", []), now["sources"], strict=False):
        if old.get("digest") and old["digest"] != new["digest"]:
            yield _told(f"`{new['path']}`", old["kept"], new["kept"], "row")
    old_prompts, new_prompts = before.get("prompts"), now.get("prompts")
    if old_prompts and new_prompts and old_prompts["digest"] != new_prompts["digest"]:
        what = f"`{new_prompts['path']}` (`eval.prompts`)"
        yield _told(what, old_prompts["rows"], new_prompts["rows"], "prompt")


def _told(what: str, before: int, now: int, thing: str) -> str:
    if before != now:
        return f"{what}: {count_text(before, thing)} then, {now:,} now"
    return f"{what}: {count_text(now, thing)} as then, but not the same ones"
