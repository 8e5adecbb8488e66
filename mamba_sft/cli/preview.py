"""Training data as a reader sees it: rows as coloured tokens, lengths as a histogram, counts as tables.

Everything here returns a rich renderable; nothing prints. Colour is never the only sign: trained text also
stands between brackets, so that it reads the same under `NO_COLOR`, in a pipe, or to a colour-blind eye.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mamba_sft.cli.lines import WarningList, WholeLine
from mamba_sft.cli.printable import printable
from mamba_sft.data.packing import Packed
from mamba_sft.data.preparing import PreparedData
from mamba_sft.data.rows import IGNORED
from mamba_sft.data.shown import length_histogram, shown_rows, shown_tokens
from mamba_sft.data.summary import DataSummary
from mamba_sft.evaluation.run_figures import stage_text
from mamba_sft.planning.extent import RunLength
from mamba_sft.wording import count_text

TRAINED = ("black on #9fd6ad", "black on #cfeccb")
"""Two shades in turn, so that the borders between tokens show."""
TRAINED_SPECIAL = "bold black on #f4c95d"
PLAIN = ""
SPECIAL = "bold magenta"
OPENING, CLOSING = "⟦", "⟧"
BAR = "cyan"

_SHOWN_TOKENS = 600
_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def overview(
    data: PreparedData,
    tokenizer: Any,
    *,
    rows: int = 3,
    packing: Packed | None = None,
    length: RunLength | None = None,
    mixture: dict[str, Any] | None = None,
) -> RenderableType:
    """The whole picture: a few training rows, spread over the data, the lengths, the counts, and warnings.

    Args:
        data: Prepared rows.
        tokenizer: The one that made them.
        rows: How many rows to show.
        packing: From `packed`, where rows are packed.
        length: What the rows come to.
        mixture: From `Mixture.to_dict`, where sources are mixed.
    """
    count = min(rows, len(data.train))
    chosen = [i * len(data.train) // max(1, count) for i in range(count)]
    shown = [row_panel(tokenizer, data.train[i]) for i in chosen]
    parts: list[RenderableType] = [legend(), "", *shown, ""] if shown else []
    return Group(*parts, histogram(data.summary), statistics(data.summary, packing, length, mixture))


def legend() -> Text:
    """What the colours and brackets of `row_panel` mean."""
    text = Text("  ")
    for index, word in enumerate(("trained", " tokens")):
        text.append((OPENING if index == 0 else "") + word, TRAINED[index])
    text.append("<|stop|>" + CLOSING, TRAINED_SPECIAL).append("  not trained  ", PLAIN)
    text.append("<|special|>", SPECIAL).append("  · space  ↵ newline  → tab", "dim")
    return text


def row_panel(tokenizer: Any, row: dict[str, Any]) -> RenderableType:
    """A row as tokens, under where it came from and its counts."""
    length, trained = len(row["labels"]), sum(label != IGNORED for label in row["labels"])
    counts = f"{length:,} tokens, {trained:,} trained ({trained / length:.0%})"
    panel = Panel(
        token_text(tokenizer, row["input_ids"], row["labels"]),
        title=Text(counts, "not dim"),
        title_align="left",
        border_style="dim",
    )
    return Group(WholeLine(Text(printable(row["where"]), "bold")), panel)


def token_text(
    tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int], limit: int = _SHOWN_TOKENS
) -> Text:
    """Tokens in the styles of `legend`, with visible white space.

    Args:
        tokenizer: Decodes the ids.
        input_ids: (L,)
        labels: (L,) -100 where a token is not trained.
        limit: Tokens shown; of a longer row the middle is left out.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces: list[tuple[str, str]] = []
    shade, inside = 0, False
    for ids, trained in shown_tokens(tokenizer, input_ids, labels, limit):
        if trained != inside:
            pieces.append((OPENING if trained else CLOSING, "bold"))
            inside = trained
        if not ids:
            pieces.append((f"… {len(input_ids) - limit:,} tokens …", "dim italic"))
            continue
        shade = 1 - shade
        kinds = (TRAINED_SPECIAL, TRAINED[shade]) if trained else (SPECIAL, PLAIN)
        pieces.append((tokenizer.decode(ids), kinds[ids[0] not in special]))
    if inside:
        pieces.append((CLOSING, "bold"))
    return _visible(pieces)


def _visible(pieces: Sequence[tuple[str, str]]) -> Text:
    """(text, style) pairs in a row, white space and control characters made visible.

    A space becomes a dot, unless it is alone between two words: there lines may break.
    """
    whole, text = "".join(piece for piece, _ in pieces), Text()
    start = 0
    for piece, style in pieces:
        shown = ""
        for index, character in enumerate(piece, start):
            if character == " ":
                alone = _is_word(whole[index - 1 : index]) and _is_word(whole[index + 1 : index + 2])
                shown += " " if alone else "·"
            elif character in "\n\t":
                shown += "↵\n" if character == "\n" else "→"
            else:
                shown += printable(character)
        text.append(shown, style)
        start += len(piece)
    text.rstrip()
    return text


def _is_word(character: str) -> bool:
    return bool(character.strip()) and character not in (OPENING, CLOSING)


