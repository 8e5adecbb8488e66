"""A merge or an export whose output cannot be written to is refused before a weight is read."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_sft import disk
from mamba_sft.errors import ExportError, LockedError, MambaSFTError, MergeError, UsageError
from mamba_sft.exporting.export_run import export
from mamba_sft.merging.merge_run import merge
from mamba_sft.model.tensor_files import StoredTensors
from tests.merging.test_merge_run import Made, make_run

VERBS: dict[str, tuple[Callable[..., Any], type[MambaSFTError]]] = {
    "merge": (lambda run, place: merge(run, output=place), MergeError),
    "gguf": (lambda run, place: export(run, quantization="Q8_0", output=place), ExportError),
    "adapter": (lambda run, place: export(run, adapter_only=True, output=place), ExportError),
    "hf": (lambda run, place: export(run, format="hf", output=place), ExportError),
}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_run(tmp_path)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoredTensors, "blocks", lambda *_: pytest.fail("a weight was read"))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_in_the_way(made: Made, tmp_path: Path, verb: str) -> None:
    call, kind = VERBS[verb]
    (tmp_path / "file").write_text("x")
    before = set(tmp_path.rglob("*"))
    for place, words in (("file", "is a file"), ("file/a/b", "is a file"), ("n" * 300, "too long")):
        with pytest.raises((kind, UsageError, LockedError), match=words):
            call(made.run, tmp_path / place)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENOSPC])
def test_what_is_refused(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    code: int,
) -> None:
    call, kind = VERBS[verb]

    def refuse(*arguments: object, **more: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(disk.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(kind, match="cannot write to"):
        call(made.run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
