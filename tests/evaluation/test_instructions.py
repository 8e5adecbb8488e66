"""The suite `instructions` asks what its file says and counts as IFEval does; its own file is sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.data.preparing import prepare_data
from mamba_sft.evaluation import instructions
from mamba_sft.evaluation.instructions import (
    CONSTRAINT,
    LONGEST,
    LONGEST_OF_SMALL,
    NAME,
    PROMPT,
    Instructions,
    what_is_met,
)
from mamba_sft.evaluation.prompts import (
    Prompt,
    exact_match,
    load_prompts,
    pair,
    read_samples,
    score_name,
    write_samples,
)
from mamba_sft.evaluation.settings import Settings
from mamba_sft.inference import generation
from mamba_sft.inference.answer import Answer
from mamba_sft.inference.chat_model import ChatModel, load_chat_model
from mamba_sft.inference.model_places import ModelPlace, find_place
from mamba_sft.model.chat_template import prepare_tokenizer
from mamba_sft.recipe.fields import ChatSection, DataSection
from tests.conftest import build_model, build_tokenizer

OWN = Path(__file__).parents[2] / "data" / "instructions.jsonl"
QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart-heldout.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tiny"
    build_model().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def place(base: Path) -> ModelPlace:
    return find_place(base)


@pytest.fixture(scope="module")
def chat_model(base: Path) -> ChatModel:
    return load_chat_model(base, needs_template=False)


@pytest.fixture
def asked(tmp_path: Path) -> str:
    path = tmp_path / "asked.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "Say hello.", "checks": {"contains": ["hello"], "words": {"at_most": 2}, "stops": True}},
        {"prompt": "Say no.", "expected": "no"},
        {"prompt": "Count.", "answer": "1 2", "checks": {"stops": True}, "id": "c"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def give(monkeypatch: pytest.MonkeyPatch, *given: tuple[str, str]) -> list[Any]:
    """Has the model answer these; returns what it was asked with."""
    calls: list[Any] = []

    def answers(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[Answer]:
        calls.append((prompts, options))
        found = [Answer(text, reason, 1) for text, reason in given]  # type: ignore[arg-type]
        for number, answer in enumerate(found):
            options["on_answer"](number, answer)
        return found

    monkeypatch.setattr(generation, "answers", answers)
    return calls


def test_a_prompt_counts_as_a_whole_and_a_constraint_by_itself(
    monkeypatch: pytest.MonkeyPatch, place: ModelPlace, chat_model: ChatModel, asked: str
) -> None:
    give(monkeypatch, ("Hello there you", "stop"), ("no", "length"), ("1 2", "stop"))
    suite, settings, told = Instructions(), Settings(rows=asked), []
    assert suite.problems(place, settings) == []
    tasks = suite.prepare(place, settings)
    (scores,) = suite.measure(chat_model, tasks, settings, lambda *what: told.append(what))
    assert scores.metrics[PROMPT].totals == (0.0, 1.0, 1.0)
    assert scores.metrics[CONSTRAINT].totals == (2.0, 1.0, 2.0)
    assert scores.metrics[CONSTRAINT].weights == (3.0, 1.0, 2.0)
    assert scores.metrics[PROMPT].mean == pytest.approx(2 / 3)
    assert scores.metrics[CONSTRAINT].mean == pytest.approx(5 / 6)
    assert scores.samples[0]["met"] == {"contains": True, "words": False, "stops": True}
    assert told[-1] == (NAME, 3, 3)


def test_an_answer_that_was_cut_off_does_not_stop(
    monkeypatch: pytest.MonkeyPatch, place: ModelPlace, chat_model: ChatModel, asked: str
) -> None:
    give(monkeypatch, ("hello", "length"), ("yes", "stop"), ("1 2", "length"))
    suite, settings = Instructions(), Settings(rows=asked)
    (scores,) = suite.measure(chat_model, suite.prepare(place, settings), settings, lambda *_: None)
    assert scores.metrics[PROMPT].totals == (0.0, 0.0, 0.0)
    assert scores.metrics[CONSTRAINT].totals == (2.0, 0.0, 1.0)


def test_a_real_model_answers(place: ModelPlace, chat_model: ChatModel, asked: str) -> None:
    suite, settings = Instructions(), Settings(rows=asked)
    tasks = suite.prepare(place, settings)
    one, eight = (
        next(suite.measure(chat_model, tasks, Settings(rows=asked, batch_size=size), lambda *_: None))
        for size in (1, 8)
    )
    assert [sample["given"] for sample in one.samples] == [sample["given"] for sample in eight.samples]
    assert one.documents == eight.documents


def test_a_model_with_a_template_is_asked_in_chats(
    monkeypatch: pytest.MonkeyPatch, base: Path, place: ModelPlace, asked: str
) -> None:
    from dataclasses import replace

    model = load_chat_model(base, needs_template=False)
    setup = prepare_tokenizer(model.tokenizer, ChatSection(), set())
    chats = replace(model, tokenizer=setup.tokenizer, system="be brief")
    suite = Instructions()
    texts = []
    for chosen, template in ((model, "auto"), (chats, "auto"), (chats, "off")):
        settings = Settings(rows=asked, chat_template=template)  # type: ignore[arg-type]
        calls = give(monkeypatch, *[("", "stop")] * 3)
        list(suite.measure(chosen, suite.prepare(place, settings), settings, lambda *_: None))
        texts.append(chosen.tokenizer.decode(calls[0][0][0]))
    assert texts[0] == texts[2] == "Say hello."
    assert texts[1].startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nSay hello.<|im_end|>"
    )
    assert suite.uses_template(Settings(), has_template=True)
    assert not suite.uses_template(Settings(), has_template=False)


def test_a_small_model_is_asked_what_small_ones_can_do(
    monkeypatch: pytest.MonkeyPatch, place: ModelPlace
) -> None:
    suite = Instructions()
    suite.prepare(place, Settings())
    assert suite.facts()["prompts"] == 24
    assert suite.facts()["longest_answer"] == LONGEST_OF_SMALL
    monkeypatch.setattr(instructions, "_weights", lambda _: 7_000_000_000)
    suite.prepare(place, Settings())
    assert suite.facts()["prompts"] == 80
    assert suite.facts()["longest_answer"] == LONGEST
    suite.prepare(place, Settings(limit=5, max_length=100))
    assert len(suite._prompts) == 5
    assert suite.facts()["longest_answer"] == 50  # half of it is left to the prompt


def test_what_cannot_be_scored_is_told(place: ModelPlace, tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "system": "s"}\n')
    (problem,) = Instructions().problems(place, Settings(rows=str(path)))
    assert "has `checks` or an `answer`" in problem.message
    path.write_text('{"prompt": "a", "checks": {"words": 3}}\n')
    (problem,) = Instructions().problems(place, Settings(rows=str(path)))
    assert f"{path}:1: the check `words` takes bounds" in problem.message
    assert problem.hint is not None
    assert "checks" in problem.hint
    path.write_text('{"prompt": "a", "answer": "b", "expected": "b"}\n')
    (problem,) = Instructions().problems(place, Settings(rows=str(path)))
    assert "two names of one thing" in problem.message
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n')
    assert Instructions().problems(place, Settings(rows=str(path))) == []
    Instructions().prepare(place, Settings(rows=str(path)))
    assert "1 prompts" in caplog.text or "1 prompt" in caplog.text


def test_the_file_that_comes_with_it_is_sound() -> None:
    prompts = load_prompts(OWN)
    everyday = [one for one in prompts if not one.small]
    small = [one for one in prompts if one.small]
    assert len({one.prompt for one in prompts}) == len(prompts)
    assert 60 <= len(everyday) <= 100
    assert len(small) >= 20
    assert all(any(check.kind == "stops" for check in one.checks) for one in prompts)
    assert all(len(one.checks) >= 2 for one in prompts)
    kinds = {check.kind for one in everyday for check in one.checks}
    assert kinds >= {"words", "sentences", "items", "contains", "lacks", "json", "case", "language", "times"}
    assert not any(all(what_is_met(one, "").values()) for one in prompts)  # saying nothing is no way


RIGHT = {
    "Explain in exactly two sentences": "The green goes out of them. Then leaves show their brown.",
    "Write a poem of exactly six lines": "a bridge\nof stone\nholds\nthe road\nup\nhigh",
    "Give a numbered list of four things": "1. Tyres\n2. Brakes\n3. Map\n4. Water",
    "Describe a market in the morning": (
        "Baskets are carried in, and people bargain loudly while thunder rolls over the roofs of the town."
    ),
    "Write a short advertisement for a pencil": "A sharp line, a sharp mind: buy our pencil today, for you.",
    "Give me a JSON object": '{"name": "Ana", "age": 4, "city": "Ulm"}',
    "Write a warning about wet paint": "CAREFUL: WET PAINT!",
    "Antworte auf Deutsch in zwei": "Der Körper ist am Abend müde. Im Schlaf erholt er sich und das Gehirn.",
    "Put your whole answer between": '"It is not for me to say."',
    "Write a dialogue of exactly four lines": "Baker: Yes?\nChild: Bread.\nBaker: Here.\nChild: Thanks.",
    "Write a recipe for lemonade": "1. Squeeze lemons.\n2. Add honey.\n3. Pour water.\n4. Stir.\n5. Cool.",
    "What is 17 plus 25?": "42",
    "Begin each of two lines": "Because we can.\nBecause it helps.",
    "Describe fog.": "Fog is a cloud on the ground.\n***",
}


@pytest.mark.parametrize("beginning", RIGHT)
def test_right_answers_are_right(beginning: str) -> None:
    (prompt,) = [one for one in load_prompts(OWN) if one.prompt.startswith(beginning)]
    met = what_is_met(prompt, RIGHT[beginning], stopped=True)
    assert all(met.values()), met
    assert not all(what_is_met(prompt, RIGHT[beginning], stopped=False).values())
    assert not all(what_is_met(prompt, "As an assistant I say this and that.", stopped=True).values())


def test_what_the_quickstart_teaches_answers_the_small_ones() -> None:
    """Its held-out questions have answers in the form that is checked."""
    known = {one.prompt: one.answer for one in load_prompts(QUICKSTART)}
    both = [one for one in load_prompts(OWN) if one.small and one.prompt in known]
    assert len(both) >= 8
    for prompt in both:
        assert all(what_is_met(prompt, str(known[prompt.prompt]), stopped=True).values()), prompt


def test_prompts_with_checks_are_scored_as_samples_and_kept(tmp_path: Path, asked: str) -> None:
    prompts = load_prompts(Path(asked))
    assert prompts[1].answer == "no"
    assert exact_match(prompts, ["hello", " no ", "1 2"]) == 1.0
    assert exact_match(prompts, ["hello to you", "no", "1 2 3"]) == pytest.approx(1 / 3)
    assert [one.is_scored for one in prompts] == [True, True, True]
    assert not Prompt("a").is_scored
    assert score_name(prompts) == "right answers"
    assert score_name([Prompt("a", "b")]) == "exact match"
    samples = pair(prompts, ["a", "b", "c"], ["hello", "no", "1 2"])
    write_samples(tmp_path / "samples.jsonl", samples)
    assert read_samples(tmp_path / "samples.jsonl") == samples


def test_the_digest_of_prompts_without_checks_stays_what_it_was() -> None:
    from mamba_sft.evaluation.prompts import prompts_digest

    assert prompts_digest([Prompt("a", "b")]) == "46cb19ac4716aa175949213dbefa14b5"


def test_a_file_of_tasks_is_a_source_of_training(tmp_path: Path) -> None:
    """What `expected` says is what is trained; `checks` and `small` are nothing to a model."""
    setup = prepare_tokenizer(build_tokenizer(), ChatSection(), {0, 11})
    rows = []
    for key in ("expected", "answer"):
        path = tmp_path / f"{key}.jsonl"
        given = [
            {"prompt": f"hello {i}", key: f"quick {i}", "checks": {"stops": True}, "small": True, "id": i}
            for i in range(4)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
        data = DataSection.model_validate({"sources": [{"path": str(path)}], "validation": 0})
        prepared = prepare_data(data, setup, system=None, seed=0)
        assert not prepared.summary.notes.unused
        rows.append([list(row) for row in prepared.train["input_ids"]])
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4


def test_prompts_that_are_cut_are_told(
    place: ModelPlace, chat_model: ChatModel, asked: str, caplog: pytest.LogCaptureFixture
) -> None:
    for longest, cut in ((200, 0), (2, 3), (1, 3)):
        suite, settings = Instructions(), Settings(rows=asked, max_length=longest, chat_template="off")
        caplog.clear()
        (scores,) = suite.measure(chat_model, suite.prepare(place, settings), settings, lambda *_: None)
        told = [text for text in caplog.messages if "lose their beginning" in text]
        assert len(scores.documents) == 3
        assert [text.split(" prompts ")[0] for text in told] == ([f"{cut} of 3"] if cut else [])
