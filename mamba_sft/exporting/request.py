"""What is asked of an export and what it answers, whatever the format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_sft.disk import check_writable, is_file_name
from mamba_sft.errors import ExportError, UsageError
from mamba_sft.run import check_output
from mamba_sft.showing import Showing

if TYPE_CHECKING:
    from mamba_sft.exporting.full_model import FullModel
    from mamba_sft.run import Run

_LONGEST = 200
"""Bytes of a name, so that the quantization and the ending still go behind it."""
Progress = Callable[[str, int, int], None]
"""Called with the stage, how much of it is done, and its total."""


@dataclass(frozen=True)
class HubOptions:
    """How what is exported is described and published.

    Example: `export("runs/quickstart", format="hf", options=HubOptions(push_to_hub="you/model"))`.

    Args:
        languages: Codes of the languages it speaks, for the model card.
        push_to_hub: A repository to push to, `owner/name`, or None.
        private: Whether a repository that is made for it is private.
    """

    languages: tuple[str, ...] = ("en",)
    push_to_hub: str | None = None
    private: bool = False


@dataclass(frozen=True)
class GGUFOptions:
    """How GGUF files are made.

    Example: `export("runs/quickstart", quantization="Q2_K", options=GGUFOptions(imatrix=True))`.

    Args:
        fix_epsilon: Scale `ssm_x` so that llama.cpp's norms of dt, B and C are the model's; see
            `gguf/tensors.py`.
        verify: Load every file through llama.cpp and hold it against the model.
        imatrix: Weigh rounding errors by an importance matrix.
        imatrix_tokens: How much text the matrix is made from.
        hub: How they are described and published.
    """

    fix_epsilon: bool = True
    verify: bool = True
    imatrix: bool = False
    imatrix_tokens: int = 4096
    hub: HubOptions = HubOptions()


@dataclass(frozen=True)
class ExportRequest:
    """What was asked for.

    Args:
        run: A run, its directory, or the directory of a checkpoint.
        quantization: GGUF methods by name; empty for the default.
        output: Where to, or None for the run's `export/`.
        name: What the files are called, or None for the run's name.
        progress: Told how far it is.
        gguf: How GGUF files are made.
        hub: How what is exported is described and published.

    Raises:
        UsageError: `name` is no name of a file.
    """

    run: Run | str | Path
    quantization: Sequence[str]
    output: str | Path | None
    name: str | None
    progress: Progress
    gguf: GGUFOptions = GGUFOptions()
    hub: HubOptions = HubOptions()

    def __post_init__(self) -> None:
        if self.name is not None and not (is_file_name(self.name) and len(self.name.encode()) <= _LONGEST):
            raise UsageError(
                f"`--name {self.name:.100}` cannot be what the files are called",
                hint=f"a name has no slash or colon, and {_LONGEST} bytes at most; `--output` says where to",
            )


@dataclass(frozen=True)
class Quality:
    """What was measured of a file.

    Args:
        kl: Mean Kullback-Leibler divergence of the next token, model to file, in nats.
        top1: Share of positions where both find the same token likeliest.
        tokens: Positions measured.
        probes: Strings that both tokenizers cut alike.
        answer: What the file answers to `prompt`, likeliest token first.
        answer_tokens: Its length.
        same_tokens: How many of them, from the first on, the model itself would have written.
    """

    kl: float
    top1: float
    tokens: int
    probes: int
    answer: str
    answer_tokens: int
    same_tokens: int


@dataclass(frozen=True)
class GGUFFile:
    """One file, planned or written.

    Args:
        path: Its final name.
        method: How it is stored.
        nbytes: Its size.
        quality: What was measured, or None.
    """

    path: Path
    method: str
    nbytes: int
    quality: Quality | None = None


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Args:
        url: The address of the repository.
        sent: The files that were sent, by name.
        kept: Those that were there already.
        removed: Weights of an earlier export that were taken away.
    """

    url: str
    sent: list[str]
    kept: list[str]
    removed: list[str]


@dataclass(frozen=True)
class Exported(Showing):
    """What an export wrote.

    Args:
        directory: Where to.
        files: The GGUF files, with what was measured of them.
        others: Everything else: Modelfiles, the checkpoint's directory.
        pushed: What was pushed, or None.
    """

    directory: Path
    files: list[GGUFFile] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    pushed: Pushed | None = None

    @property
    def url(self) -> str | None:
        """Where it was pushed to, or None."""
        return self.pushed.url if self.pushed is not None else None

    @property
    def paths(self) -> list[Path]:
        """All of it."""
        return [*(file.path for file in self.files), *self.others]


def output_of(model: FullModel, output: str | Path | None) -> Path:
    """Returns where a model is exported to: what was asked for, or the run's `export/`.

    Raises:
        UsageError: Neither is there, or it is what would be exported.
        ExportError: It cannot be written to.
    """
    if output is None and model.run is None:
        raise UsageError("where to? a checkpoint outside a run has no `export/`", hint="give `--output`")
    place = model.run.export if output is None and model.run is not None else Path(str(output))
    check_output(place, model.sources, "exported")
    check_writable(place, ExportError)
    return place
