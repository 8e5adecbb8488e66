"""Templates that are not ours: what `transformers` would render, or one message, in bounds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from mamba_sft.errors import DataError
from mamba_sft.model import template_process
from mamba_sft.model.chat_template import _with_every_name, prepare_tokenizer, split_rendered
from mamba_sft.model.template_process import EndlessTemplateError, TemplateProcess, built_in_template
from mamba_sft.model.template_rendering import LONGEST, RefusedError, rendered
from mamba_sft.recipe.fields import ChatSection

NAMES_REASONING = hasattr(chat_template_utils, "_alias_reasoning_fields")
"""Whether this transformers gives a message's reasoning every name that templates know it by, as we do."""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world 😀"}],
    [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "née\n\t\u2028"},
        {"role": "assistant", "content": "b & c", "reasoning_content": "because"},
        {"role": "user", "content": "more"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, None]}}}],
        },
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "done"},
    ],
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "&'\\", "parameters": {"type": "object"}}}
]
TEMPLATES = [
    built_in_template(),
    """{%- set ns = namespace(first=true, n=0) %}
    {% for m in messages %}
        {% if m.role == 'system' %}{% continue %}{% endif %}
        {%- set ns.n = ns.n + 1 %}
        {{- bos_token if loop.first }}[{{ m['role'] | upper }}] {{ m.content | trim }}
        {% generation %}{{ m.thinking or '' }}{{ eos_token }}{% endgeneration %}
    {% endfor %}{{ ns.n }}{{ tools | tojson(indent=2) if tools else documents }}""",
    """{% macro turn(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}
    {% for m in messages if m.role != 'tool' %}{{ turn(m) }}
    {%- if loop.index > 3 %}{% break %}{% endif %}{% endfor %}
    {{ dict(a=1, b=[2]) | tojson }} {{ messages[::-1] | length }}
    {{ '%s-%d' % ('a', 3) }} {{ missing is defined }}
    {{ messages | map(attribute='role') | join(',') }} {{ {'z': 1, 'a': "é"} | tojson(sort_keys=true) }}""",
]  # fmt: skip


def plain(template: str, answer: str = "{{ m.content + eos_token }}") -> str:
    """A template that is fine, with something in front of it."""
    return template + "{% for m in messages %}" + answer + "{% endfor %}"


@pytest.mark.parametrize("number", range(len(TEMPLATES)))
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_renders_as_transformers_does(tiny_tokenizer: Any, number: int, tools: Any, prompt: bool) -> None:
    special = tiny_tokenizer.special_tokens_map
    process = TemplateProcess(TEMPLATES[number])
    for chat in CHATS:
        named = chat if NAMES_REASONING else [_with_every_name(message) for message in chat]
        texts, marks = render_jinja_template(
            [named], tools, None, TEMPLATES[number], return_assistant_tokens_mask=True,
            add_generation_prompt=prompt, **special,
        )  # fmt: skip
        tiny_tokenizer.chat_template = TEMPLATES[number]
        pieces = split_rendered(tiny_tokenizer, chat, add_generation_prompt=prompt, tools=tools)
        assert "".join(text for text, _ in pieces) == texts[0]
        assert [text for text, trained in pieces if trained] == [texts[0][a:b] for a, b in marks[0] if a < b]
        variables = {**special, "messages": chat, "tools": tools, "add_generation_prompt": prompt}
        assert process.render([variables]) == [rendered(TEMPLATES[number], variables)]
    process.close()


BAD = [
    ("{{ 1/0 }}", "line 1: division by zero"),
    ("\n\n{{ ''.split('') }}", "line 3: empty separator"),
    ("{{ range(10**9) | list }}", "line 1: Range too big"),
    ("{{ " + "(" * 300 + "1" + ")" * 300 + " }}", ""),
    ("{{ " + "-" * 100_000 + "1 }}", ""),
    ("{{ '\\ud800' }}", "surrogates not allowed"),
    ("\ud800", "cannot be used: it holds half of a surrogate pair, at character 0"),
    ("{{ raise_exception('\x1b[31m\x00' ~ 'a' * 9000) }}", r"\x1b[31m\x00aaa"),
    ("{{ 'a' * 10**10 }}", "GiB of memory"),
    (
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "GiB of memory",
    ),
    ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", f"it writes more than {LONGEST:,}"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply, or calls itself without end"),
    ("{{ ''.__class__.__mro__ }}", "is unsafe"),
    ("{{ namespace(_x=1) }}", "underscore"),
    ("{{ cycler.__init__.__globals__.os.system('true') }}", "is unsafe"),
    ("{% include '/etc/passwd' %}", ""),
    ("{{ messages.append(1) }}", "is unsafe"),
    ("{% nonsense %}", "line 1: Encountered unknown tag 'nonsense'."),
    ("{{ '{:>9999999999}'.format('') }}", ""),
    ("{{ messages | tojson(indent=10**10) }}", ""),
    ("{{ '%99999999999d' % 1 }}", ""),
    ("x" * 1_000_001, "cannot be used: it has more than 1,000,000 characters"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "words"), BAD, ids=range(len(BAD)))
