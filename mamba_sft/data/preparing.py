"""Training data: rows in, `input_ids` and `labels` out, and a summary of what happened on the way.

Rows are read (`sources`), recognised (`formats`), rendered and tokenized (`tokenizing`), cut to the longest
length, split into training and validation rows, and weighted (`selecting`). A source of weight w gives w
times its training rows to each epoch: below 1 a fixed random share of them, above 1 copies and a share of one
more.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_sft.data import formats
from mamba_sft.data.chats import BadRowError, Chat
from mamba_sft.data.digests import RowsDigest
from mamba_sft.data.packing import IGNORED, list_table, pack
from mamba_sft.data.selecting import SourceRows, cut_row, take_validation, weighted
from mamba_sft.data.sources import read_source
from mamba_sft.data.summary import DataSummary, SourceSummary
from mamba_sft.data.tokenizing import Example, Renderer, Tokens
from mamba_sft.errors import DataError
from mamba_sft.json_lines import Row
from mamba_sft.model.chat_template import TemplateSetup
from mamba_sft.model.loading import load_setup
from mamba_sft.run import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset

    from mamba_sft.recipe.fields import DataSection, SourceSection
    from mamba_sft.recipe.recipe import Recipe

logger = logging.getLogger(__name__)

_LISTED = 10
"""Bad rows that an error lists."""
_ANNOUNCED = 50_000
"""Rows after which a long read says that it is alive."""


@dataclass
class PreparedData:
    """What a run trains and validates on.

    Args:
        train: Columns `input_ids` and `labels` (-100 where a token is not trained), lists of int32.
        validation: The same, or None.
        summary: What became of the rows.
        train_origins: Where each training row came from, e.g. `chats.jsonl:12`.
        rejected: The bad rows that `on_bad_row: skip` left out, each with the reason; see `write_rejected`.
    """

    train: Dataset
    validation: Dataset | None
    summary: DataSummary
    train_origins: list[str]
    rejected: list[tuple[Row, str]]


def read_corpus(recipe: Recipe) -> tuple[TemplateSetup, PreparedData]:
    """Returns the recipe's tokenizer, ready to chat, and its rows as tokens. Writes nothing.

    Args:
        recipe: Names the base, the template and the data.

    Raises:
        MambaSFTError: The base, its tokenizer, the template or the data cannot be used.
    """
    setup = load_setup(recipe.model, recipe.chat)
    data = prepare_data(recipe.data, setup, system=recipe.chat.system, seed=recipe.seed)
    return setup, data


def as_trained(dataset: Dataset | None, data: DataSection, seed: int) -> Any:
    """Returns the rows as the trainer takes them: packed when `data.packing` is on. None stays None."""
    if dataset is None or not data.packing or data.max_length is None:
        return dataset
    return pack(dataset, data.max_length, seed)


def prepare_data(data: DataSection, setup: TemplateSetup, *, system: str | None, seed: int) -> PreparedData:
    """Reads, renders and splits the rows of all sources; the same recipe and seed give the same rows.

    Args:
        data: The recipe's `data` section.
        setup: The tokenizer with its chat template.
        system: System message of chats that have none.
        seed: Decides the validation rows and the shares that weights take.

    Raises:
        DataError: A source cannot be read, rows are bad and `on_bad_row` is `stop`, the template's marks are
            unfit for the mask, or no row is left.
    """
    summary = DataSummary(max_length=data.max_length)
    renderer = Renderer(setup, system, data.assistant_only_loss)
    bad: list[tuple[Row, str]] = []
    sources = [_read(section, data, renderer, summary, bad) for section in data.sources]
    if bad and data.on_bad_row == "stop":
        raise DataError(
            "\n".join([f"{len(bad)} of {summary.read} rows cannot be trained on:", *_listed(bad)]),
            hint="mend them, or set `data.on_bad_row: skip` to leave them out (listed in rejected.jsonl)",
        )
    if not any(source.rows for source in sources):
        raise _nothing_left(summary, bad)
    validation = take_validation(sources, data.validation, np.random.default_rng(seed), summary)
    train = [piece for i, source in enumerate(sources) for piece in weighted(source, (seed, i))]
    summary.count_tokens(train, validation)
    return PreparedData(
        train=_dataset(train),
        validation=_dataset(validation) if validation else None,
        summary=summary,
        train_origins=[piece.where for piece in train],
        rejected=bad,
    )


def write_rejected(rows: list[tuple[Row, str]], path: Path) -> None:
    """Writes bad rows as JSON Lines: where each came from, why it is bad, and the row itself."""
    lines = [
        json.dumps({"where": row.where, "reason": reason, "row": row.value}, ensure_ascii=False, default=str)
        for row, reason in rows
    ]
    # half a surrogate pair, a reason to reject a row, has no UTF-8: it is written as JSON escapes it
    text = "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace").decode("utf-8")
    write_atomically(path, text)


def _read(
    section: SourceSection,
    data: DataSection,
    renderer: Renderer,
    summary: DataSummary,
    bad: list[tuple[Row, str]],
) -> SourceRows:
    source = SourceRows(section, SourceSummary(section.path, section.weight))
    summary.sources.append(source.summary)
    bad_before, digest = len(bad), RowsDigest()
    stops = data.on_bad_row == "stop"
    for rendered in renderer.render(
        _examples(section, renderer.control_tokens(), source.summary, bad, stops)
    ):
        if not isinstance(rendered, Tokens):
            bad.append(rendered)
        elif pieces := cut_row(rendered, data, summary):
            source.rows.append(pieces)
            digest.add(pieces)
    source.summary.bad = len(bad) - bad_before
    source.summary.kept = len(source.rows)
    source.summary.digest = digest.text()
    return source


def _examples(
    section: SourceSection,
    control: re.Pattern[str],
    summary: SourceSummary,
    bad: list[tuple[Row, str]],
    stops: bool,
) -> Iterator[tuple[Row, Example]]:
    """Yields the good rows of a source as examples; adds the others to `bad`.

    Once a row is bad and the run is to stop there is nothing to render: the rest is only counted.
    """
    for file, rows in groupby(read_source(section), key=lambda row: row.file):
        head = list(islice(rows, formats.LOOKED_AT))
        expected = _file_format(file, head, section.format, summary)
        for row in chain(head, rows):
            summary.read += 1
            if summary.read % _ANNOUNCED == 0:
                logger.info("`%s`: %s rows read", section.path, f"{summary.read:,}")
            try:
                example = _parse(row, expected, control)
            except BadRowError as error:
                bad.append((row, str(error)))
                continue
            summary.trimmed += isinstance(example, Chat) and example.trimmed > 0
            if not (stops and bad):
                yield row, example


def _file_format(file: str, head: list[Row], wanted: str, summary: SourceSummary) -> str:
    readable = [row.value for row in head if row.problem is None]
    if not readable:
        raise DataError(f"none of the first {len(head)} rows can be read: {head[0].where}: {head[0].problem}")
    if wanted == "auto":
        wanted, seen = formats.detect_file(file, readable)
    else:
        seen = f"`{file}` is read as {wanted}, as the recipe says"
    logger.info("%s", seen)
    summary.seen.append(seen)
    summary.formats[file] = wanted
    return wanted


def _parse(row: Row, expected: str, control: re.Pattern[str]) -> Example:
    if row.problem is not None:
        raise BadRowError(row.problem)
    return formats.parse(row.value, expected, control)


def _listed(bad: list[tuple[Row, str]]) -> list[str]:
    shown = [f"  {row.where}: {reason}" for row, reason in bad[:_LISTED]]
    return shown if len(bad) <= _LISTED else [*shown, f"  ... and {len(bad) - _LISTED} more"]


def _dataset(pieces: list[Tokens]) -> Dataset:
    from datasets import Dataset as ArrowDataset

    lengths = np.array([len(piece.ids) for piece in pieces])
    ids = np.concatenate([piece.ids for piece in pieces])
    trained = np.concatenate([piece.trained for piece in pieces])
    labels = np.where(trained, ids, np.int32(IGNORED))
    return ArrowDataset(list_table({"input_ids": (ids, lengths), "labels": (labels, lengths)}))


def _nothing_left(summary: DataSummary, bad: list[tuple[Row, str]]) -> DataError:
    reasons = [
        f"{count} {what}"
        for count, what in (
            (summary.bad, "bad"),
            (summary.dropped, f"longer than data.max_length {summary.max_length}"),
            (summary.untrained, "with no trained token within data.max_length"),
        )
        if count
    ]
    return DataError(
        "\n".join([f"no row is left to train on: {summary.read} read, {', '.join(reasons)}", *_listed(bad)]),
        hint="`data.max_length` and `data.too_long` decide on long rows, `data.on_bad_row` on bad ones",
    )
