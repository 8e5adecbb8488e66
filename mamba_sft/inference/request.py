"""What is asked of `generate`, checked before torch is loaded: the file of prompts, the place for answers."""

from __future__ import annotations

from pathlib import Path

from mamba_sft.disk import check_writable
from mamba_sft.errors import DataError, UsageError


def check_files(prompts: Path | None, output: str | Path | None) -> None:
    """Checks the files that `generate` reads and writes.

    Args:
        prompts: The file of prompts, or None where they are no file.
        output: Where answers go, or None where they go to no file.

    Raises:
        DataError: There is no such file of prompts.
        UsageError: Nothing can be written there.
    """
    if prompts is not None and not prompts.exists():
        raise DataError(f"no file `{prompts}`", hint="prompts are JSON Lines, or a .txt with one a line")
    if output is not None and Path(output).is_dir():
        raise UsageError(f"the output `{output}` is a directory", hint="for example `answers.jsonl`")
    if prompts is not None and output is not None and Path(output).exists() and prompts.samefile(output):
        raise UsageError(f"the output `{output}` is the file of prompts", hint="for example `answers.jsonl`")
    if output is not None:
        check_writable(Path(output).parent, UsageError, hint="choose another place for `--output`")
