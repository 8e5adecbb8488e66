"""Training data: rows in, `input_ids` and `labels` out, and a summary of what happened on the way.

Rows are read (`sources`), recognised (`formats`), rendered and tokenized (`tokenizing`), cut to the longest
length and written to disk (`rows`) in batches; then they are split into training and validation rows,
weighted (`selecting`) and packed (`packing`), which moves no token. All of it is done once and kept
(`cache`). A source of weight w gives w times its training rows to each epoch: below 1 a fixed random share of
them, above 1 copies and a share of one more.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_sft.data import formats
from mamba_sft.data.bad_rows import BadRows
from mamba_sft.data.cache import key_of, made_once
from mamba_sft.data.chats import Chat, LeftOut
from mamba_sft.data.digests import RowsDigest
from mamba_sft.data.json_files import from_latin
from mamba_sft.data.mixing import Pieces
from mamba_sft.data.notes import NOT_CHOSEN, WEIGHT_ZERO
from mamba_sft.data.packing import Packed, open_packed, write_bins
from mamba_sft.data.rows import RowIndex, RowWriter, open_rows, row_lengths
from mamba_sft.data.selecting import cut_row, take_validation, weighted
from mamba_sft.data.sources import identity, read_source
from mamba_sft.data.summary import DataSummary, SourceSummary
from mamba_sft.data.tokenizing import Example, Renderer, Tokens
from mamba_sft.data.values import BadRowError
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

FORMAT = 4
"""Version of what is kept: raised when the same recipe and files would give other rows."""
_ANNOUNCED = 50_000
"""Rows after which a long read says that it is alive."""
ROWS, SUMMARY, REJECTED = "rows.arrow", "summary.json", "rejected.jsonl"


@dataclass
class PreparedData:
    """What a run trains and validates on; its tokens lie on disk and are mapped.

    Args:
        train: Columns `input_ids` and `labels` (-100 where a token is not trained), lists of int32, `length`,
            and `where` each row came from, e.g. `chats.jsonl:12`.
        validation: The same, or None.
        train_rows: The training rows as the trainer takes them: packed where `data.packing` is on.
        validation_rows: The same of the validation rows, or None.
        pieces: What is known of the training rows without reading them, to mix them by.
        summary: What became of the rows.
        rejected: The bad rows that `on_bad_row: skip` left out, as JSON Lines with their reasons, or None.
        path: Where all this is kept.
    """

    train: Dataset
    validation: Dataset | None
    train_rows: Dataset
    validation_rows: Dataset | None
    pieces: Pieces
    summary: DataSummary
    rejected: Path | None
    path: Path

    @property
    def packing(self) -> Packed | None:
        """What packing made of the training rows; None where rows are not packed."""
        limit = self.summary.max_length
        if limit is None or self.train_rows is self.train:
            return None
        return Packed.of(len(self.train_rows), limit, int(row_lengths(self.train_rows).sum()))


def read_corpus(recipe: Recipe) -> tuple[TemplateSetup, PreparedData]:
    """Returns the recipe's tokenizer, ready to chat, and its rows as tokens.

    Args:
        recipe: Names the base, the template and the data.

    Raises:
        MambaSFTError: The base, its tokenizer, the template or the data cannot be used.
    """
    setup = load_setup(recipe.model, recipe.chat)
    data = prepare_data(recipe.data, setup, system=recipe.chat.system, seed=recipe.seed)
    return setup, data


def prepare_data(data: DataSection, setup: TemplateSetup, *, system: str | None, seed: int) -> PreparedData:
    """Reads, renders and splits the rows of all sources, or finds them done.

    Args:
        data: The recipe's `data` section.
        setup: The tokenizer with its chat template.
        system: System message of chats that have none.
        seed: Decides the validation rows, the shares that weights take, and which rows are packed together.

    Raises:
        DataError: A source cannot be read, rows are bad and `on_bad_row` is `stop`, the template's marks are
            unfit for the mask, or no row is left.
    """
    key = key_of(_what_decides(data, setup, system, seed))
    new = False

    def make(directory: Path) -> Mapping[str, Any]:
        nonlocal new
        new = True
        return _prepare(directory, data, Renderer(setup, system, data.assistant_only_loss), seed)

    packed = data.packing and data.max_length is not None
    prepared = _open(made_once(key, make), packed=packed, mixed=data.mixture is not None)
    if not new:
        for seen in chain.from_iterable(source.seen for source in prepared.summary.sources):
            logger.info("%s", seen)
    return prepared


def _what_decides(data: DataSection, setup: TemplateSetup, system: str | None, seed: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "files": [identity(source) for source in data.sources],
        "data": data.model_dump(mode="json"),
        "system": system,
        "seed": seed,
        "setup": setup.identity(),
    }


def _prepare(directory: Path, data: DataSection, renderer: Renderer, seed: int) -> Mapping[str, Any]:
    """Fills an entry of the cache."""
    summary = DataSummary(max_length=data.max_length)
    with RowWriter(directory / ROWS) as writer, BadRows(directory / REJECTED, data.on_bad_row) as bad:
        for number, section in enumerate(data.sources):
            _read(number, section, data, renderer, summary, writer, bad)
    bad.stop(summary.read)
    index = writer.index
    if not len(index.source):
        raise _nothing_left(summary, bad)
    train, validation = _select(index, data, seed, summary)
    rows = open_rows(directory / ROWS)
    for name, pieces in (("train", train), ("validation", validation)):
        np.save(directory / f"{name}.npy", pieces)
        np.save(directory / f"{name}-facts.npy", _facts(index, pieces))
        mixed = name == "train" and data.mixture is not None  # packed for each run, see `planning.mixture`
        if data.packing and data.max_length is not None and len(pieces) and not mixed:
            write_bins(directory / f"{name}-packed.arrow", rows.select(pieces), data.max_length, seed)
    summary.count_tokens(index, train, validation)
    write_atomically(directory / SUMMARY, json.dumps(summary.to_dict()) + "\n")
    return {
        "sources": [section.path for section in data.sources],
        "rows": summary.train_rows,
        "tokens": summary.train_tokens,
    }


def _facts(index: RowIndex, pieces: np.ndarray) -> np.ndarray:
    """(n, 2) float64: source and difficulty of the row that each of these pieces is of."""
    row = np.searchsorted(index.pieces, pieces, side="right") - 1
    return np.stack([index.source[row], index.difficulty[row]], axis=1)


def _open(directory: Path, *, packed: bool, mixed: bool) -> PreparedData:
    rows = open_rows(directory / ROWS)
    pieces = {name: np.load(directory / f"{name}.npy") for name in ("train", "validation")}
    single = {name: rows.select(chosen) if len(chosen) else None for name, chosen in pieces.items()}
    trained = {
        name: open_packed(directory / f"{name}-packed.arrow", dataset)
        if packed and dataset and not (mixed and name == "train")
        else dataset
        for name, dataset in single.items()
    }
    summary = DataSummary.from_dict(json.loads((directory / SUMMARY).read_text(encoding="utf-8")))
    summary.lengths = row_lengths(single["train"])
    rejected = directory / REJECTED
    facts = np.load(directory / "train-facts.npy")
    return PreparedData(
        train=single["train"],
        validation=single["validation"],
        train_rows=trained["train"],
        validation_rows=trained["validation"],
        pieces=Pieces(facts[:, 0].astype(np.int64), summary.lengths, facts[:, 1]),
        summary=summary,
        rejected=rejected if rejected.is_file() else None,
        path=directory,
    )


def _select(
    index: RowIndex, data: DataSection, seed: int, summary: DataSummary
) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of an epoch and those to validate on."""
    rows, held_out = take_validation(index, data.validation, np.random.default_rng(seed), summary)
    epoch = []
    for number, section in enumerate(data.sources):
        own = rows[index.source[rows] == number]
        if data.mixture is None:
            own = weighted(own, section.weight, (seed, number))
        summary.sources[number].train_rows = len(own)
        epoch.append(own)
    return index.pieces_of(np.concatenate(epoch)), index.pieces_of(held_out)


