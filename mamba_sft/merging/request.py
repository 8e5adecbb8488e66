"""What is asked of a merge, checked before torch is loaded: the run, its adapter, the dtype, the target."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from mamba_sft.errors import MergeError, UsageError
from mamba_sft.model.base_facts import BaseFacts
from mamba_sft.recipe.other_tools import meant
from mamba_sft.run import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Run
from mamba_sft.wording import shown

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Number formats of a merged model, and what safetensors calls them."""
ONTO = ("base", "dequantized")


@dataclass(frozen=True)
class MergeRequest:
    """A merge that was asked for, of a run that has an adapter.

    Args:
        run: A finished run.
        output: Where the merged model goes.
        dtype: One of `DTYPE_NAMES`, or None to keep every tensor's own.
        onto: One of `ONTO`.
    """

    run: Run
    output: Path
    dtype: str | None
    onto: str


def check_request(
    run: Run | str | Path, *, output: str | Path | None = None, dtype: str | None = None, onto: str = "base"
) -> MergeRequest:
    """Checks what can be told from names and small files.

    Args:
        run: A run or its directory.
        output: Where to; None for the run's `merged/`.
        dtype: As `MergeRequest` has it.
        onto: As `MergeRequest` has it.

    Raises:
        UsageError: There is no such run, dtype or target, or the run has nothing to merge.
        MergeError: The run has no adapter.
        AdapterError: The adapter does not say what its base is.
    """
    run = Run.open(run)
    if run.model.is_dir():
        place = shlex.quote(str(run.path))
        raise UsageError(
            f"`{run.path}` has nothing to merge: it trained all weights, and `{run.model}` is the model",
            hint=f"take it as it is: `mamba-sft chat {place}`, or `mamba-sft export {place}`",
        )
    if dtype is not None and dtype not in DTYPE_NAMES:
        close = meant(dtype, list(DTYPE_NAMES))
        question = f"; did you mean `{close}`?" if close else ""
        raise UsageError(
            f"no such dtype `{shown(dtype)}`{question}", hint=f"give one of {', '.join(DTYPE_NAMES)}"
        )
    if onto not in ONTO:
        raise UsageError(f"merge onto what? `{onto}` is neither `base` nor `dequantized`")
    check_adapter_files(run.adapter)
    if onto == "dequantized" and BaseFacts.read(run.adapter).quantization == "none":
        raise UsageError(
            "this run's base was not quantized, so there are no dequantized weights to merge onto",
            hint="leave `--onto` out",
        )
    return MergeRequest(run, Path(output) if output is not None else run.merged, dtype, onto)


def check_adapter_files(path: Path) -> None:
    """Checks that a directory has the two files that are an adapter.

    Raises:
        MergeError: One is missing.
    """
    run = Run(path.parent)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            raise MergeError(
                f"no adapter in `{path}`: it has no `{name}`",
                hint=f"training writes it when it ends; a stopped run goes on with `{run.resume_command}`, "
                f"or ends where it is with `{run.resume_command} --finish`",
            )
