"""The quickstart's chat data and its held-out exact-match set, from fixed seeds.

Nine small skills: some call up a fact from pre-training, some copy. Training questions draw on `SEEN`, the
exact-match questions on `HELD_OUT` (see `world.py`): no thing, country or animal that the held-out set asks
about occurs in any training example, and no training example asks for an opposite that it asks for.

Usage: python data/make_quickstart.py [DIRECTORY]     default: data/
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from make_corpus import one_of
from world import HELD_OUT, SEEN, Vocabulary, plural

TRAIN_ROWS, TRAIN_SEED = 3000, 20
HELD_OUT_ROUNDS, DRAWS, HELD_OUT_SEED = 24, 50, 21

Messages = list[dict[str, str]]


class Exchange(NamedTuple):
    """One question and its answer: as a sentence, and in brief."""

    prompt: str
    answer: str
    brief: str


Skill = Callable[[random.Random, Vocabulary], list[Exchange]]


def capital(rng: random.Random, words: Vocabulary) -> list[Exchange]:
    """The capital of a country of the almanac."""
    land = rng.choice(words.countries)
    form = one_of(
        rng, "What is the capital of {}? | Name the capital of {}. | Which city is the capital of {}?"
    )
    return [Exchange(form.format(land.name), f"The capital of {land.name} is {land.capital}.", land.capital)]


def river(rng: random.Random, words: Vocabulary) -> list[Exchange]:
    """The river of a country of the almanac."""
    land = rng.choice(words.countries)
    form = one_of(rng, "What is the river of {}? | Name the river of {}. | Which river flows through {}?")
    return [Exchange(form.format(land.name), f"The river of {land.name} is the {land.river}.", land.river)]


def opposite(rng: random.Random, words: Vocabulary) -> list[Exchange]:
    """The opposite of a word of the dictionary."""
    left, right = rng.sample(rng.choice(words.opposites), 2)
    form = one_of(rng, "What is the opposite of {}? | Name the opposite of {}. | What is the reverse of {}?")
    return [Exchange(form.format(left), f"The opposite of {left} is {right}.", right)]


def several(rng: random.Random, words: Vocabulary) -> list[Exchange]:
    """The plural of a noun."""
    noun = rng.choice(words.things)
    form = one_of(
        rng, "What is the plural of {}? | Name the plural of {}. | How do you say more than one {}?"
    )
    return [Exchange(form.format(noun), f"The plural of {noun} is {plural(noun)}.", plural(noun))]


def young(rng: random.Random, words: Vocabulary) -> list[Exchange]:
    """What the young of an animal is called."""
    animal, child = rng.choice(list(words.young.items()))
    form = one_of(rng, "What is a young {} called? | Name the young of a {}. | What do you call a young {}?")
    return [Exchange(form.format(animal), f"A young {animal} is called a {child}.", child)]


def repeat(rng: random.Random, words: Vocabulary) -> list[Exchange]:
    """Copy a list."""
    text = ", ".join(_some(rng, words))
    form = one_of(rng, "Say this again: {}. | Repeat these words: {}. | Give me the list again: {}.")
    return [Exchange(form.format(text), f"Once more: {text}.", text)]


def backwards(rng: random.Random, words: Vocabulary) -> list[Exchange]:
    """Turn a list around."""
    listed = _some(rng, words)
    form = one_of(
        rng, "Say this backwards: {}. | Turn the list around: {}. | Write these words in reverse: {}."
    )
    turned = ", ".join(reversed(listed))
    return [Exchange(form.format(", ".join(listed)), f"Backwards: {turned}.", turned)]


def first(rng: random.Random, words: Vocabulary) -> list[Exchange]:
    """The first word of a list."""
    listed = _some(rng, words)
    form = one_of(
        rng, "Which word is first: {}? | What is the first word here: {}? | Name the first word: {}."
    )
    return [Exchange(form.format(", ".join(listed)), f"The first word is {listed[0]}.", listed[0])]


def last(rng: random.Random, words: Vocabulary) -> list[Exchange]:
    """The last word of a list."""
    listed = _some(rng, words)
    form = one_of(rng, "Which word is last: {}? | What is the last word here: {}? | Name the last word: {}.")
    return [Exchange(form.format(", ".join(listed)), f"The last word is {listed[-1]}.", listed[-1])]


def _some(rng: random.Random, words: Vocabulary) -> list[str]:
    return rng.sample(words.things, rng.randint(2, 3))


SKILLS: list[Skill] = [capital, backwards, several, repeat, river, first, opposite, last, young]

SMALL_TALK = [
    ("Hello!", "Hello! Ask me a short question."),
    ("Hi there.", "Hello! Ask me a short question."),
    ("Good morning!", "Good morning! Ask me a short question."),
    ("Who are you?", "I am a very small Mamba that answers short questions."),
    ("What are you?", "I am a very small Mamba that answers short questions."),
    ("What can you do?", "I can answer short questions about people, things, words and numbers."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye.", "Goodbye! Come back soon."),
]


def turns(*pairs: tuple[str, str]) -> Messages:
    """Prompts and answers as messages."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def single(rng: random.Random) -> Messages:
    """One question, one answer."""
    exchange = _question(rng)
    return turns((exchange.prompt, exchange.answer))


