"""What an evaluation is asked to do, besides the model: everything that a score depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mamba_sft.errors import UsageError

Template = Literal["auto", "on", "off"]
MathMetric = Literal["original", "verify"]
MAX_LENGTH = 2048
"""What the leaderboard read at most, as far as can be told: the real tokenizer gives no other number."""


@dataclass(frozen=True)
class Settings:
    """How a model is scored.

    Args:
        chat_template: Whether prompts are put into the chat template; `auto`: as the suite's leaderboard did.
        max_length: Tokens of prompt and answer together; a longer prompt loses its beginning.
        batch_size: Requests at a time; changes no score.
        limit: Documents of each task; None: all. With a limit nothing is comparable.
        math_metric: `original` compares answers as the published card did, `verify` as Math-Verify does.
        data_dir: A directory with data sets as `owner/name` below it, for machines without the hub.
        include_path: A directory with the user's own task files.
        samples: Whether what was asked and answered is kept too.
        rows: What `heldout` and `instructions` read instead of their own: a file, or a source of the recipe.

    Raises:
        UsageError: A word that means nothing here, or a number below 1.
    """

    chat_template: Template = "auto"
    max_length: int = MAX_LENGTH
    batch_size: int = 8
    limit: int | None = None
    math_metric: MathMetric = "original"
    data_dir: Path | None = None
    include_path: Path | None = None
    samples: bool = False
    rows: str | None = None

    def __post_init__(self) -> None:
        refuse_unknown("--chat-template", self.chat_template, get_args(Template))
        refuse_unknown("--math-metric", self.math_metric, get_args(MathMetric))
        for name in ("max_length", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`--{name.replace('_', '-')} {value}` is not 1 or more")

    def facts(self) -> dict[str, Any]:
        """Returns what scores depend on, JSON-safe; the size of a batch and places of files are no part."""
        return {
            "max_length": self.max_length,
            "limit": self.limit,
            "math_metric": self.math_metric,
        }


def refuse_unknown(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a word that an option does not have.

    Raises:
        UsageError: It is none of the choices.
    """
    if value not in choices:
        raise UsageError(f"`{option} {value}`: there is {', '.join(f'`{one}`' for one in choices)}")
