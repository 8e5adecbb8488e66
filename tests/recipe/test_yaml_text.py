"""YAML in and out: line numbers, what is not allowed, overrides, and the round trip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, JsonValue

from mamba_sft.errors import RecipeError
from mamba_sft.recipe.recipe import Recipe, recipe_schema
from mamba_sft.recipe.yaml_text import EXPONENT, dump, flow_text, load, overridden

MINIMAL = """\
output_dir: runs/x
model:
  base: some/base
data:
  sources:
    - path: rows.jsonl
"""


def message(text: str, *overrides: str) -> str:
    """The message that `text` gives, as the file `r.yaml`."""
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(text, "r.yaml", overrides)
    return caught.value.message


def with_overrides(*overrides: str) -> Recipe:
    return Recipe.from_text(MINIMAL, overrides=overrides)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("2.0e-4", 2e-4), (".5e-3", 5e-4), ("1.e-4", 1e-4), ("1e-0005", 1e-5)],
)
def test_scientific_notation_is_a_number(text: str, number: float) -> None:
    assert with_overrides(f"train.learning_rate={text}").train.learning_rate == number


def test_an_integer_may_stand_for_a_float() -> None:
    assert with_overrides("train.num_train_epochs=3").train.num_train_epochs == 3.0
    assert with_overrides("data.validation=500").data.validation == 500


@pytest.mark.parametrize(
    "word", ["no", "on", "yes", "off", "y", "2024-01-01", "12:30", "0b1", "1_000", "=", "0o"]
)
def test_words_that_yaml_1_1_misreads_are_text(word: str) -> None:
    recipe = with_overrides(f"data.sources.0.name={word}")
    assert recipe.data.sources[0].name == word
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    assert yaml.safe_load(recipe.to_yaml())["data"]["sources"][0]["name"] == word


@pytest.mark.parametrize("word", ["null", "~", "Null", "NULL", ""])
def test_null(word: str) -> None:
    assert with_overrides(f"model.revision={word}").model.revision is None


def test_none_is_a_choice_not_null() -> None:
    assert with_overrides("model.quantization=none").model.quantization == "none"
    assert message(MINIMAL, "model.quantization=null") == (
        "override `model.quantization=null`: `model.quantization` must be one of `none`, `nf4`, `int8`, "
        "got null; did you mean `none`?"
    )


def test_an_empty_section_is_its_defaults() -> None:
    assert Recipe.from_text(MINIMAL + "train:\neval:\n  # eval_steps: 3\n") == Recipe.from_text(MINIMAL)


def test_json_is_yaml() -> None:
    text = '{"output_dir": "runs/x", "model": {"base": "b"}, "data": {"sources": [{"path": "p"}]}}'
    assert Recipe.from_text(text).model.base == "b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml:1: the recipe is empty"),
        ("# nothing\n---\n", "r.yaml:1: the recipe is empty"),
        ("- a\n- b\n", "r.yaml:1: a recipe must consist of fields (`name: value`), got a list"),
        ("hello\n", "r.yaml:1: a recipe must consist of fields (`name: value`), got the text `hello`"),
        ("seed: 1\nmodel:\n\tbase: b\n", "r.yaml:3: tabs cannot indent YAML; use spaces"),
        (
            "seed: 1\nmodel: {base: b\ndata: 3\n",
            "r.yaml:3: not valid YAML: expected ',' or '}', but got ':'",
        ),
        (
            "seed: 1\n base: 3\n",
            "r.yaml:2: not valid YAML: this line is indented further than the one above, or has a second `:`",
        ),
        ("seed: 1\n'abc\n", "r.yaml:2: not valid YAML: a quotation mark opens here and nothing closes it"),
        (
            "seed: 1\n---\nseed: 2\n",
            "r.yaml:2: not valid YAML: `---` begins a second document, and a recipe is one",
        ),
        (
            "seed: 1\nmodel: &m {base: b}\n",
            "r.yaml:2: anchors and aliases (`&name`, `*name`) are not allowed; write the value out",
        ),
        (
            "a: &a [*a]\n",
            "r.yaml:1: anchors and aliases (`&name`, `*name`) are not allowed; write the value out",
        ),
        (
            "seed: 1\nmodel: *m\n",
            "r.yaml:2: anchors and aliases (`&name`, `*name`) are not allowed; write the value out",
        ),
        (
            "x: 1\nseed: !!python/name:os.system x\n",
            "r.yaml:2: tags (`!python/name:os.system`) are not allowed",
        ),
        ("seed: !thing 3\n", "r.yaml:1: tags (`!thing`) are not allowed"),
        ("model: !!set {a, b}\n", "r.yaml:1: tags (`!set`) are not allowed"),
        ("seed: !!int many\n", "r.yaml:1: `many` is no int"),
        ("? [a, b]\n: 3\n", "r.yaml:1: a field name must be a word"),
        ("seed: 1\nmodel: \x07\n", "r.yaml:2: not valid YAML: control character #x07"),
        ("[" * 5000, "r.yaml:1: not valid YAML: nested too deeply"),
    ],
)
def test_unreadable_text_is_one_clear_line(text: str, expected: str) -> None:
    assert message(text) == expected


def test_repeated_keys_name_both_lines() -> None:
    text = MINIMAL + "adapter:\n  r: 8\n  lora_alpha: 16\n  r: 16\nseed: 1\noutput_dir: y\n"
    assert message(text) == (
        "r.yaml:10: `adapter.r` is set twice, first on line 8\n"
        "r.yaml:12: `output_dir` is set twice, first on line 1"
    )


def test_lines_of_nested_and_flow_values() -> None:
    text = """\
