"""Places that cannot be written to: each is one message, and the trial leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from mamba_sft import disk
from mamba_sft.disk import check_writable, disk_errors_explained, error_number, require_space
from mamba_sft.errors import MergeError, TrainingError


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Makes one function of the system fail."""

    def fail(*arguments: object, **more: object) -> None:
        raise OSError(code, os.strerror(code))

    module, _, function = name.rpartition(".")
    monkeypatch.setattr({"os": os, "tempfile": disk.tempfile}[module], function, fail)


def message(directory: Path) -> str:
    with pytest.raises(TrainingError) as caught:
        check_writable(directory, TrainingError)
    assert caught.value.message.startswith(f"cannot write to `{directory}`: ")
    assert caught.value.hint
    return caught.value.message.partition("`: ")[2]


def everything(root: Path) -> set[Path]:
    return set(root.rglob("*"))


@pytest.mark.parametrize("where", [".", "new", "new/and/deep"])
def test_a_good_place_is_left_as_it_was(tmp_path: Path, where: str) -> None:
    (tmp_path / "kept").write_text("x")
    check_writable(tmp_path / where, TrainingError)
    require_space(tmp_path / where, [1000, 2000], "it takes", TrainingError)
    assert everything(tmp_path) == {tmp_path / "kept"}


def test_what_another_process_wrote_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "new"
    monkeypatch.setattr(disk, "sync", lambda descriptor: (place / "theirs").write_text("x"))
    check_writable(place, TrainingError)
    assert (place / "theirs").read_text() == "x"


def test_something_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    before = everything(tmp_path)
    assert message(tmp_path / "file") == f"`{tmp_path}/file` is a file"
    assert message(tmp_path / "file/a/b") == f"`{tmp_path}/file` is a file"
    assert message(tmp_path / "pipe/a") == f"`{tmp_path}/pipe` is no directory"
    for place in ("link", "link/a"):
        assert (
            message(tmp_path / place)
            == f"`{tmp_path}/link` is a link to `{tmp_path}/gone`, which is not there"
        )
    assert "circle" in message(tmp_path / "circle/a")
    assert "too long" in message(tmp_path / ("x" * 300))
    assert "too long" in message(tmp_path / ("x" * 300) / "a")
    assert "too long" in message(tmp_path.joinpath(*["deep" * 20] * 80))
    assert "null" in message(tmp_path / "a\0b")
    assert everything(tmp_path) == before


def test_a_place_below_a_relative_file_is_named_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("x")
    assert message(Path("runs/mine")) == "`runs` is a file"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_where_nothing_can_be_written_no_free_space_is_spoken_of() -> None:
    for check in (
        lambda: check_writable(Path("/proc/runs/mine"), TrainingError),
        lambda: require_space(Path("/proc/runs/mine"), [1], "it takes", TrainingError),
    ):
        with pytest.raises(TrainingError, match="cannot write to `/proc/runs/mine`") as caught:
            check()
        assert "left" not in caught.value.message


@pytest.mark.parametrize("function", ["os.mkdir", "tempfile.NamedTemporaryFile", "os.fsync"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no permission"),
        (errno.EPERM, "not permitted"),
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit"),
        (errno.EIO, "fails"),
        (errno.ENOENT, "mounted"),
        (errno.ESTALE, "tale file handle"),
    ],
)
def test_each_refusal_has_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int, words: str
) -> None:
    refuse(monkeypatch, function, code)
    assert words in message(tmp_path / "new")
    monkeypatch.undo()
    assert not everything(tmp_path)


def test_a_disk_that_cannot_be_waited_for_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "os.fsync", errno.EINVAL)
    check_writable(tmp_path, TrainingError)


def test_no_inodes_is_said_though_bytes_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    few = os.statvfs_result((*real[:5], 1000, 900, 100, *real[8:]))
    monkeypatch.setattr(os, "statvfs", lambda path: few)
    with pytest.raises(TrainingError, match="inodes"):
        require_space(tmp_path / "new", [1], "it takes", TrainingError)
    refuse(monkeypatch, "tempfile.NamedTemporaryFile", errno.ENOSPC)
    assert "inodes" in message(tmp_path / "new")
    unbounded = os.statvfs_result((*real[:5], 0, 0, 0, *real[8:]))
    monkeypatch.undo()
    monkeypatch.setattr(os, "statvfs", lambda path: unbounded)
    require_space(tmp_path / "new", [1], "it takes", TrainingError)


