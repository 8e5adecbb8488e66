"""The held-out loss equals the plain one and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mamba_sft.errors import DataError
from mamba_sft.inference import scoring
from mamba_sft.inference.scoring import heldout_loss, score_rows
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model.adapter import attach_adapter
from mamba_sft.recipe.fields import AdapterSection

Rows = list[dict[str, list[int]]]


def make_rows() -> Rows:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in (9, 30, 4, 17, 21):
        ids = torch.randint(12, 500, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


def collate(rows: Rows) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": pad("input_ids", 11), "labels": pad("labels", -100), "attention_mask": mask}


def plain_loss(model: Any, rows: Rows) -> float:
    """Row by row with the full logits, summed over tokens."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"])[1:]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("positions", [1, 1024])
def test_equals_the_plain_loss(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, batch_size: int, positions: int
) -> None:
    monkeypatch.setattr(scoring, "_POSITIONS", positions)
    model, rows = install(tiny_model), make_rows()
    assert heldout_loss(model, rows, collate, batch_size) == pytest.approx(plain_loss(model, rows), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_an_adapter(tiny_model: Any, dtype: torch.dtype) -> None:
    rows = make_rows()
    model = attach_adapter(install(tiny_model.to(dtype)), AdapterSection(), trained_token_ids=[9, 10])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    loss = heldout_loss(model, rows, collate, 2)
    assert loss == pytest.approx(plain_loss(model.eval(), rows), rel=1e-5 if dtype == torch.float32 else 2e-2)
    with model.disable_adapter():
        assert heldout_loss(model, rows, collate, 2) != pytest.approx(loss, rel=1e-3)


def test_the_model_is_left_as_it_was(tiny_model: Any) -> None:
    model = attach_adapter(install(tiny_model), AdapterSection(lora_dropout=0.5))
    model.train()
    model.get_base_model().backbone.norm_f.eval()
    modes = [module.training for module in model.modules()]
    first = heldout_loss(model, make_rows(), collate, 2)
    assert [module.training for module in model.modules()] == modes
    assert heldout_loss(model, make_rows(), collate, 2) == first  # dropout was off
    with pytest.raises(KeyError):
        heldout_loss(model, [{}], collate, 1)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("positions", [3, 1024])
def test_each_row_has_a_score_of_its_own(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    monkeypatch.setattr(scoring, "_POSITIONS", positions)
    model, rows = install(tiny_model), make_rows()
    rows[2] = {"input_ids": rows[2]["input_ids"], "labels": [-100] * 4}
    rows[0]["labels"][1:] = _likeliest(model, rows[0]["input_ids"])
    found = list(score_rows(model, rows, collate, 2))
    assert [one.tokens for one in found] == [8, 28, 0, 15, 19]
    assert found[0].right == 8
    assert found[2] == (0.0, 0, 0)
    for one, row in zip(found, rows, strict=True):
        if one.tokens:
            assert one.loss / one.tokens == pytest.approx(plain_loss(model, [row]), rel=1e-5)
            assert 0 <= one.right <= one.tokens


def _likeliest(model: Any, ids: list[int]) -> list[int]:
    with torch.no_grad():
        found: list[int] = model(input_ids=torch.tensor([ids])).logits[0, :-1].argmax(-1).tolist()
    return found


def test_nothing_to_score(tiny_model: Any) -> None:
    rows = [{"input_ids": [12, 13, 14], "labels": [12, -100, -100]}]  # the first token has nothing before it
    with pytest.raises(DataError, match="none of the 1 held-out rows"):
        heldout_loss(install(tiny_model), rows, collate, 1)
