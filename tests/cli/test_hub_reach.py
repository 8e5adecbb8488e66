"""A hub that is out of reach is asked once, for seconds, and not by every data set of a run again."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.error import URLError

import pytest

from mamba_sft.cli import hub_reach
from mamba_sft.cli.hub_reach import ENDPOINT, OFFLINE, may_name_the_hub
from mamba_sft.recipe.recipe import Recipe

ASK = (
    "import os; from mamba_sft.cli.hub_reach import use_cache_if_unreachable as ask; ask(); "
    f"print(os.environ.get({OFFLINE!r}))"
)


def offline_after_asking(**environment: str) -> tuple[str, str]:
    """What a process of its own has settled, and what it said."""
    plain = {
        name: value for name, value in os.environ.items() if name != OFFLINE and "proxy" not in name.lower()
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=plain | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


@pytest.fixture
def closed_port() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listened to
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def refusing_hub() -> Iterator[str]:
    class Refuse(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(503)

        def log_message(self, *words: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_where_nobody_answers_the_cache_is_used_and_that_is_said(closed_port: str) -> None:
    settled, said = offline_after_asking(**{ENDPOINT: closed_port})
    assert settled == "1"
    assert "the hub cannot be reached" in said
    unknown, _ = offline_after_asking(**{ENDPOINT: "http://no-such-host.invalid"})
    assert unknown == "1"


def test_a_hub_that_answers_anything_is_there(refusing_hub: str) -> None:
    assert offline_after_asking(**{ENDPOINT: refusing_hub}) == ("None", "")


def test_what_the_user_says_and_proxies_of_the_libraries_are_left_alone(closed_port: str) -> None:
    assert offline_after_asking(**{ENDPOINT: closed_port, OFFLINE: "0"}) == ("0", "")
    assert offline_after_asking(**{ENDPOINT: closed_port, "ALL_PROXY": "socks5://localhost:1"}) == (
        "None",
        "",
    )
    assert offline_after_asking(**{ENDPOINT: "no address"}) == ("None", "")
    no_port = offline_after_asking(**{ENDPOINT: "http://localhost:port"})  # http.client has a kind of its own
    assert no_port == ("None", "")


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EHOSTUNREACH])
def test_a_machine_without_a_route_is_out_of_reach_too(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_route(*arguments: object, **more: object) -> None:
        raise URLError(OSError(number, os.strerror(number)))

    monkeypatch.setattr(hub_reach, "urlopen", no_route)
    assert not hub_reach._answers()


def test_which_names_can_be_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats").mkdir()
    assert may_name_the_hub(["a.jsonl", "HuggingFaceH4/ultrachat_200k"])
    assert not may_name_the_hub(["data/quickstart.jsonl", "data/*"]), "comes with the package"
    assert not may_name_the_hub(["chats.jsonl", "data/chats", "./a/b", "/a/b", "~/b", "a/b/c", "quickstart"])
    (tmp_path / "data" / "b.jsonl").touch()
    assert not may_name_the_hub(["data/*.jsonl"])
    assert may_name_the_hub(["data/*.csv"])


def test_what_the_package_brings_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty directory `data/quickstart.jsonl` could be a data set's name, and is the package's file."""
    monkeypatch.chdir(tmp_path)
    loaded = Recipe.load("quickstart")
    assert not may_name_the_hub(source.path for source in loaded.data.sources)