def test_too_little_room_names_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=70_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    require_space(tmp_path / "a/b", [2_000_000], "it takes", TrainingError)
    with pytest.raises(TrainingError, match=r"it takes 68\.8 MiB; `.*` has 66\.8 MiB left"):
        require_space(tmp_path / "a/b", [2_000_000, 3_000_000], "it takes", TrainingError)


def test_a_limit_on_a_file_counts_each_file(tmp_path: Path) -> None:
    """A limit of the shell, which `df` knows nothing of; in a process of its own, because it stays."""
    code = (
        "import resource; from pathlib import Path; from mamba_sft import disk\n"
        "from mamba_sft.errors import TrainingError\n"
        "disk._SPARE = 1\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))\n"
        f"place = Path({str(tmp_path)!r})\n"
        "disk.require_space(place, [1 << 20] * 3, 'it takes', TrainingError)\n"
        "try:\n    disk.require_space(place, [1 << 21], 'it takes', TrainingError)\n"
        "except TrainingError as error: print(error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("this file system cannot take room beforehand")
    assert "it takes 2.00 MiB" in done.stdout
    assert "ulimit -f" in done.stdout
    assert not everything(tmp_path)


def test_real_disks(small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    place = small_disk("size=8m,nr_inodes=1000")
    monkeypatch.setattr(disk, "_SPARE", 0)
    require_space(place / "a", [4 << 20], "it takes", TrainingError)
    with pytest.raises(TrainingError, match=r"has 8\.00 MiB left"):
        require_space(place / "a", [9 << 20], "it takes", TrainingError)
    (place / "large").write_bytes(bytes(8 << 20))
    assert "full (0 bytes left)" in message(place / "a")
    (place / "large").unlink()
    for number in range(998):
        (place / str(number)).touch()
    assert "inodes" in message(place / "a/b")
    (place / "0").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    assert "read-only" in message(place / "a")
    assert "read-only" in message(place)


def test_errors_of_every_library_are_known(tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    """What each of them raises on a disk that is really full."""
    place = small_disk("size=64k")
    (place / "filler").write_bytes(bytes(60 << 10))
    tensors = {"x": torch.zeros(100_000)}
    words = Tokenizer(BPE({f"{number:05}": number for number in range(20_000)}, []))
    writers: list[Callable[[], object]] = [
        lambda: save_file(tensors, place / "a"),
        lambda: words.save(str(place / "b")),
        lambda: torch.save(tensors, place / "c"),
        lambda: (place / "d").write_bytes(bytes(100_000)),
    ]
    for write in writers:
        with pytest.raises(MergeError) as caught, disk_errors_explained(place, "it does not fit", MergeError):
            write()
        assert error_number(caught.value.__cause__ or caught.value) in (errno.ENOSPC, errno.EIO)


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    for error in (ValueError("no"), RuntimeError("shapes"), OSError("no such tokenizer"), MergeError("no")):
        assert error_number(error) is None
        with pytest.raises(type(error)) as caught, disk_errors_explained(tmp_path, "it", TrainingError):
            raise error
        assert caught.value is error


def test_a_file_that_cannot_be_read_is_not_called_the_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    for name, words in (
        ("base/shard", "base/shard`: "),
        ("output-of-another/x", "output-of-another/x`: "),
        ("out.partial/x", "cannot write to `.*out`: "),
        ("out/x", "cannot write to `.*out`: "),
        ("out", "cannot write to `.*out`: "),
    ):
        error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / name))
        with (
            pytest.raises(MergeError, match=words + "this user has no permission"),
            disk_errors_explained(output, "it", MergeError),
        ):
            raise error


def test_a_file_that_is_not_there_to_be_read_is_no_place_to_write(tmp_path: Path) -> None:
    with (
        pytest.raises(MergeError, match=r"base/shard`: it is not there$"),
        disk_errors_explained(tmp_path / "out", "it", MergeError),
    ):
        (tmp_path / "base" / "shard").open("rb")
