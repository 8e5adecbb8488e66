"""What a run ran on."""

from __future__ import annotations

import json

import pytest

from mamba_sft.planning.environment import (
    describe_call,
    describe_environment,
    describe_processes,
    package_versions,
)
from mamba_sft.processes import LAUNCHED


def test_the_environment_is_json_and_names_what_matters() -> None:
    facts = json.loads(json.dumps(describe_environment()))
    assert facts["packages"]["torch"]
    assert facts["packages"]["mamba-sft"]
    assert facts["device"]["type"] in {"cpu", "cuda"}
    assert facts["device"]["memory_bytes"] > 2**28
    assert facts["device"]["name"]


def test_an_absent_package_is_none() -> None:
    versions = package_versions()
    assert versions.keys() >= {"transformers", "triton"}
    assert all(version is None or version[0].isdigit() for version in versions.values())


def test_how_many_processes_work_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert describe_processes() == {"processes": 1, "nodes": 1, "parallel": None}
    monkeypatch.setenv("WORLD_SIZE", "32")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert describe_processes() == {"processes": 32, "nodes": 4, "parallel": "ddp"}


def test_the_command_of_many_processes_is_what_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCHED, "mamba-sft train r.yaml x=https://me:secret@host/ --processes 2")
    assert describe_call()["command"] == "mamba-sft train r.yaml x=https://***@host/ --processes 2"
