"""What a run ran on."""

from __future__ import annotations

import json

from mamba_sft.planning.environment import describe_environment, package_versions


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
