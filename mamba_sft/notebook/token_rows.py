"""Training data as a notebook shows it: rows as tokens, what of them is trained, counts, lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mamba_sft.data.preparing import PreparedData, read_corpus
from mamba_sft.data.rows import IGNORED
from mamba_sft.data.shown import length_histogram, shown_tokens
from mamba_sft.evaluation import run_figures as figures
from mamba_sft.notebook.markup import Bars, Block, Markup, Pairs, Table, Text, View, clean, plain
from mamba_sft.planning.settling import settle
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.showing import Showing

_SHOWN_TOKENS = 400


@dataclass(frozen=True)
class Preview(Showing):
    """What a recipe trains on.

    Args:
        data: The prepared rows, as a run takes them.
        tokenizer: The one that made them.
        rows: How many rows it shows.
        facts: What the rows came to, as a run keeps it in `data.json`.
    """

    data: PreparedData
    tokenizer: Any
    rows: int
    facts: dict[str, Any]

    def __repr__(self) -> str:
        return f"Preview({self.data.summary.train_rows:,} rows to train on)"

    def view(self) -> View:
        """Rows, counts, lengths, and what deserves a look."""
        blocks: list[Block] = [Text(warning, "note") for warning in figures.data_warnings(self.facts)]
        blocks += self._shown_rows()
        titles = ["source", "format", "read", "bad", "kept", "weight", "rows an epoch"]
        blocks += [Table(titles, list(figures.data_sources(self.facts)))]
        blocks += [Pairs(list(figures.data_facts(self.facts))), *self._lengths()]
        return View("what is trained on", blocks)

    def _shown_rows(self) -> Iterator[Block]:
        train = self.data.train
        count = min(self.rows, len(train))
        if count:
            legend = '<span class="t0">trained</span> <span class="ts">trained, special</span> not trained'
            yield Markup(f'<div>{legend} <span class="s">special</span></div>', "  [trained] not trained")
        for number in range(count):
            row = train[number * len(train) // count]
            trained = sum(label != IGNORED for label in row["labels"])
            length = len(row["labels"])
            yield Text(
                f"{row['where']}: {length:,} tokens, {trained:,} trained ({trained / length:.0%})", "heading"
            )
            yield self._tokens(row)

    def _tokens(self, row: dict[str, Any]) -> Markup:
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        html, words, inside, shade = "", "", False, 0
        for ids, trained in shown_tokens(self.tokenizer, row["input_ids"], row["labels"], _SHOWN_TOKENS):
            if trained != inside:
                words += "[" if trained else "]"
                inside = trained
            if not ids:
                html, words = html + '<span class="s"> … </span>', words + " … "
                continue
            shade = 1 - shade
            text = self.tokenizer.decode(ids)
            kind = ("ts" if trained else "s") if ids[0] in special else f"t{shade}" if trained else ""
            html += f'<span class="{kind}">{clean(text)}</span>' if kind else clean(text)
            words += plain(text)
        return Markup(f'<div class="tokens">{html}</div>', words + "]" * inside)

    def _lengths(self) -> Iterator[Block]:
        found = length_histogram(self.data.summary.lengths)
        if not found:
            return
        width, counts = found["width"], found["counts"]
        yield Text("row lengths in tokens", "heading")
        yield Bars(
            [(f"{i * width + 1:,} to {(i + 1) * width:,}", n, f"{n:,}") for i, n in enumerate(counts)],
            max(counts),
        )


def prepared_preview(recipe: Recipe, rows: int) -> Preview:
    """Prepares the rows of a recipe, or finds them done, and returns what there is to see.

    Args:
        recipe: Whose data.
        rows: How many of them to show.

    Raises:
        MambaSFTError: The base, its tokenizer, the template or the data cannot be used.
    """
    setup, data = read_corpus(recipe)
    settled = settle(recipe, data)
    data, length = settled.data, settled.length
    facts = data.summary.to_dict() | {"length": length.to_dict()}
    facts["lengths"] = length_histogram(data.summary.lengths)
    facts["warnings"] = [*facts["warnings"], *length.warnings()]
    if data.packing:
        facts["packed"] = data.packing.to_dict()
    if settled.mixture is not None:
        facts["mixture"] = settled.mixture.to_dict()
    return Preview(data, setup.tokenizer, rows, facts)
