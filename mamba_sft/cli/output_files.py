"""Files that verbs write a result into: refused before the work, written whole after it."""

from __future__ import annotations

from pathlib import Path

from mamba_sft.errors import UsageError


def check_output_file(file: Path | None, ending: str, option: str) -> None:
    """Refuses a file that could not be written, before it is worked for.

    Args:
        file: The file, if one is asked for.
        ending: What its name has to end in, such as `.json`.
        option: The option that names it.

    Raises:
        UsageError: It is not named so, or there is no directory for it.
    """
    if file is None:
        return
    if file.suffix.lower() != ending:
        raise UsageError(
            f"`{option}` writes {ending[1:].upper()}, and `{file}` is not named so",
            hint=f"`{option} {file.with_suffix(ending)}`",
        )
    if file.is_dir() or not file.parent.is_dir():
        what = "is a directory" if file.is_dir() else f"has no directory `{file.parent}` to be written into"
        raise UsageError(f"`{option} {file}` {what}", hint="name a file in a directory that is there")


def write_output(text: str, file: Path, option: str) -> None:
    """Writes a file, whole or not at all.

    Raises:
        UsageError: It cannot be written.
    """
    from mamba_sft.run import write_atomically

    try:
        write_atomically(file, text)
    except OSError as error:
        raise UsageError(
            f"cannot write `{file}`: {error.strerror}", hint=f"name another with `{option}`"
        ) from None