output_dir: runs/x
model: {base: b,
        dtype: bad}
data:
  sources:
    - path: a

    -
      path: b
      weight: 0
    - {path: c, weight: -1}
"""
    assert [line.split(": ")[0] for line in message(text).split("\n")] == [
        "r.yaml:3",
        "r.yaml:10",
        "r.yaml:11",
    ]


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"seed: 1\noutput_dir: caf\xe9\n")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert caught.value.message == f"{path}:2: not UTF-8: byte 0xe9"
    assert caught.value.hint == "save the file as UTF-8"


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert Recipe.load(path) == Recipe.from_text(MINIMAL)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(tmp_path / "nope.yaml")
    assert caught.value.message == f"no recipe `{tmp_path}/nope.yaml`: neither a file nor a built-in recipe"


def test_messages_show_the_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "bad.yaml").write_text(MINIMAL + "sed: 1\n")
    for path in ("recipes/bad.yaml", tmp_path / "recipes" / "bad.yaml"):
        with pytest.raises(RecipeError) as caught:
            Recipe.load(path)
        assert caught.value.message == "recipes/bad.yaml:7: unknown field `sed`; did you mean `seed`?"


def test_overrides_win_over_the_file_and_later_ones_over_earlier() -> None:
    text = MINIMAL + "train: {max_steps: 5}\n"
    assert Recipe.from_text(text).train.max_steps == 5
    assert Recipe.from_text(text, overrides=["train.max_steps=6"]).train.max_steps == 6
    assert Recipe.from_text(text, overrides=["train.max_steps=6", "train.max_steps=7"]).train.max_steps == 7


def test_overrides_reach_lists_and_take_yaml() -> None:
    recipe = with_overrides(
        "data.sources.0.path=other.jsonl",
        "data.sources.0.weight=2",
        "adapter.target_modules=[in_proj, out_proj]",
        "chat.system=You are brief.",
        "adapter={r: 4}",
        "adapter.lora_alpha=8",
        "train.trainer_arguments.adam_beta2=0.95",
        "output_dir=runs/a=b",
    )
    assert (recipe.data.sources[0].path, recipe.data.sources[0].weight) == ("other.jsonl", 2.0)
    assert (recipe.adapter.r, recipe.adapter.lora_alpha) == (4, 8)
    assert recipe.adapter.target_modules == [
        "in_proj",
        "x_proj",
        "out_proj",
    ]  # the later override replaced all
    assert recipe.chat.system == "You are brief."
    assert recipe.train.trainer_arguments == {"adam_beta2": 0.95}
    assert recipe.output_dir == "runs/a=b"


def test_an_override_can_replace_all_sources() -> None:
    recipe = with_overrides("data.sources=[{path: a}, {path: b, weight: 3}]")
    assert [source.path for source in recipe.data.sources] == ["a", "b"]


def test_an_override_mends_the_file() -> None:
    assert Recipe.from_text(MINIMAL + "adapter: {r: -1}\n", overrides=["adapter.r=4"]).adapter.r == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=3", "unknown field `train.lr`; here it is `train.learning_rate`"),
        ("learning_rate=3", "unknown field `learning_rate`; it goes under `train`"),
        ("train.learning_rat=3", "unknown field `train.learning_rat`; did you mean `learning_rate`?"),
        ("train.learning_rate=-1", "`train.learning_rate` must be greater than 0, got -1"),
        ("train.learning_rate", "must read `section.field=value`"),
        ("=3", "must read `section.field=value`"),
        ("--resume", "must read `section.field=value`"),
        ("data.sources.1.path=b", "`data.sources` has no entry `1`: it has 1, counted from 0"),
        ("data.sources.path=b", "`data.sources` has no entry `path`: it has 1, counted from 0"),
        ("model.base.x=b", "`model.base` has no fields"),
        ("trian.max_steps=3", "unknown field `trian`; did you mean `train`?"),
        ("adapter.target_modules=[a", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "chat.system=*stars*",
            "not valid YAML: a text that begins with `*` needs quotes of its own: `'*.jsonl'`",
        ),
        ("seed=!!map 3", "tags (`!map`) are not allowed"),
        ("chat.system=Answer: briefly", "`chat.system` must be text, got fields"),
        ("adapter={r: 2, r: 3}", "`adapter.r` is set twice"),
        ("data.sources.0={weight: 2}", "`data.sources.0.path` is missing"),
        (
            "adapter.target_modules=[x_proj, x_proj]",
            "`adapter.target_modules` must not repeat `x_proj`",
        ),
    ],
)
def test_a_wrong_override_is_one_clear_line(override: str, expected: str) -> None:
    assert message(MINIMAL, override) == f"override `{override}`: {expected}"


def test_file_problems_come_before_override_problems() -> None:
    assert message(MINIMAL + "x: 1\n", "z=1", "y=2").split("\n") == [
        "r.yaml:7: unknown field `x`",
        "override `z=1`: unknown field `z`",
        "override `y=2`: unknown field `y`",
    ]


def test_dump_holds_every_value_in_order() -> None:
    text = with_overrides("train.learning_rate=1e-5", "eval.eval_steps=20").to_yaml()
    tree = yaml.safe_load(text)
    assert list(tree) == ["output_dir", "seed", "model", "chat", "data", "adapter", "train", "eval"]
    for name, section in tree.items():
        if isinstance(section, dict):
            definition = recipe_schema()["$defs"][f"{name.capitalize()}Section"]
            assert list(section) == list(definition["properties"])
    assert "  target_modules: [in_proj, x_proj, out_proj]\n" in text
    assert "  eval_steps: 20\n" in text
    assert "  learning_rate: 1.0e-05\n" in text


def test_a_long_system_message_stays_readable() -> None:
    recipe = Recipe.from_text(MINIMAL + "chat:\n  system: |\n    You are brief.\n    No emoji.\n")
    assert "  system: |\n    You are brief.\n    No emoji.\n" in recipe.to_yaml()
    assert Recipe.from_text(recipe.to_yaml()) == recipe


def test_resolved_recipe_without_validation_loads_again() -> None:
    recipe = with_overrides("data.validation=0")
    assert Recipe.from_text(recipe.to_yaml()) == recipe


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
letters = st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t\r")
written = st.text(letters, min_size=1, max_size=30).filter(str.strip)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)


class Anything(BaseModel):
    """Holds what JSON can hold."""

    values: dict[str, JsonValue]


@given(st.dictionaries(texts.map("x{}".format), values, max_size=3))
@example({"x": "0o7"})
@example({"x": ["#", " ", "\t", "\x85", "\ufeff", "a: b", "- c", "null", ""]})
@example({"x": {"yes": [[], {}, [1.0, 1, True, "True"]]}})
def test_any_value_is_read_as_it_was_written(values: dict[str, Any]) -> None:
    again = load(Anything, dump({"values": values}), "r.yaml", [])
    assert repr(again) == repr(Anything(values=values))


@given(written, st.floats(1e-12, 1), st.integers(0, 0) | st.floats(0, 0.999))
@example("1e5", 1e-5, 0)
@example("\n leading and trailing \n\n", 0.1, 0.5)
@example("---\n...\n", 1.0, 0.9)
def test_round_trip(text: str, rate: float, beta: float) -> None:
    recipe = Recipe.build(
        output_dir="runs/x",
        model={"base": "x"},
        chat={"system": text},
        data={"sources": [{"path": "x", "weight": rate, "columns": {"prompt": text}}]},
        train={"learning_rate": rate, "trainer_arguments": {"adam_beta1": beta}},
    )
    again = Recipe.from_text(recipe.to_yaml())
    assert again == recipe
    assert repr(again) == repr(recipe)  # 1, 1.0 and True are equal, but not the same


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_exponent_pattern_is_what_the_reader_takes(number: float) -> None:
    for text in (f"{number!r}", f"{number:e}"):
        assert isinstance(yaml.safe_load(text), float) or re.match(EXPONENT, text)


@pytest.mark.parametrize("text", ["task", "my column", "./a b.csv", "~/x", "no"])
def test_a_text_that_is_plain_inside_braces_stays_so(text: str) -> None:
    assert flow_text(text) == text


@pytest.mark.parametrize(
    "text", ["a: b", "a, b", "#x", "x ", " x", "", "null", "true", "1.5", "123", '"', "}"]
)
def test_a_text_inside_braces_is_read_back(text: str) -> None:
    value = f"{{path: rows.jsonl, columns: {{prompt: {flow_text(text)}, response: r}}}}"
    if text.strip():
        recipe = Recipe.from_text(MINIMAL, overrides=[f"data.sources.0={value}"])
        assert recipe.data.sources[0].columns["prompt"] == text
    assert yaml.safe_load(f"{{a: {flow_text(text)}}}") == {"a": text}


def test_what_overrides_set_is_known_by_name_whatever_blanks_are_in_them() -> None:
    changes = [" output_dir = runs/other", "train.max_steps=2", "chat.system=a=b"]
    assert overridden(changes) == {"output_dir", "train.max_steps", "chat.system"}
    assert Recipe.from_text(MINIMAL, overrides=changes[:2]).output_dir == "runs/other"
