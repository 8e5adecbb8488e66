"""Rows from local files, globs and hub datasets, each with where it came from.

Reading never judges what a row means; it only says which rows could not be read.
"""

from __future__ import annotations

import glob
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_sft.data.readers import KINDS, READERS, TEXT_READERS, without_nulls
from mamba_sft.errors import DataError
from mamba_sft.json_lines import TOO_DEEP, Row, is_too_deep, python_command, python_text
from mamba_sft.model.checkpoint import is_hub_id
from mamba_sft.model.checksums import file_checksum
from mamba_sft.other_files import fetching, other_file
from mamba_sft.packed_files import CANNOT_READ, PACKED, is_packed, kind_of_file, open_bytes
from mamba_sft.recipe.builtin import find_path, own_data
from mamba_sft.recipe.globs import matching
from mamba_sft.wording import printable

if TYPE_CHECKING:
    from mamba_sft.recipe.fields import SourceSection

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_BATCH = 1000
_SAVED = ("dataset_dict.json", "state.json")
"""What tells a directory that `save_to_disk` wrote."""
_UNPACKED = {
    ".zip": "unzip {path}",
    ".7z": "7z x {path}",
    ".tar": "tar -xf {path}",
    ".tgz": "tar -xf {path}",
}
"""Archives, and the command that makes one of our files of them."""
_REWRITTEN = {
    ".xlsx": 'import pandas; pandas.read_excel({path}).to_csv("data.csv", index=False)',
    ".pkl": 'import pandas; pandas.read_pickle({path}).to_parquet("data.parquet")',
    ".feather": 'import pandas; pandas.read_feather({path}).to_parquet("data.parquet")',
    ".arrow": 'import datasets; datasets.Dataset.from_file({path}).to_json("data.jsonl")',
}
"""Other kinds of files, and the line of Python that does the same."""
_OF_THE_HUB = "a data set of the hub is `owner/name`"


def read_source(source: SourceSection) -> Iterator[Row]:
    """Yields the rows of a source, at most `source.limit`: files sorted by name, rows as they stand.

    Raises:
        DataError: Nothing is there, it is no kind of file we read, it is damaged as a whole, or it is empty.
    """
    return islice(chain.from_iterable(_not_empty(name, rows) for name, rows in _open(source)), source.limit)


def check_source(source: SourceSection) -> None:
    """Checks that a source is there, and that its files are of a kind that is read, without reading rows.

    Of a data set on the hub nothing is asked.

    Raises:
        DataError: Nothing is there, or something that is no data.
    """
    for place in _places(source) or []:
        if place.is_dir():
            _check_kinds(place)
        else:
            _reader_of(source, place)


def identity(source: SourceSection) -> dict[str, str]:
    """Returns what tells one content of a source from another: digests of its files, or the hub's commit.

    Raises:
        DataError: Nothing is there.
    """
    places = _places(source)
    if places is None:
        return {source.path: _hub_commit(source)}
    inside = (sorted(place.rglob("*")) if place.is_dir() else [place] for place in places)
    files = [path for path in chain.from_iterable(inside) if path.is_file()]
    try:
        return {str(path): file_checksum(path) for path in files}
    except OSError as error:
        raise DataError(f"cannot read `{error.filename}`: {error.strerror or error}") from error


def _hub_commit(source: SourceSection) -> str:
    from datasets import load_dataset_builder

    with _hub_errors(source.path):
        return str(load_dataset_builder(source.path, source.name).hash)


def is_hub_dataset(path: str) -> bool:
    """Returns whether a source's path means a data set on the hub, and no file, directory or glob here."""
    found = find_path(path)
    return is_hub_id(path) and kind_of_file(found) not in KINDS and not found.exists()


def _open(source: SourceSection) -> Iterator[tuple[str, Iterator[Row]]]:
    places = _places(source)
    if places is None:
        yield source.path, _read_hub(source, source.path)
    for place in places or []:
        yield str(place), _read_directory(source, place) if place.is_dir() else _read_file(source, place)


def _places(source: SourceSection) -> list[Path] | None:
    """The files, or the one directory, that a source's path means here; None for a data set on the hub."""
    found = find_path(source.path)
    if glob.has_magic(source.path) and not found.exists():
        return _matches(source.path, found)
    if found.is_file() or found.is_dir():
        return [found]
    if is_hub_dataset(source.path) and "/" in source.path and _close_to(found) is None:
        return None  # the hub would be asked for a misspelt name too, half a minute where it is out of reach
    raise _missing(source.path, found)


