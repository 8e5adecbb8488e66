from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mamba_sft.errors import DataError
from mamba_sft.model.chat_template import (
    Carried,
    carried,
    check_generation_marks,
    prepare_tokenizer,
    render,
    with_reasoning_as_text,
    with_system,
)
from mamba_sft.recipe.fields import ChatSection

USER, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world 😀 née 世界"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "\n\n  indented"},
]
MARKED = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
LOOP = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}ANSWER{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"  # noqa: E501


def trained_runs(tokenizer: Any, ids: list[int], mask: list[int]) -> list[str]:
    """The texts of the trained stretches."""
    runs: list[list[int]] = []
    for i, (token, trained) in enumerate(zip(ids, mask, strict=True)):
        if trained and (i == 0 or not mask[i - 1]):
            runs.append([])
        if trained:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("fixture", ["tiny_tokenizer", "falcon_tokenizer"])
def test_chatml_masks_every_answer_with_its_stop_token(fixture: str, request: pytest.FixtureRequest) -> None:
    setup = prepare_tokenizer(request.getfixturevalue(fixture), ChatSection(), {0, 11})
    ids, mask = render(setup.tokenizer, CHAT)
    assert setup.tokenizer.decode(ids) == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\nworld 😀 née 世界<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n\n\n  indented<|im_end|>\n"
    )
    assert trained_runs(setup.tokenizer, ids, mask) == [
        "world 😀 née 世界<|im_end|>",
        "\n\n  indented<|im_end|>",
    ]
    check_generation_marks(setup)


@pytest.mark.parametrize("fixture", ["tiny_tokenizer", "falcon_tokenizer"])
def test_training_sees_the_tokens_that_generation_sees(fixture: str, request: pytest.FixtureRequest) -> None:
    tokenizer = prepare_tokenizer(request.getfixturevalue(fixture), ChatSection(), {0, 11}).tokenizer
    ids, mask = render(tokenizer, CHAT)
    for end in (2, 4):  # up to each answer, whatever white space the answer begins with
        prompt, nothing = render(tokenizer, CHAT[:end], add_generation_prompt=True)
        assert ids[: len(prompt)] == prompt
        assert mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
        assert not nothing[-1]


def test_tokens_are_those_of_apply_chat_template_where_answers_start_plainly(falcon_tokenizer: Any) -> None:
    tokenizer = prepare_tokenizer(falcon_tokenizer, ChatSection(), {0, 11}).tokenizer
    chat = [*CHAT[:4], {"role": "assistant", "content": "it's 1234567 `x`\n"}]
    theirs = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert render(tokenizer, chat) == (theirs["input_ids"], theirs["assistant_masks"])


def test_renamed_rows_change_nothing_else(falcon_tokenizer: Any) -> None:
    before = falcon_tokenizer.backend_tokenizer.to_str()
    setup = prepare_tokenizer(falcon_tokenizer, ChatSection(), {0, 11}, embedding_rows=65024)
    tokenizer = setup.tokenizer
    assert setup.renamed == {">>ABSTRACT<<": "<|im_start|>", ">>INTRODUCTION<<": "<|im_end|>"}
    assert setup.trained_token_ids == [1, 2]
    assert setup.resize_to is None
    assert len(tokenizer) == len(falcon_tokenizer) == 65024
    assert setup.stop_token_ids == [2, 11]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        *["<|endoftext|>"] * 2,
    )
    assert falcon_tokenizer.backend_tokenizer.to_str() == before
    assert falcon_tokenizer.chat_template is None
    assert type(tokenizer) is type(falcon_tokenizer)
    assert tokenizer.name_or_path == falcon_tokenizer.name_or_path
    renamed = {old: new for new, old in tokenizer.get_vocab().items() if new not in setup.renamed.values()}
    assert all(falcon_tokenizer.convert_ids_to_tokens(i) == token for i, token in renamed.items())


def probe_texts() -> list[str]:
    rng = random.Random(0)
    alphabets = [
        "abc defg",
        "0123456789",
        " \n\t",
        ".,;:!?()[]{}<>|/\\",
        "éüßñ",
        "世界你好",
        "😀🤷🏽‍♀️",
        "\x00\x1b\u200b",
        "<|im_",
        ">>TITLE<<",
    ]
    texts = [
        "",
        " ",
        "\n\n\n",
        "<|im_star",
        "im_end|>",
        ">>ABSTRACT",
        "<|endoftext|>x",
        ">>TITLE<< >>MIDDLE<<",
    ]
    while len(texts) < 300:
        texts.append("".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(1, 60))))
    return texts


