"""What became of the rows: counts, lengths and warnings, for the terminal, `--json` and the run summary."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_sft.data.notes import Notes

if TYPE_CHECKING:
    from mamba_sft.data.rows import RowIndex

FITS_NO_CHAT = (
    "no row goes through the chat template, so chat, generate, the answers to `eval.prompts` and Ollama will"
    " not fit what is learned; `format: prompt_completion` under `data.sources` makes turns of prompts and"
    " completions"
)


@dataclass
class SourceSummary:
    """One source. `train_rows` counts the rows of an epoch: without validation rows, times the weight."""

    path: str
    weight: float = 1.0
    read: int = 0
    bad: int = 0
    kept: int = 0
    digest: str = ""
    """Of the rows that were kept, from `digests.RowsDigest`."""
    train_rows: int = 0
    trimmed: int = 0
    """Chats that lost turns at their end, after the last assistant turn."""
    notes: Notes = field(default_factory=Notes)
    """What else was done with rows, and the keys that nothing reads."""
    formats: dict[str, str] = field(default_factory=dict)
    """File -> the format its rows were read as."""
    seen: list[str] = field(default_factory=list)
    """For each file, what was looked at and what it was taken for."""


@dataclass
class DataSummary:
    """All sources together. Token counts are of one epoch; the first token of a row is never trained."""

    max_length: int | None = None
    sources: list[SourceSummary] = field(default_factory=list)
    dropped: int = 0
    """Rows left out because they are longer than `max_length` (`too_long: drop`)."""
    truncated: int = 0
    split: int = 0
    """Rows cut into pieces (`too_long: split`), and how many pieces with a trained token that gave."""
    pieces: int = 0
    untrained: int = 0
    """Rows left out because no trained token is in them, or none before `max_length`."""
    duplicates: int = 0
    """Rows that are the same, token for token, as an earlier one."""
    validation_duplicates: int = 0
    """Of these, those left out of training because their like is a validation row."""
    train_rows: int = 0
    validation_rows: int = 0
    train_tokens: int = 0
    trained_tokens: int = 0
    validation_tokens: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), compare=False)
    """Tokens of each training row, (n,)."""

    @property
    def read(self) -> int:
        """Rows read."""
        return sum(source.read for source in self.sources)

    @property
    def bad(self) -> int:
        """Rows that cannot be trained on."""
        return sum(source.bad for source in self.sources)

    @property
    def trimmed(self) -> int:
        """Chats that lost turns at their end, after the last assistant turn."""
        return sum(source.trimmed for source in self.sources)

    @property
    def notes(self) -> Notes:
        """What else was done with rows, and the keys that nothing reads."""
        notes = Notes()
        for source in self.sources:
            notes.add(source.notes)
        return notes

    @property
    def fits_no_chat(self) -> bool:
        """Whether nothing that is trained goes through the chat template."""
        return self.notes.fits_no_chat

    @property
    def trained_share(self) -> float:
        """Trained tokens per training token."""
        return self.trained_tokens / max(1, self.train_tokens)

    def count_tokens(self, index: RowIndex, train: np.ndarray, validation: np.ndarray) -> None:
        """Counts the final rows, given as numbers of pieces."""
        self.lengths = index.length[train]
        self.train_rows, self.validation_rows = len(train), len(validation)
        self.train_tokens = int(self.lengths.sum())
        self.trained_tokens = int(index.trained[train].sum())
        self.validation_tokens = int(index.length[validation].sum())

    def warnings(self) -> list[str]:
        """What a reader should look at before training, most costly first."""
        kept = max(1, self.read - self.bad)
        notes = self.notes
        found = [FITS_NO_CHAT] if notes.fits_no_chat else []
        if self.bad:
            found.append(f"{self.bad} of {self.read} rows are bad and left out")
        if self.untrained:
            found.append(
                f"{self.untrained} rows are left out: no trained token within {self.max_length} tokens"
            )
        if self.dropped:
            found.append(f"{self.dropped} rows are left out: longer than {self.max_length} tokens")
        if self.truncated > kept / 20:
            found.append(
                f"{self.truncated} rows ({self.truncated / kept:.0%}) lose their end, and with it their stop"
                " token; raise data.max_length or use data.too_long=split"
            )
        if self.trimmed:
            found.append(f"{self.trimmed} chats lose their last turns: no assistant turn follows them")
        found += notes.sentences()
        for source in self.sources:
            found += [
                f"`columns` of `{source.path}` names `{column}`, which no row has"
                for column in source.notes.never_found()
            ]
        if self.duplicates > kept / 2:
            found.append(f"{self.duplicates} rows repeat another row word for word, more than half of them")
        if not self.validation_rows:
            found.append("no validation rows: overfitting will not show")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single lengths, as JSON can hold it."""
        content = {name: value for name, value in vars(self).items() if name != "lengths"}
        return content | {
            "sources": [asdict(source) for source in self.sources],
            "read": self.read,
            "bad": self.bad,
            "trimmed": self.trimmed,
            "fits_no_chat": self.fits_no_chat,
            "notes": asdict(self.notes),
            "trained_share": self.trained_share,
            "longest": int(self.lengths.max(initial=0)),
            "warnings": self.warnings(),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> DataSummary:
        """Returns the summary that `to_dict` wrote; the single lengths are not in it."""
        stored = {one.name: content[one.name] for one in fields(cls) if one.name != "lengths"}
        sources = [
            SourceSummary(**source | {"notes": Notes(**source["notes"])}) for source in content["sources"]
        ]
        return cls(**stored | {"sources": sources})
