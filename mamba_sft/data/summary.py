"""What became of the rows: counts, lengths and warnings, for the terminal, `--json` and the run summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mamba_sft.data.tokenizing import Tokens


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
    lengths: list[int] = field(default_factory=list)
    """Tokens of each training row."""

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
    def trained_share(self) -> float:
        """Trained tokens per training token."""
        return self.trained_tokens / max(1, self.train_tokens)

    def count_tokens(self, train: Sequence[Tokens], validation: Sequence[Tokens]) -> None:
        """Counts the final rows."""
        self.lengths = [len(row.ids) for row in train]
        self.train_rows, self.validation_rows = len(train), len(validation)
        self.train_tokens = sum(self.lengths)
        self.trained_tokens = sum(int(row.trained.sum()) for row in train)
        self.validation_tokens = sum(len(row.ids) for row in validation)

    def warnings(self) -> list[str]:
        """What a reader should look at before training, most costly first."""
        kept = max(1, self.read - self.bad)
        found = []
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
        if self.duplicates > kept / 2:
            found.append(f"{self.duplicates} rows repeat another row word for word, more than half of them")
        if not self.validation_rows:
            found.append("no validation rows: overfitting will not show")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single lengths, as JSON can hold it."""
        content = asdict(self) | {
            "read": self.read,
            "bad": self.bad,
            "trimmed": self.trimmed,
            "trained_share": self.trained_share,
            "longest": max(self.lengths, default=0),
            "warnings": self.warnings(),
        }
        del content["lengths"]
        return content
