"""Any bytes give a recipe or one bounded, printable error within a second; so does any override."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings

from mamba_sft.errors import RecipeError
from mamba_sft.recipe.recipe import Recipe
from tests.recipe.odd_recipes import ODD_VALUES, TEXTS, check_answer, recipes, some_overrides

MINIMAL = "output_dir: runs/x\nmodel: {base: some/base}\ndata: {sources: [{path: rows.jsonl}]}\n"
SLOW_TO_DRAW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


@settings(max_examples=250, deadline=None, suppress_health_check=SLOW_TO_DRAW)
@given(recipes, some_overrides)
@example(TEXTS[0].encode(), ["train.trainer_arguments.x=-1e400"])
@example(TEXTS[0].encode(), ["train.trainer_arguments.x=[1, {a: .nan}]"])
@example(TEXTS[0].encode(), [".".join("a" * 100_000) + "=1"])
@example(TEXTS[0].encode(), [f"data.sources.{'9' * 5000}.path=x"])
@example(b"%YAML " + b"9" * 5000 + b".1\n---\nseed: 1\n", [])
@example(b'seed: "\\UFFFFFFFF"\n', [])
@example(b"seed: 0x" + b"f" * 9000, [])
@example("".join(f"k{number}: 1\n" for number in range(4000)).encode(), [])
@example(b"train: {" + b", ".join(b"\\x1b%d: 1" % number for number in range(4000)) + b"}", [])
@example(b"[" * 200_000, [])
@example(b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", [])
def test_every_recipe_has_an_answer(tmp_path: Path, raw: bytes, given: list[str]) -> None:
    check_answer(raw, given, tmp_path / "odd.yaml")


@pytest.mark.parametrize("value", ODD_VALUES)
def test_every_field_has_an_answer_to_an_odd_value(tmp_path: Path, value: str) -> None:
    for field in (
        "output_dir",
        "seed",
        "model",
        "chat.system",
        "data.sources",
        "data.sources.0.split",
        "data.sources.0.columns",
        "data.sources.0.roles",
        "adapter.target_modules",
        "adapter.r",
        "train.learning_rate",
        "train.report_to",
        "train.trainer_arguments.x",
        "eval.eval_steps",
    ):
        check_answer(TEXTS[0].encode(), [f"{field}={value}"], tmp_path / "odd.yaml")


def told(*given: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(MINIMAL, "r.yaml", given)
    prefix, _, message = caught.value.message.partition("`: ")
    assert prefix.startswith("override `")
    return message


@pytest.mark.parametrize(
    "field",
    [
        "output_dir",
        "model.base",
        "model.revision",
        "model.adapter",
        "chat.template",
        "chat.system",
        "data.sources.0.path",
        "data.sources.0.name",
        "eval.prompts",
        "data.sources.0.split",
        "data.sources.0.columns.prompt",
    ],
)
def test_a_text_is_neither_blank_nor_full_of_control_characters(field: str) -> None:
    assert told(f"{field}=' '") == f"`{field}` must not be blank, got the text ` `"
    for escape in ("\\0", "\\x1b", "\\x85", "\\x7f"):
        message = told(f'{field}="a{escape}b"')
        assert message.startswith(f"`{field}` must not hold control characters, got the text `a")
    assert (
        told(f'{field}="\\ud800"')
        == f"`{field}` must not hold half of a surrogate pair, got the text `\\ud800`"
    )
    if field not in ("chat.system", "data.sources.0.columns.prompt"):
        assert (
            told(f'{field}="a\\nb"') == f"`{field}` must be a single line without tabs, got the text `a\\nb`"
        )


def test_names_in_a_section_are_held_to_the_same() -> None:
    assert told("data.sources.0.roles={' ': user}").startswith(
        "names in `data.sources.0.roles` must not be blank"
    )
    assert told('data.sources.0.roles={"\\e": user}').startswith(
        "names in `data.sources.0.roles` must not hold control"
    )


@pytest.mark.parametrize(
    "field",
    [
        "train.learning_rate",
        "train.weight_decay",
        "train.max_grad_norm",
        "train.num_train_epochs",
        "train.warmup_steps",
        "train.stable_steps",
        "train.decay_steps",
        "train.min_lr_ratio",
        "train.save_steps",
        "chat.top_p",
        "chat.temperature",
        "data.validation",
        "data.sources.0.weight",
        "eval.eval_steps",
        "adapter.lora_dropout",
    ],
)
def test_a_number_does_not_vanish(field: str) -> None:
    for value in ("5e-324", "1e-13"):
        assert told(f"{field}={value}").startswith(f"`{field}` must not be nearer to 0 than 1e-12, got ")


@pytest.mark.parametrize("name", ["[bold]", "in proj", "in_proj,x_proj", "*", "a/b", ".in_proj", "in_proj."])
def test_a_layer_has_the_name_of_one(name: str) -> None:
    assert told(f"adapter.target_modules=[x_proj, '{name}']").startswith(
        "`adapter.target_modules.1` must be the name of a layer, such as `in_proj`, got the text"
    )


def test_a_path_is_no_longer_than_files_are_called() -> None:
    for path in ("a" * 256, "é" * 128, "/a" * 513):
        assert "at most 1,024" in told(f"data.sources.0.path={path}")
    assert Recipe.from_text(MINIMAL, overrides=[f"data.sources.0.path={'a' * 255}/{'b' * 255}"])


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text("a: 1\n" * 1_000_000)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert caught.value.message == f"`{path}` has 4.77 MiB, and a recipe has at most 256 KiB"
    with pytest.raises(RecipeError, match=r"`recipe` has 4\.77 MiB"):
        Recipe.from_text("a: 1\n" * 1_000_000)
    assert told("chat.system=" + "x" * 300_000) == "is longer than 256 KiB"


def test_many_problems_are_counted() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text("".join(f"field{number}: 1\n" for number in range(1000)), "r.yaml")
    *lines, last = caught.value.message.split("\n")
    assert lines[0].startswith("r.yaml:1: ")
    assert last == f"and {1003 - len(lines)} more problems"  # `model`, `data` and `output_dir` are missing