def several_questions(rng: random.Random) -> Messages:
    """Two or three questions that have nothing to do with each other."""
    return turns(*((e.prompt, e.answer) for e in [_question(rng) for _ in range(rng.randint(2, 3))]))


def follow_up(rng: random.Random) -> Messages:
    """A second request about the list of the first turn."""
    listed = _some(rng, SEEN)
    text, turned = ", ".join(listed), ", ".join(reversed(listed))
    return turns(
        (f"Say this again: {text}.", f"Once more: {text}."),
        (one_of(rng, "And backwards? | Now backwards. | Now turn it around."), f"Backwards: {turned}."),
    )


def in_brief(rng: random.Random) -> Messages:
    """A system message that asks for the answer without its sentence."""
    system = {"role": "system", "content": one_of(rng, "Be brief. | Answer as briefly as you can.")}
    return [
        system,
        *turns(*((e.prompt, e.brief) for e in [_question(rng) for _ in range(rng.randint(1, 2))])),
    ]


def in_full(rng: random.Random) -> Messages:
    """A system message that asks for what is done anyway."""
    system = {"role": "system", "content": one_of(rng, "Answer in a full sentence. | You are helpful.")}
    return [system, *single(rng)]


def talk(rng: random.Random) -> Messages:
    """Greetings and thanks, alone or before a question."""
    greeting = turns(rng.choice(SMALL_TALK))
    return greeting if rng.random() < 0.5 else [*greeting, *single(rng)]


def _question(rng: random.Random) -> Exchange:
    return rng.choice(rng.choice(SKILLS)(rng, SEEN))


CHATS: dict[Callable[[random.Random], Messages], float] = {
    single: 0.62,
    several_questions: 0.10,
    follow_up: 0.08,
    in_brief: 0.08,
    in_full: 0.05,
    talk: 0.07,
}


def training_rows() -> Iterator[dict[str, Any]]:
    """Chats in OpenAI's messages format."""
    rng = random.Random(TRAIN_SEED)
    for chat in rng.choices(list(CHATS), list(CHATS.values()), k=TRAIN_ROWS):
        yield {"messages": chat(rng)}


def held_out_rows() -> Iterator[dict[str, str]]:
    """Questions with their one right answer, the skills in turn, no question twice.

    Some skills have few held-out questions; they are left out of a round when chance finds no new one.
    """
    rng = random.Random(HELD_OUT_SEED)
    asked: set[str] = set()
    for skill in SKILLS * HELD_OUT_ROUNDS:
        drawn = [rng.choice(skill(rng, HELD_OUT)) for _ in range(DRAWS)]
        new = next((exchange for exchange in drawn if exchange.prompt not in asked), None)
        if new is not None:
            asked.add(new.prompt)
            yield {"prompt": new.prompt, "answer": new.answer}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    write_jsonl(target / "quickstart.jsonl", training_rows())
    write_jsonl(target / "quickstart-heldout.jsonl", held_out_rows())
    print(f"wrote {target}/quickstart.jsonl and {target}/quickstart-heldout.jsonl")