def test_renamed_tokenizer_encodes_and_decodes_as_before(falcon_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = prepare_tokenizer(falcon_tokenizer, ChatSection(), {0, 11}).tokenizer
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(reloaded) is type(tokenizer)
    assert reloaded.chat_template == tokenizer.chat_template
    for text in probe_texts():
        expected = falcon_tokenizer.encode(text)
        for other in (tokenizer, reloaded):
            assert other.encode(text) == expected
            assert other.decode(expected) == falcon_tokenizer.decode(expected)
    marked = "a<|im_start|>b<|im_end|><|im_end|> c"
    for other in (tokenizer, reloaded):
        ids = other.encode(marked)
        assert [i for i in ids if i < 12] == [1, 2, 2]
        assert other.decode(ids) == marked
        assert other.decode(ids, skip_special_tokens=True) == "ab c"
        assert 1 not in other.encode(">>ABSTRACT<<")
        assert (other.eos_token_id, other.pad_token_id) == (2, 11)


def test_reserved_and_used_slots_keep_their_names(tiny_tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=">>ABSTRACT<< $A", special_tokens=[(">>ABSTRACT<<", 1)]
    )
    tiny_tokenizer.unk_token = ">>SUMMARY<<"
    setup = prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 2, 11})
    assert setup.trained_token_ids == [4, 5]


def test_without_enough_unused_rows_tokens_are_added(tiny_tokenizer: Any, tmp_path: Path) -> None:
    setups = [
        prepare_tokenizer(tiny_tokenizer, ChatSection(), set(range(10)) | {11}, embedding_rows=381),
        prepare_tokenizer(tiny_tokenizer, ChatSection(special_tokens="add"), set(), embedding_rows=381),
    ]
    for setup in setups:
        assert setup.trained_token_ids == [381, 382] == setup.tokenizer.encode("<|im_start|><|im_end|>")
        assert setup.resize_to == 383
        assert setup.renamed == {}
    assert len(tiny_tokenizer) == 381
    setups[0].tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.encode("<|im_start|>a<|im_end|>") == setups[0].tokenizer.encode("<|im_start|>a<|im_end|>")
    assert reloaded.decode([381, 382], skip_special_tokens=True) == ""


def test_added_tokens_that_fit_the_matrix_do_not_resize_it(tiny_tokenizer: Any) -> None:
    setup = prepare_tokenizer(tiny_tokenizer, ChatSection(special_tokens="add"), set(), embedding_rows=512)
    assert (setup.trained_token_ids, setup.resize_to) == ([381, 382], None)


def test_tokens_that_exist_already_are_not_trained_anew(tiny_tokenizer: Any) -> None:
    once = prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11})
    again = prepare_tokenizer(once.tokenizer, ChatSection(), {0, 1, 2, 11})
    assert again.trained_token_ids == []
    assert again.renamed == {}
    assert again.stop_token_ids == [2]
    assert again.tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_pad_is_kept_apart_from_the_stop_token(tiny_tokenizer: Any, pad: str | None) -> None:
    tokenizer = prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11}).tokenizer
    tokenizer.pad_token = pad
    tokenizer.bos_token = None
    settled = prepare_tokenizer(tokenizer, ChatSection(), {0, 11}).tokenizer
    assert settled.pad_token_id not in (None, settled.eos_token_id)


def test_tools_reach_the_template(tiny_tokenizer: Any) -> None:
    tokenizer = prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11}).tokenizer
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    calls = [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
        {"name": "f", "arguments": "{}"},
    ]
    chat = [CHAT[0], USER, {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "42"}, ANSWER]  # fmt: skip  # noqa: E501
    ids, mask = render(tokenizer, chat, tools=tools)
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nbe kind\n\n")
    assert '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}' in text
    assert text.count("be kind") == text.count("system\n") == 1
    assert "<|im_start|>tool\n42<|im_end|>\n" in text
    assert trained_runs(tokenizer, ids, mask) == [
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n'
        '<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>',
        "answer<|im_end|>",
    ]
    ids, _ = render(tokenizer, chat[1:], tools=tools)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nYou may call these tools")


@pytest.mark.parametrize("nothing", ["", "  ", None, {}, "{}"])
def test_a_call_without_arguments_is_still_json(tiny_tokenizer: Any, nothing: Any) -> None:
    tokenizer = prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11}).tokenizer
    calls = [{"function": {"name": "off", "arguments": nothing}}, {"function": {"name": "off"}}]
    ids, mask = render(tokenizer, [USER, {"role": "assistant", "content": None, "tool_calls": calls}])
    off = '<tool_call>{"name": "off", "arguments": {}}</tool_call>'
    assert trained_runs(tokenizer, ids, mask) == [f"{off}\n{off}<|im_end|>"]


def test_reasoning_is_written_before_the_answer(tiny_tokenizer: Any) -> None:
    tokenizer = prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11}).tokenizer
    thought = ANSWER | {"reasoning_content": "because"}
    ids, mask = render(tokenizer, [USER, thought, USER, ANSWER])
    assert trained_runs(tokenizer, ids, mask) == [
        "<think>because</think>\nanswer<|im_end|>",
        "answer<|im_end|>",
    ]
    assert with_reasoning_as_text([USER, thought]) == [
        USER,
        ANSWER | {"content": "<think>because</think>\nanswer"},
    ]


def test_a_later_system_turn_is_rendered(tiny_tokenizer: Any) -> None:
    tokenizer = prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11}).tokenizer
    system = {"role": "system", "content": "be brief"}
    for tools in (None, [{"name": "f"}]):
        text = tokenizer.decode(render(tokenizer, [USER, ANSWER, system, USER, ANSWER], tools=tools)[0])
        assert "answer<|im_end|>\n<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n" in text