def histogram(summary: DataSummary) -> RenderableType:
    """Lengths of the training rows in tokens, a bar for each of about ten ranges."""
    found = length_histogram(summary.lengths)
    if not found:
        return Text("no rows")
    width, counts = found["width"], found["counts"]
    table = Table.grid(padding=(0, 1))
    for justify in ("right", "left", "right", "right"):
        table.add_column(justify=justify)  # type: ignore[arg-type]
    for index, count in enumerate(counts):
        span = f"{index * width + 1:,} to {(index + 1) * width:,}"
        share = f"{count / sum(counts):.1%}"
        table.add_row(span, Text(_bar(count / max(counts)), BAR), f"{count:,}", share)
    middle, high, longest = (found[name] for name in ("median", "percentile_95", "longest"))
    note = f"median {middle:,}, 95% at most {high:,}, longest {longest:,}"
    if summary.max_length:
        note += f", limit {summary.max_length:,}"
    return Group(_heading("row lengths in tokens", note), Padding(table, (0, 0, 1, 2)))


def _bar(share: float) -> str:
    eighths = max(round(share * _BAR_WIDTH * 8), int(share > 0))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def statistics(
    summary: DataSummary,
    packing: Packed | None = None,
    length: RunLength | None = None,
    mixture: dict[str, Any] | None = None,
) -> RenderableType:
    """Sources, totals, and what deserves a look before training."""
    parts: list[RenderableType] = [_heading("sources"), _sources(summary, mixed=mixture is not None)]
    if mixture is None:
        parts += [_heading("training data"), _totals(summary, packing, length)]
    else:  # which packs each stage to a length of its own
        parts += [_heading("stages"), _stages(mixture)]
        parts += [_heading("training data"), _totals(summary, None, length)]
    warnings = [*summary.warnings(), *(length.warnings() if length else [])]
    if warnings:
        parts += [_heading("worth a look"), WarningList(warnings, indent=2)]
    return Group(*parts)


def _stages(mixture: dict[str, Any]) -> RenderableType:
    """What each stage reads, and how often each source is read in all."""
    lines = [f"{number}  {stage_text(stage)}" for number, stage in enumerate(mixture["stages"], 1)]
    passes = ", ".join(f"{name} {count:g} times" for name, count in mixture["passes"].items())
    return Padding(Text("\n".join([*lines, f"read in all: {passes}"])), (0, 0, 1, 2))


def _sources(summary: DataSummary, *, mixed: bool) -> RenderableType:
    """Each source under its name, which has a line of its own: no table is wide enough for every path."""
    lines: list[RenderableType] = []
    for source in summary.sources:
        lines.append(WholeLine(source.path, indent=2))
        bad = (f"{source.bad:,} bad", "bold red" if source.bad else "")
        before = f"{', '.join(sorted(set(source.formats.values())))}: {source.read:,} read, "
        rows = "to train on" if mixed else "rows an epoch"
        after = f", {source.kept:,} kept, weight {source.weight:g}: {source.train_rows:,} {rows}"
        lines.append(Padding(Text.assemble(before, bad, after), (0, 0, 0, 4)))
    return Group(*lines, "")  # no padding around it all, which would cut the names


def _totals(summary: DataSummary, packing: Packed | None, length: RunLength | None) -> RenderableType:
    trained = f"{summary.trained_tokens:,}  ({summary.trained_share:.1%} of the tokens)"
    lines = [
        ("rows", f"{summary.train_rows:,} to train on, {summary.validation_rows:,} to validate on"),
        ("tokens an epoch", f"{summary.train_tokens:,}"),
        ("trained tokens", trained),
    ]
    if summary.duplicates:
        lines.append(("repeated rows", f"{summary.duplicates:,}, word for word as another row"))
    if packing:
        rows = f"{packing.rows:,} of {packing.max_length:,} tokens, {packing.fill:.1%} full"
        lines.append(("packed rows", f"{summary.train_rows:,} rows packed into {rows}"))
    if length:
        lines.append(("steps", f"{length.steps:,}, of {length.tokens_per_step:,.0f} tokens in the mean"))
        lines.append(("in a step", _a_step(length, "packed row" if packing else "row")))
    cut = [
        (summary.dropped, "left out"),
        (summary.truncated, "truncated"),
        (summary.split, f"split into {summary.pieces:,} pieces"),
    ]
    if summary.max_length:
        done = ", ".join(f"{count:,} {what}" for count, what in cut if count) or "none"
        lines.append((f"longer than {summary.max_length:,}", done))
    table = Table.grid(padding=(0, 2))
    for name, value in lines:
        table.add_row(Text(name, "dim"), value)
    return Padding(table, (0, 0, 1, 2))


def _a_step(length: RunLength, row: str) -> str:
    """What an optimizer step reads."""
    if length.ramp is not None:
        return f"{length.ramp[0]:,} to {count_text(length.ramp[1], row)}, by train.batch_ramp"
    batches = count_text(length.accumulation, "micro-batch", "es")
    chosen = "; gradient_accumulation_steps is left out" if length.chosen else ""
    return f"{batches} of {count_text(length.batch_size, row)}{chosen}"


def _heading(title: str, note: str = "") -> Text:
    return Text.assemble((title, "bold"), (f"  {note}" if note else "", "dim"))


def to_dict(
    data: PreparedData,
    tokenizer: Any,
    *,
    rows: int = 3,
    packing: Packed | None = None,
    length: RunLength | None = None,
    mixture: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The same picture for `--json`: the summary, and rows with their text and what of it is trained."""
    content = data.summary.to_dict() | {"rows": shown_rows(data, tokenizer, rows)}
    if packing:
        content["packed"] = packing.to_dict()
    if mixture:
        content["mixture"] = mixture
    if length:
        content["length"] = length.to_dict()
        content["warnings"] += length.warnings()
    return content