def _read_directory(source: SourceSection, path: Path) -> Iterator[Row]:
    _check_kinds(path)
    for file in sorted(path.rglob("*.arrow")) if not _is_saved(path) else ():
        _check_arrow(file)
    return _read_hub(source, str(path))


def _check_kinds(path: Path) -> None:
    """Refuses a directory of files of several kinds, of which `datasets` would read one."""
    if _is_saved(path):
        return
    kinds = Counter(kind_of_file(file) for file in path.rglob("*") if kind_of_file(file) in KINDS)
    if len(kinds) > 1:
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        globs = " or ".join(f"`{path}/**/*{kind}`" for kind in sorted(kinds))
        raise DataError(
            f"`{path}` holds files of several kinds: {found}", hint=f"name those you mean: {globs}"
        )


def _check_arrow(path: Path) -> None:
    """Refuses an Arrow file with a wrong offset: `datasets` maps it, and reading it ends the process."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            try:
                table = pa.ipc.open_stream(file).read_all()
            except pa.ArrowInvalid:
                table = pa.ipc.open_file(file).read_all()
            table.validate(full=True)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DataError(f"`{path}` is not a readable Arrow file: {error}") from error


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in _SAVED)


def _matches(pattern: str, found: Path) -> list[Path]:
    paths = sorted(path for path in matching(found) if path.is_file())
    if not paths:
        raise DataError(
            f"no file matches `{pattern}`",
            hint="globs start from the working directory; `**` crosses directories",
        )
    for path in paths:
        _refuse_unwritable_name(path)
    return paths


def _in_bash(path: Path) -> str:
    """A path as bash and zsh take it, whatever its bytes are."""
    plain = {byte for byte in range(32, 127) if chr(byte) not in "'\\"}
    return "$'" + "".join(chr(x) if x in plain else f"\\x{x:02x}" for x in os.fsencode(path)) + "'"


def _refuse_unwritable_name(path: Path) -> None:
    """Every row says which file it is from, in files that are UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the name of `{printable(str(path))}` is not UTF-8",
            hint=f"rename it: `mv {_in_bash(path)} {shlex.quote(str(path.with_stem('renamed')))}`",
        ) from None


def _missing(name: str, path: Path) -> DataError:
    """What is said of a source that is not there.

    Args:
        name: As the recipe has it: `Path` makes one slash of two.
        path: Where it would be.
    """
    if "://" in name:
        web = name.startswith(("http://", "https://"))
        hint = f"fetch it first: {fetching(name)}" if web else f"copy it here first; {_OF_THE_HUB}"
        return DataError(f"`{name}` is an address, not a file", hint=hint)
    if path.is_symlink():
        return DataError(f"no file `{path}`: it is a link to `{path.readlink()}`, which leads nowhere")
    if not path.parent.is_dir():
        return DataError(f"no file `{path}`: there is no directory `{path.parent}`")
    if close := _close_to(path):
        return DataError(f"no file `{path}`", hint=f"did you mean `{close}`? ({_OF_THE_HUB})")
    names = [entry.name for entry in path.parent.iterdir()]
    readable = sorted(name for name in names if kind_of_file(Path(name)) in KINDS)[:8]
    listing = (
        f"`{path.parent}` has {', '.join(readable)}" if readable else "paths start from the working directory"
    )
    return DataError(f"no file `{path}`", hint=f"{listing}; {_OF_THE_HUB}")


def _close_to(path: Path) -> Path | None:
    """What lies beside a place where nothing is and has nearly its name."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    return path.with_name(close[0]) if close else None


def _not_empty(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise DataError(f"`{name}` holds no rows")
    yield first
    yield from rows


def _read_file(source: SourceSection, path: Path) -> Iterator[Row]:
    reader = _reader_of(source, path)
    with _damage_told(path):
        yield from reader(path)


def _reader_of(source: SourceSection, path: Path) -> Callable[[Path], Iterator[Row]]:
    """What reads a file, once it is known to be of a kind that is read and the source's fields fit it."""
    kind = kind_of_file(path)
    reader = TEXT_READERS[source.sample_by] if kind == ".txt" else READERS.get(kind)
    if reader is None:
        raise _unknown_kind(path)
    _refuse_idle_fields(source, path)
    if other := other_file(path):
        raise DataError(f"`{path}` is {other.what}", hint=other.hint)
    with _damage_told(path):
        if kind != ".parquet":
            _refuse_utf16(path)
    return reader


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except CANNOT_READ as error:
        hint = "it is damaged, or a download that broke off: fetch it again" if is_packed(path) else None
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read `{path}`: {reason}", hint=hint) from error


