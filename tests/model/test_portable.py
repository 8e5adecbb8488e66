"""What other tools read of a checkpoint: tokenizer config, template, stop ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment
from transformers import AutoTokenizer

from mamba_sft.errors import DataError
from mamba_sft.model.adapter import save_tokenizer
from mamba_sft.model.chat_template import prepare_tokenizer, render
from mamba_sft.model.portable import marked_template, plain_template, settle_checkpoint
from mamba_sft.model.template_process import built_in_template
from mamba_sft.recipe.fields import ChatSection

CHAT = [
    {"role": "user", "content": "Which numbers?"},
    {"role": "assistant", "content": "\n 1 2"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so"},
]


def saved(tokenizer: Any, directory: Path, **chat: Any) -> dict[str, Any]:
    """A checkpoint's small files as training leaves them; returns the tokenizer's config."""
    save_tokenizer(prepare_tokenizer(tokenizer, ChatSection(**chat), {0, 11}).tokenizer, directory)
    return json.loads((directory / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("special_tokens", ["auto", "add"])
def test_the_tokenizers_config_has_only_what_transformers_4_reads(
    tiny_tokenizer: Any, tmp_path: Path, special_tokens: str
) -> None:
    config = saved(tiny_tokenizer, tmp_path, special_tokens=special_tokens)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]  # else 4 adds types of tokens
    assert not isinstance(config.get("extra_special_tokens"), list)
    if special_tokens == "add":
        assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.convert_tokens_to_ids("<|im_start|>") in loaded.all_special_ids or special_tokens == "auto"


def test_a_checkpoint_for_others_has_no_marks_and_renders_the_same(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    saved(tiny_tokenizer, tmp_path)
    trained = AutoTokenizer.from_pretrained(tmp_path)
    settle_checkpoint(tmp_path)
    text = (tmp_path / "chat_template.jinja").read_text()
    assert "{% generation" not in text
    assert "{%- generation" not in text
    written = Environment(trim_blocks=True, lstrip_blocks=True).from_string(text).render(messages=CHAT)
    assert written == trained.apply_chat_template(CHAT, tokenize=False)
    # what reads the file here still knows which tokens are the assistant's, and cuts the text there
    others = AutoTokenizer.from_pretrained(tmp_path)
    assert render(others, CHAT) == render(trained, CHAT)
    assert sum(render(others, CHAT)[1]) > 0


def test_training_goes_on_from_a_checkpoint_for_others(tiny_tokenizer: Any, tmp_path: Path) -> None:
    saved(tiny_tokenizer, tmp_path)
    settle_checkpoint(tmp_path)
    setup = prepare_tokenizer(AutoTokenizer.from_pretrained(tmp_path), ChatSection(template="tokenizer"), {0})
    assert setup.tokenizer.chat_template == built_in_template()
    copied = ChatSection(template=str(tmp_path / "chat_template.jinja"))
    assert prepare_tokenizer(tiny_tokenizer, copied, {0, 11}).tokenizer.chat_template == built_in_template()


@pytest.mark.parametrize(
    "mark", ["{% generation %}", "{%- generation -%}", "{%-generation%}", "{%+ generation %}"]
)
def test_marks_come_and_go(mark: str) -> None:
    text = f"{{% for m in messages %}}{mark}{{{{ m.content }}}}{{% endgeneration %}}{{% endfor %}}"
    plain = plain_template(text)
    assert plain is not None
    assert "{%" not in plain.replace("{% for m in messages %}", "").replace("{% endfor %}", "")
    assert plain_template(marked_template(plain)) == plain
    assert marked_template(plain).count("generation") == 2


def test_comments_of_others_are_left_alone() -> None:
    for text in ("{# generation of text #}", "{# see generation #}", "generation", "{{ generation }}"):
        assert marked_template(text) == text == plain_template(text)
    assert plain_template(None) is None


def test_a_template_inside_the_config_loses_its_marks_too(tiny_tokenizer: Any, tmp_path: Path) -> None:
    config = saved(tiny_tokenizer, tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config | {"chat_template": template, "is_local": True}))
    settle_checkpoint(tmp_path)
    found = json.loads(path.read_text())
    assert found["chat_template"] == plain_template(template)
    assert "is_local" not in found


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        ([2, 11], [2, 11], [0, 2, 11]),  # 0 is the tokenizer's own
        (11, 11, [0, 11]),
        (11, None, [0, 11]),
        (0, 0, 0),
        ([11, 0], 11, [0, 11]),
    ],
)
def test_both_configs_and_the_tokenizer_agree_on_what_ends_an_answer(
    tiny_tokenizer: Any, tmp_path: Path, config: Any, generation: Any, stops: Any
) -> None:
    tiny_tokenizer.eos_token = ">>TITLE<<"
    tiny_tokenizer.save_pretrained(tmp_path)
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps({"eos_token_id": value, "kept": 1.5}))
    settle_checkpoint(tmp_path)
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        if value is not None:
            assert json.loads((tmp_path / name).read_text()) == {"eos_token_id": stops, "kept": 1.5}
        else:
            assert not (tmp_path / name).exists()


def test_a_directory_without_a_tokenizer_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 11}')
    settle_checkpoint(tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"eos_token_id": 11}'
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_template_that_is_none_is_refused_as_before(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = {"not": "a text"}
    with pytest.raises(DataError):
        render(tiny_tokenizer, CHAT)
