"""What `doctor --why` shows of stock tools, and that it would say so if it were no longer true."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from transformers.models.falcon_mamba import modeling_falcon_mamba as stock
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.diagnostics import stock_tools
from mamba_sft.diagnostics.stock_tools import CLAIMS, Claim, Subjects
from mamba_sft.kernels.falcon_mamba import install


@pytest.fixture
def tried(tiny_model: Any, tiny_tokenizer: Any) -> Subjects:
    tokens = torch.randint(12, 512, (1, 24), generator=torch.Generator().manual_seed(0))
    return Subjects(tiny_model, tiny_tokenizer, tokens)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda one: one.__name__)
def test_each_claim_is_true_of_the_installed_versions(claim: Any, tried: Subjects) -> None:
    found = claim(tried)
    assert (found.shown, found.kept) == (True, True), found
    assert "." not in found.title[-1]


def test_models_without_the_fault_are_not_accused(tried: Subjects) -> None:
    healed = Subjects(install(copy.deepcopy(tried.model)), tried.tokenizer, tried.tokens)
    for claim in (stock_tools.packed_rows_leak, stock_tools.turns_begin_from_nothing):
        assert not claim(healed).shown
    with_template = copy.deepcopy(tried.tokenizer)
    with_template.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with_template.chat_template = "{{ messages[0].content }}"
    assert not stock_tools.there_is_no_template(Subjects(tried.model, with_template, tried.tokens)).shown


def test_the_stand_in_computes_as_inference_but_for_the_order_of_one_norm(
    tried: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing to norm behind `dt_proj`, what differs is that norm alone."""
    mixer = copy.deepcopy(tried.model.backbone.layers[0].mixer)
    hidden = torch.randn(1, 8, mixer.hidden_size)
    monkeypatch.setattr(stock.FalconMambaWeightlessRMSNorm, "forward", lambda norm, x: x)
    expected = mixer.eval()(hidden)
    compiled = stock_tools._on_the_compiled_path(torch.nn.ModuleList([mixer]))[0].train()
    assert type(compiled) is not stock.FalconMambaMixer
    torch.testing.assert_close(compiled(hidden), expected, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_libraries_is_changed(tried: Subjects) -> None:
    before = dict(vars(stock)), dict(vars(stock.FalconMambaMixer))
    stock_tools.another_function_is_trained(tried)
    assert (dict(vars(stock)), dict(vars(stock.FalconMambaMixer))) == before


def made(shown: bool, kept: bool) -> Claim:
    return Claim("something leaks", "tool 1.0: by 13%", "by nothing", shown, kept)


@pytest.mark.parametrize(
    ("claim", "marks", "code"),
    [(made(True, True), "✗✓", 0), (made(False, True), "✓✓", 0), (made(True, False), "✗✗", 1)],
)
def test_the_verb_shows_marks_and_its_exit_code(
    claim: Claim, marks: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock_tools, "claims", lambda: iter([claim]))
    done = CliRunner().invoke(app, ["doctor", "--why"])
    assert done.exit_code == code
    assert done.stdout.splitlines() == [
        "something leaks",
        f"  {marks[0]} stock tool 1.0: by 13%",
        f"  {marks[1]} here  by nothing",
    ]
    done = CliRunner().invoke(app, ["doctor", "--why", "--json"])
    assert json.loads(done.stdout) == [claim.to_dict()]


@pytest.mark.slow
def test_the_claims_hold_on_the_tiny_base() -> None:
    found = list(stock_tools.claims())
    assert len(found) == len(CLAIMS)
    assert all(claim.shown and claim.kept for claim in found), found
