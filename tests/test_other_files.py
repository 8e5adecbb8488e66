"""Files that are not what their names say are told by how they begin."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from pathlib import Path

import pytest

from mamba_sft.other_files import fetching, other_file

PAGE = b"\xef\xbb\xbf \n<!doctype HTML>\n<html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.parametrize(
    ("name", "content", "what", "hint"),
    [
        ("a.jsonl", PAGE, "a web page", "/resolve/"),
        ("a.parquet", b"<html>", "a web page", "/resolve/"),
        ("a.txt", POINTER, "a git-lfs pointer", "git lfs pull"),
        ("a b.jsonl", gzip.compress(b"{}"), "packed", "a b.jsonl.gz'"),
        ("a.csv", bz2.compress(b"{}"), "packed", "a.csv.bz2"),
        ("a.json", lzma.compress(b"{}"), "packed", "a.json.xz"),
        ("a.jsonl", b"PAR1\x15\x04", "a parquet file", "a.parquet"),
        ("a.yaml", b"PK\x03\x04rest", "a zip archive", "unzip "),
    ],
)
def test_what_they_are(name: str, content: bytes, what: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    found = other_file(tmp_path / name)
    assert found is not None
    assert found.what.startswith(what)
    assert hint in found.hint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", PAGE),  # text of any kind
        ("a.jsonl", b'{"text": "<html>"}\n'),
        ("a.jsonl.gz", gzip.compress(b"{}")),
        ("a.parquet", b"PAR1\x15\x04"),
        ("a.csv", b"<htmlish,b\n"),
        ("a.jsonl", b""),
    ],
)
def test_the_rest_is_let_through(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert other_file(tmp_path / name) is None


def test_a_directory_and_nothing_are_for_others_to_tell(tmp_path: Path) -> None:
    assert other_file(tmp_path) is None
    assert other_file(tmp_path / "none") is None


def test_a_pipe_is_not_looked_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")  # which can be read once; a look would wait for a writer
    assert other_file(tmp_path / "pipe.jsonl") is None


def test_an_address_is_quoted() -> None:
    assert fetching("https://x.org/a?b=1&c=2") == "curl -LO 'https://x.org/a?b=1&c=2'"