def _read(
    number: int,
    section: SourceSection,
    data: DataSection,
    renderer: Renderer,
    summary: DataSummary,
    writer: RowWriter,
    bad: BadRows,
) -> None:
    source, digest = SourceSummary(section.path, section.weight), RowsDigest()
    summary.sources.append(source)
    bad_before = bad.count
    difficulties: dict[str, float] = {}
    for rendered in renderer.render(_examples(section, renderer, source, bad, difficulties)):
        if not isinstance(rendered, Tokens):
            bad.add(*rendered)
        elif pieces := cut_row(rendered, data, summary):
            writer.add(number, pieces, difficulties.pop(rendered.where, math.nan))
            digest.add(pieces)
            source.kept += 1
    source.bad = bad.count - bad_before
    source.digest = digest.text()


def _examples(
    section: SourceSection,
    renderer: Renderer,
    summary: SourceSummary,
    bad: BadRows,
    difficulties: dict[str, float],
) -> Iterator[tuple[Row, Example]]:
    """Yields the good rows of a source as examples; adds the others to `bad`.

    Where the source names a column of difficulty, what is in it goes into `difficulties`, by the row's
    origin. Once a row is bad and the run is to stop there is nothing to render: the rest is only counted.
    """
    reading = formats.Reading.of(section, renderer.setup)
    for file, rows in groupby(read_source(section), key=lambda row: row.file):
        head = list(islice(rows, formats.LOOKED_AT))
        expected = _file_format(file, head, section.format, reading, summary)
        for row in chain(head, rows):
            summary.read += 1
            if summary.read % _ANNOUNCED == 0:
                logger.info("`%s`: %s rows read", section.path, f"{summary.read:,}")
            try:
                example = _parse(row, expected, reading)
            except BadRowError as error:
                bad.add(row, str(error))
                continue
            summary.notes.add(example.notes)
            summary.trimmed += isinstance(example, Chat) and example.trimmed > 0
            if not (isinstance(example, LeftOut) or bad.stops):
                if (column := section.columns.get("difficulty")) is not None:
                    difficulties[row.where] = formats.difficulty_of(row.value, column)
                yield row, example