def _refuse_idle_fields(source: SourceSection, path: Path) -> None:
    """Refuses fields of a source that mean nothing for a file."""
    idle = [
        f"{name}: {value}"
        for name, value, is_idle in (
            ("split", source.split, source.split != "train"),
            ("name", source.name, source.name is not None),
            ("stream", "true", source.stream),
        )
        if is_idle
    ]
    if idle:
        raise DataError(
            f"`{path}` is a file, for which `{'` and `'.join(idle)}` means nothing",
            hint="leave that out: it is for data sets of the hub; behind a recipe that names one, write"
            f" `{own_data(path)}`",
        )
    if source.sample_by != "paragraph" and kind_of_file(path) != ".txt":
        raise DataError(
            f"`sample_by: {source.sample_by}` is for txt files, and `{path}` is none",
            hint="leave it out, or give the txt files a source of their own",
        )


def _refuse_utf16(path: Path) -> None:
    """Refuses UTF-16, with a mark at its start or not: every other byte of its Latin letters is zero."""
    with open_bytes(path) as file:
        start = file.read(4096)
    if start.startswith(_UTF16_MARKS):
        coding = "UTF-16"
    elif start[:2].count(0) == 1:
        coding = "UTF-16BE" if start[0] == 0 else "UTF-16LE"
    else:
        return
    hint = f"iconv -f {coding} -t UTF-8 {shlex.quote(str(path))} > converted{kind_of_file(path)}"
    raise DataError(f"`{path}` is UTF-16", hint=f"unpack it, then {hint}" if is_packed(path) else hint)


def _unknown_kind(path: Path) -> DataError:
    hint = f"data files end in {', '.join(KINDS)}, and all but parquet may be packed: {', '.join(PACKED)}"
    for kind in (kind_of_file(path), path.suffix.lower()):
        if kind in _UNPACKED:
            hint = _UNPACKED[kind].format(path=shlex.quote(str(path)))
        if kind in _REWRITTEN:
            hint = python_command(_REWRITTEN[kind].format(path=python_text(path)))
    return DataError(f"cannot read `{path}`", hint=hint)


def _read_hub(source: SourceSection, path: str) -> Iterator[Row]:
    from datasets import load_dataset

    with _hub_errors(path):
        if _is_saved(Path(path)):
            dataset = _load_saved(path, source.split)
        elif (directory := Path(path)).is_dir() and not any(directory.rglob("*.*")):
            raise DataError(
                f"`{path}` is a directory without data files", hint=f"data files end in {', '.join(KINDS)}"
            )
        else:
            dataset = load_dataset(path, source.name, split=source.split, streaming=source.stream)
    for number, value in enumerate(_values(path, dataset), start=1):
        where = f"{path} ({source.split}): row {number}"
        if is_too_deep(value):
            yield Row(path, where, f"a row of {', '.join(value)}", TOO_DEEP)
        else:
            yield Row(path, where, without_nulls(value))


def _values(path: str, dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data set; files that are damaged, or hold what Python cannot, are found on the way."""
    with _hub_errors(path):
        for batch in dataset.iter(_BATCH):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


def _load_saved(path: str, split: str) -> Any:
    """A directory that `save_to_disk` wrote: one data set, or one for each split."""
    from datasets import Dataset, load_from_disk

    saved = load_from_disk(path)
    if not isinstance(saved, Dataset):
        if split not in saved:
            raise DataError(f"`{path}` has no split `{split}`", hint=f"`split` is one of {', '.join(saved)}")
        saved = saved[split]
    saved.data.validate(full=True)  # it is mapped: one wrong offset, and reading it ends the process
    return saved


@contextmanager
def _hub_errors(path: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # datasets, huggingface_hub, fsspec and httpx each raise their own kinds
        cause = error.__cause__ or error  # "an error occurred while generating the dataset" says nothing
        raise DataError(
            f"cannot load the dataset `{path}`: {type(cause).__name__}: {str(cause).strip()}",
            hint="`path` is a hub id, a file or a glob; `name` picks a configuration, `split` a split; "
            "private datasets need `hf auth login`",
        ) from error
