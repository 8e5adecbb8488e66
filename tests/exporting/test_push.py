"""Pushing to a hub on this machine: what is sent, what not twice, and every way in which it is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.errors import ExportError, UsageError
from mamba_sft.exporting.export_run import export
from mamba_sft.exporting.hub import hub_errors
from mamba_sft.exporting.request import GGUFOptions, HubOptions
from tests.exporting.local_hub import LocalHub, Repository, local_hub
from tests.merging.test_merge_run import Made, make_run

WRONG = "hf_WrongWrongWrongWrong"
TO_ME = HubOptions(push_to_hub="me/model")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub that the token of this machine can write to."""
    with local_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_run(tmp_path)


def push_checkpoint(made: Made, options: HubOptions = TO_ME) -> Any:
    return export(made.run, format="hf", options=options).pushed


def test_all_of_a_checkpoint_is_in_the_repository_the_card_first(made: Made, hub: LocalHub) -> None:
    pushed = push_checkpoint(made)
    written = {path.name: path.read_bytes() for path in (made.run.export / "hf").iterdir()}
    there = hub.repositories["me/model"]
    assert {name: data for name, data in there.files.items() if name != ".gitattributes"} == written
    assert pushed.sent[0] == "README.md"
    assert sorted(pushed.sent) == sorted(written)
    assert pushed.kept == pushed.removed == []
    assert pushed.url == f"{hub.url}/me/model"
    assert not there.private
    assert hub.uploaded > 0  # some came as large files