def _how_to_read(row: Row) -> str | None:
    """What mends a file of which no row can be read."""
    path, problem = Path(row.file), str(row.problem)
    if problem.startswith("not UTF-8") and "iconv" not in problem:
        return from_latin(path)
    if problem.startswith("not JSON") and path.suffix == ".jsonl" and str(row.value)[:1] not in '{["':
        text = path.with_suffix(".txt")
        return f"if its lines are texts: mv {shlex.quote(row.file)} {shlex.quote(str(text))}"
    return None


def _file_format(
    file: str, head: list[Row], wanted: str, reading: formats.Reading, summary: SourceSummary
) -> str:
    readable = [row.value for row in head if row.problem is None]
    if not readable:
        raise DataError(
            f"none of the first {len(head)} rows can be read: {head[0].where}: {head[0].problem}",
            hint=_how_to_read(head[0]),
        )
    formats.refuse_preference_file(file, readable, reading)
    if wanted == "auto":
        wanted, seen = formats.detect_file(file, readable, reading)
    else:
        seen = f"`{file}` is read as {wanted}, as the recipe says"
    logger.info("%s", seen)
    summary.seen.append(seen)
    summary.formats[file] = wanted
    return wanted


def _parse(row: Row, expected: str, reading: formats.Reading) -> Example | LeftOut:
    if row.problem is not None:
        raise BadRowError(row.problem)
    return formats.parse(row.value, expected, reading)


def _nothing_left(summary: DataSummary, bad: BadRows) -> DataError:
    reasons = [
        f"{count} {what}"
        for count, what in (
            (summary.bad, "bad"),
            (summary.notes.counts.get(WEIGHT_ZERO), "left out for a weight of 0"),
            (summary.notes.counts.get(NOT_CHOSEN), "left out because the answer was rejected"),
            (summary.dropped, f"longer than data.max_length {summary.max_length}"),
            (summary.untrained, "with no trained token within data.max_length"),
        )
        if count
    ]
    return DataError(
        "\n".join([f"no row is left to train on: {summary.read} read, {', '.join(reasons)}", *bad.listed()]),
        hint="`data.max_length` and `data.too_long` decide on long rows, `data.on_bad_row` on bad ones",
    )