def test_a_bad_template_is_one_message_that_names_it(tiny_tokenizer: Any, template: str, words: str) -> None:
    tiny_tokenizer.chat_template = plain(template)
    with pytest.raises(DataError) as caught:
        prepare_tokenizer(tiny_tokenizer, ChatSection(template="tokenizer"), {0})
    assert caught.value.message.startswith("the chat template `tokenizer` ")
    assert words in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 700


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10 ** (10 ** 9) }}",
    "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}"
    "{{ n.l | tojson }}",
    "{% set n = namespace(l=[], m=[]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}"
    "{% set n.m = [n.m, n.m] %}{% endfor %}{{ n.l == n.m }}",
]  # fmt: skip


@pytest.mark.parametrize("template", ENDLESS, ids=range(len(ENDLESS)))
def test_a_template_that_computes_without_end_is_ended(
    tiny_tokenizer: Any, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "endless.jinja"
    path.write_text(plain(template))
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        prepare_tokenizer(tiny_tokenizer, ChatSection(template=str(path)), {0})
    assert "endless.jinja` cannot render a plain chat: the chat template " in caught.value.message
    assert "more than 3 s of computing" in caught.value.message or "GiB of memory" in caught.value.message
    assert time.monotonic() - started < 60  # of computing it is 3


def test_an_endless_template_is_not_asked_again() -> None:
    process = TemplateProcess(plain("{% if messages[0].content == 'go' %}" + ENDLESS[0] + "{% endif %}"))
    variables = {"messages": [{"role": "user", "content": "x"}], "eos_token": "."}
    assert process.render([variables] * 3) == [("x.", [])] * 3
    with pytest.raises(EndlessTemplateError):
        process.render([variables, {**variables, "messages": [{"role": "user", "content": "go"}]}, variables])
    with pytest.raises(EndlessTemplateError):
        process.render([variables])


def test_a_process_that_is_killed_is_replaced() -> None:
    process = TemplateProcess("{{ messages }}")
    assert process.render([{"messages": "a"}]) == [("a", [])]
    for _ in range(2):
        running = process._process
        assert running is not None
        os.kill(running.pid, signal.SIGKILL)
        assert process.render([{"messages": "b"}]) == [("b", [])]
    process.close()


def test_a_process_that_cannot_live_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process.sys, "executable", "/bin/false")
    [answer] = TemplateProcess("{{ messages }}").render([{"messages": "a"}])
    assert str(answer) == "the process that renders it dies"


def test_the_process_sees_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    process = TemplateProcess("x")
    process.render([{}])
    assert process._process is not None
    environment = Path(f"/proc/{process._process.pid}/environ")
    if environment.exists():
        assert b"hf_secret" not in environment.read_bytes()
    process.close()


def test_a_process_ends_with_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    process = TemplateProcess("x")
    process.render([{}])
    assert process._process is not None
    assert process._process.stdin is not None
    process._process.stdin.close()
    assert process._process.wait(timeout=20) == 0


@pytest.mark.parametrize("template", [{"default": "x"}, 3, ["x"], b"x"])
def test_a_template_that_is_no_text(tiny_tokenizer: Any, template: Any) -> None:
    with pytest.raises(RefusedError, match="it is no text but"):
        template_process.render_template(template, [{}])


def test_only_so_many_processes_are_kept() -> None:
    for number in range(7):
        template_process.render_template(f"{number}", [{}])
    assert len(template_process._processes) <= 4


def test_a_batch_is_answered_in_its_order() -> None:
    template = (
        "{% if messages == 7 %}{{ 1/0 }}{% elif messages == 9 %}{{ 'a' * 10**10 }}{% endif %}{{ messages }}"
    )
    process = TemplateProcess(template)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    given: list[dict[str, Any]] = [{"messages": number} for number in range(500)]
    given[3], given[4], given[5] = {"messages": deep}, {"messages": "x" * 300_000}, {"messages": object()}
    answers = process.render(given)
    assert str(answers[3]) == "what it is given is no JSON, or nested too deeply"
    assert answers[5] == ("<object>", [])
    assert str(answers[7]) == "line 1: division by zero"
    assert "GiB of memory" in str(answers[9])
    assert answers[4] == ("x" * 300_000, [])
    assert all(answer == (str(n), []) for n, answer in enumerate(answers) if n not in (3, 4, 5, 7, 9))
    process.close()


def test_a_batch_goes_on_after_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    process = TemplateProcess("{{ messages }}")
    process.render([{"messages": "a"}])
    os.kill(process._process.pid, signal.SIGKILL)
    assert process.render([{"messages": str(n)} for n in range(50)]) == [(str(n), []) for n in range(50)]
    process.close()