def test_what_a_template_carries_is_found_by_asking_it(tiny_tokenizer: Any) -> None:
    assert prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11}).carries == Carried(
        tools=True, calls=True, reasoning=True, name=False
    )
    plain = "{% for m in messages %}{{ (m.name or m.role) + ': ' + m.content + eos_token }}{% endfor %}"
    assert carried(own_template(tiny_tokenizer, plain)) == Carried(name=True)
    strict = plain + "{% if messages[0].name or tools %}{{ raise_exception('no') }}{% endif %}"
    assert carried(own_template(tiny_tokenizer, strict)) == Carried()


def test_a_default_system_message_is_for_chats_without_one() -> None:
    assert with_system([USER], "be kind")[0] == {"role": "system", "content": "be kind"}
    assert with_system([CHAT[0], USER], "be rude")[0] == CHAT[0]
    assert with_system([USER], None) == [USER]


def own_template(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def test_the_tokenizers_own_template_is_kept(tiny_tokenizer: Any) -> None:
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ 'Q: ' + m.content + '\nA: ' }}{% endif %}{% endfor %}"  # noqa: E501
    setup = prepare_tokenizer(own_template(tiny_tokenizer, template), ChatSection(template="tokenizer"), {0})
    assert setup.tokenizer.chat_template == template
    assert (setup.stop_token, setup.stop_token_ids, setup.trained_token_ids) == ("<|endoftext|>", [11], [])
    check_generation_marks(setup)
    ids, mask = render(setup.tokenizer, [USER, ANSWER])
    assert trained_runs(setup.tokenizer, ids, mask) == ["answer<|endoftext|>"]


def test_a_template_file_gets_its_chatml_tokens(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(LOOP.replace("ANSWER", MARKED))
    setup = prepare_tokenizer(tiny_tokenizer, ChatSection(template=str(path)), {0})
    assert (setup.trained_token_ids, setup.stop_token) == ([1, 2], "<|im_end|>")
    check_generation_marks(setup)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("{{ m.content + '<|im_end|>\n' }}", "has no {% generation %} marks"),
        ("{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}", "leaves the stop token <|im_end|> outside"),  # noqa: E501
        ("{% if loop.last %}" + MARKED + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}", "marks 1 of 2 assistant turns"),  # noqa: E501
    ],
)  # fmt: skip
def test_marks_that_miss_a_turn_or_its_stop_token(
    tiny_tokenizer: Any, tmp_path: Path, answer: str, message: str
) -> None:
    path = tmp_path / "bad.jinja"
    path.write_text(LOOP.replace("ANSWER", answer))
    setup = prepare_tokenizer(tiny_tokenizer, ChatSection(template=str(path)), {0})
    with pytest.raises(DataError) as error:
        check_generation_marks(setup)
    assert message in error.value.message
    assert "bad.jinja" in error.value.message


def test_a_template_whose_marks_lack_the_stop_token_in_one_row_is_refused(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    answer = "{% generation %}{{ m.content }}{% if 'long' not in m.content %}<|im_end|>{% endif %}{% endgeneration %}"  # noqa: E501
    path = tmp_path / "sometimes.jinja"
    path.write_text(LOOP.replace("ANSWER", answer))
    setup = prepare_tokenizer(tiny_tokenizer, ChatSection(template=str(path)), {0})
    check_generation_marks(setup)
    with pytest.raises(DataError, match="without its stop token"):
        render(setup.tokenizer, [USER, {"role": "assistant", "content": "too long"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}",
            "ends an assistant turn with no special token",
        ),
        ("{{ raise_exception('system first') }}", "cannot render a plain chat"),
        ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", "cannot render a plain chat"),
        ("{{ messages[0].content + eos_token }}", "drops the assistant's answer"),
        ("{% if %}", "cannot render a plain chat"),
    ],
)
def test_unfit_templates(tiny_tokenizer: Any, template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_tokenizer(own_template(tiny_tokenizer, template), ChatSection(template="tokenizer"), {0})


@pytest.mark.parametrize(
    ("template", "message"),
    [("tokenizer", "has no chat template"), ("nowhere.jinja", "cannot read the chat template")],
)
def test_missing_templates(tiny_tokenizer: Any, template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_tokenizer(tiny_tokenizer, ChatSection(template=template), {0})


def test_threads_render_as_one_does(tiny_tokenizer: Any) -> None:
    """Marks of one conversation must not be another's: the library keeps them in the template all share."""
    tokenizer = prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11}).tokenizer
    chats = [
        [{"role": "user", "content": "q " * n}, {"role": "assistant", "content": "a " * (n + 1)}]
        for n in range(8)
    ]
    expected = [render(tokenizer, chat) for chat in chats]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places in the middle of everything
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda n: render(tokenizer, chats[n % 8]), range(400)))
    finally:
        sys.setswitchinterval(before)
    assert all(one == expected[n % 8] for n, one in enumerate(found))