def test_nothing_is_sent_twice(made: Made, hub: LocalHub) -> None:
    push_checkpoint(made)
    uploaded, commits = hub.uploaded, hub.commits
    again = push_checkpoint(made)
    assert again.sent == []
    assert "model.safetensors.index.json" in again.kept
    assert (hub.uploaded, hub.commits) == (uploaded, commits)
    (made.run.adapter / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    assert push_checkpoint(made).sent == ["chat_template.jinja"]


def test_a_push_that_breaks_off_goes_on(made: Made, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.exporting.hub.push._SMALL", 20_000)
    hub.break_after = 2
    with pytest.raises(
        ExportError, match=r"`.*hf` was exported, but not all of it pushed to `me/model`: .*500"
    ):
        push_checkpoint(made)
    first = {name for name in hub.repositories["me/model"].files if name != ".gitattributes"}
    assert "README.md" in first  # so that it is known again
    uploaded = hub.uploaded
    hub.break_after = None
    pushed = push_checkpoint(made)
    assert set(pushed.kept) == first
    assert set(pushed.sent).isdisjoint(first)
    sizes = {path.name: path.stat().st_size for path in (made.run.export / "hf").iterdir()}
    large = sum(size for name, size in sizes.items() if size >= 20_000)
    assert hub.uploaded == large > uploaded  # what came before the break was not sent again


def test_weights_of_an_earlier_checkpoint_are_taken_away(made: Made, hub: LocalHub) -> None:
    push_checkpoint(made)
    files = hub.repositories["me/model"].files
    files |= {"model.safetensors": b"would be loaded", "notes.md": b"mine", "run.Q8_0.gguf": b"kept"}
    assert push_checkpoint(made).removed == ["model.safetensors"]
    assert {"notes.md", "run.Q8_0.gguf"} <= files.keys()


def test_gguf_files_go_with_a_card_that_says_how_to_run_them(made: Made, hub: LocalHub) -> None:
    pytest.importorskip("xllamacpp")
    options = GGUFOptions(verify=False, hub=TO_ME)
    done = export(made.run, format="ollama", quantization="Q8_0", options=options)
    assert done.pushed is not None
    assert sorted(done.pushed.sent) == ["Modelfile", "README.md", "run.Q8_0.gguf"]
    files = hub.repositories["me/model"].files
    card = files["README.md"].decode()
    assert "llama-server -hf me/model --hf-file run.Q8_0.gguf" in card
    assert "library_name: gguf" in card
    assert "from_pretrained" not in card  # there is no checkpoint in it
    assert not (made.run.export / "README.md").exists()
    push_checkpoint(made)
    card = files["README.md"].decode()
    assert 'from_pretrained("me/model"' in card
    assert "--hf-file run.Q8_0.gguf" in card
    export(made.run, quantization="Q4_0", options=options)
    card = files["README.md"].decode()
    assert 'from_pretrained("me/model"' in card  # the checkpoint is still in it


def test_gguf_files_that_are_made_and_not_pushed_are_said_to_be_there(made: Made, hub: LocalHub) -> None:
    pytest.importorskip("xllamacpp")

    def break_off(stage: str, done: int, total: int) -> None:
        hub.refuse = {"GET /api/models/me/model": 403}

    with pytest.raises(ExportError, match=r"`.*export` was exported, but not all of it pushed to `me/model`"):
        export(
            made.run,
            quantization="Q8_0",
            options=GGUFOptions(verify=False, hub=TO_ME),
            progress=break_off,
        )
    assert (made.run.export / "run.Q8_0.gguf").is_file()


def test_private_is_private_and_a_public_one_is_not_pushed_to_as_private(made: Made, hub: LocalHub) -> None:
    push_checkpoint(made, HubOptions(push_to_hub="me/secret", private=True))
    assert hub.repositories["me/secret"].private
    hub.repositories["me/secret"].private = False
    with pytest.raises(UsageError, match="is public: `--private` would not change that"):
        push_checkpoint(made, HubOptions(push_to_hub="me/secret", private=True))
    with pytest.raises(UsageError, match="`--private` is of a push"):
        export(made.run, format="hf", options=HubOptions(private=True))


def test_the_file_of_a_login_is_a_token_too(
    made: Made, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UsageError, match="not logged in"):
        push_checkpoint(made)
    (tmp_path / "token").write_text(hub.token + "\n")
    assert push_checkpoint(made).sent


Case = tuple[dict[str, Any], str]
REFUSALS: dict[str, Case] = {
    "wrong token": ({"token": "hf_AnotherAnotherAnother"}, "the hub does not take the token"),
    "reads only": ({"role": "read"}, "may read and not write"),
    "reads only, finely": (
        {"role": "fineGrained", "permissions": ["repo.content.read"]},
        "may read and not write",
    ),
    "of another": ({"name": "you", "orgs": []}, "`me/model` is not yours: the token is of `you`"),
    "down": ({"refuse": {"GET /api/models": 503}}, "the hub answers 503"),
    "too often": ({"refuse": {"GET /api/whoami": 429}}, "wants fewer requests"),
    "not ours": (
        {"repositories": {"me/model": Repository(files={"config.json": b"{}"})}},
        "is there already, and no earlier export",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_refuses_is_said_before_anything_is_written(
    made: Made, hub: LocalHub, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http._DEFAULT_RETRY_ON_STATUS_CODES", ())
    state, message = REFUSALS[case]
    for name, value in state.items():
        setattr(hub, name, value)
    with pytest.raises((UsageError, ExportError), match=message) as caught:
        push_checkpoint(made)
    assert not made.run.export.exists()
    assert not any(request.startswith(("POST /api/models", "PUT")) for request in hub.asked)
    assert_silent(caught.value, os.environ["HF_TOKEN"])


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ("POST /api/repos/create", 403, "does not let this token write there"),
        ("POST /api/models/me/model/commit", 403, "does not let this token write there"),
        ("POST /api/models/me/model/commit", 413, "finds it too large"),
        ("PUT /upload", 400, "answers 400"),
        ("POST /api/repos/create", 401, "does not take the token"),
    ],
)
def test_what_is_refused_later_leaves_the_export_and_no_token(
    made: Made, hub: LocalHub, request_: str, status: int, message: str
) -> None:
    hub.refuse = {request_: status}
    with pytest.raises(
        ExportError, match=f"was exported, but not all of it pushed to `me/model`.*{message}"
    ) as e:
        push_checkpoint(made)
    assert (made.run.export / "hf" / "README.md").is_file()
    assert_silent(e.value, hub.token)


def assert_silent(error: BaseException, token: str) -> None:
    """The token is in no message, neither of the error nor of one that a traceback would show."""
    shown = error
    assert token not in str(shown)
    assert token not in str(getattr(shown, "hint", ""))
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


def test_of_a_fine_grained_token_the_hub_decides_whose_the_name_is(made: Made, hub: LocalHub) -> None:
    hub.role = "fineGrained"
    assert push_checkpoint(made, HubOptions(push_to_hub="elsewhere/model")).sent


def test_an_organisation_of_the_owner_is_pushed_to(made: Made, hub: LocalHub) -> None:
    push_checkpoint(made, HubOptions(push_to_hub="team/model"))
    assert "team/model" in hub.repositories


def test_the_command_line_says_what_was_sent(made: Made, hub: LocalHub) -> None:
    arguments = ["export", str(made.run.path), "--format", "hf", "--push", "me/model"]
    first = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert first.exit_code == 0
    assert "sent: README.md, " in first.stderr
    assert first.stdout.splitlines()[-1] == f"{hub.url}/me/model"
    second = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(second.stdout)["pushed"]["sent"] == []
    assert hub.token not in first.output + second.output


WITHOUT_TORCH = """
import sys
from mamba_sft.cli.app import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""


def command(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, which ends with a traceback if it loads torch."""
    settings = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        env=settings | {"HF_HOME": str(tmp_path / "hf-home")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_offline_is_one_line_and_torch_is_not_loaded_for_it(made: Made, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        arguments = ["export", str(made.run.path), "--format", "hf", "--push-to-hub", "me/model"]
        done = command(tmp_path, *arguments, HF_ENDPOINT=url, HF_TOKEN=WRONG)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "the hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert WRONG not in done.stderr
    assert len(done.stderr.splitlines()) <= 3, done.stderr


def test_a_model_of_another_kind_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = command(tmp_path, "export", str(tmp_path), "--format", "hf", "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "is a `llama` model" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_kind_of_error_that_nobody_knows_is_told_without_its_secrets(hub: LocalHub) -> None:
    with (
        pytest.raises(ExportError, match=r"`me/model`: KeyError: 'Bearer \*\*\*'"),
        hub_errors.hub_errors_explained("me/model", hub.token),
    ):
        raise KeyError(f"Bearer {hub.token}")
