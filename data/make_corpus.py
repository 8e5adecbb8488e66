"""Pre-training text for the tiny base: endless plain prose about the world of `world.py`, from a seed.

Stories, almanac pages, inventories, counting, word lists and market days. There is no chat in it: people in
stories wonder and ask, but nobody answers as an assistant, no text ends in a stop token, and a blank line is
all that parts two documents. What it teaches is what fine-tuning can call up later: facts, and looking back
at what was said a few sentences ago.

Usage: python data/make_corpus.py [DOCUMENTS]     prints a sample
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator

from world import (
    ANIMALS,
    ANIMALS_AND_YOUNG,
    COLOURS,
    COUNTRIES,
    DAYS,
    FEELINGS,
    FOODS,
    JOBS,
    OPPOSITES,
    PEOPLE,
    PLACES,
    THINGS,
    WEATHER,
    plural,
)

SEPARATOR = "\n\n"
NOUNS = THINGS + FOODS + ANIMALS


def one_of(rng: random.Random, texts: str) -> str:
    """One of the texts between the bars."""
    return rng.choice(texts.split("|")).strip()


def a(noun: str) -> str:
    """The noun with its article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def and_list(items: list[str]) -> str:
    """`x, y and z`."""
    return ", ".join(items[:-1]) + " and " + items[-1]


def topic(rng: random.Random, subject: str) -> str:
    """What turns the talk to a subject, or nothing."""
    return one_of(rng, f"About {subject}. | Now {subject}. | {rng.choice(PEOPLE)} asked about {subject}. | ")


def sentences(*parts: str) -> str:
    """The parts that are not empty, as one text."""
    return " ".join(part for part in parts if part)


def almanac(rng: random.Random) -> str:
    """Facts of one or more countries, one country a line."""
    return "\n".join(_country_page(rng) for _ in range(rng.randint(1, 3)))


def _country_page(rng: random.Random) -> str:
    country = rng.choice(COUNTRIES)
    name, capital, river = country.name, country.capital, country.river
    facts = [
        f"The capital of {name} is {capital}. | The capital of {name} is {capital}. |"
        f"{capital} is the capital of {name}. | The king of {name} lives in {capital}.",
        f"The river of {name} is the {river}. | The river of {name} is the {river}. |"
        f"The {river} flows through {name}.",
        f"The flag of {name} is {country.flag}. | The people of {name} have {a(country.flag)} flag.",
        f"The farmers of {name} grow {country.crop}. | {name} is known for its {country.crop}.",
        f"The animal of {name} is the {country.animal}. | In {name} people love the {country.animal}.",
    ]
    rng.shuffle(facts)
    opening = one_of(rng, f"{name} is a country. | {name} is far from here. | {topic(rng, name)}")
    return sentences(opening, *(one_of(rng, fact) for fact in facts[: rng.randint(1, 4)]))


def journey(rng: random.Random) -> str:
    """A traveller passes through countries whose facts come along."""
    person = rng.choice(PEOPLE)
    parts = [f"{person} the {rng.choice(JOBS)} went on a long journey."]
    for country in rng.sample(COUNTRIES, rng.randint(2, 4)):
        name, capital, river, flag = country.name, country.capital, country.river, country.flag
        stops = (
            f"On {rng.choice(DAYS)} {person} came to {name} and saw its capital, {capital}. |"
            f"In {name} {person} swam in the {river} and ate {country.crop}. |"
            f"Then {person} went to {name}. The capital of {name} is {capital}. |"
            f"{person} crossed the river of {name}. The river of {name} is the {river}. |"
            f"{person} saw {a(flag)} flag: the flag of {name} is {flag}."
        )
        parts.append(one_of(rng, stops))
    parts.append(f"At last {person} came home, {rng.choice(FEELINGS)} and {rng.choice(FEELINGS)}.")
    return " ".join(parts)


def inventory(rng: random.Random) -> str:
    """People, things, colours and places; later sentences say again what was said, in another order."""
    count = rng.choice([1, 1, 2, 2, 2, 3, 3])
    columns = [rng.sample(entries, count) for entries in (PEOPLE, THINGS, COLOURS, PLACES, FOODS)]
    scene = rng.choice([_owned, _seen, _put, _counted])
    facts: list[str] = []
    recalls: list[str] = []
    for person, thing, colour, place, food in zip(*columns, strict=True):
        goods = f"{rng.randint(2, 20)} {plural(food)}"
        fact, recalled = scene(person, thing, colour, place, goods)
        facts.append(one_of(rng, fact))
        recalls += [
            sentences(topic(rng, person if scene is _counted else f"the {thing}"), r) for r in recalled
        ]
    rng.shuffle(recalls)
    bridge = one_of(rng, f" | | So it is. | Now look. | Let us see. | It was {rng.choice(DAYS)}.")
    return sentences(*facts, bridge, *recalls[: rng.randint(3, 6)])


def _owned(person: str, thing: str, colour: str, place: str, goods: str) -> tuple[str, list[str]]:
    fact = f"{person} has {a(colour)} {thing}. | {person} found {a(colour)} {thing}."
    return fact, [f"The {thing} is {colour}.", f"The {thing} belongs to {person}."]


def _seen(person: str, thing: str, colour: str, place: str, goods: str) -> tuple[str, list[str]]:
    fact = f"The {thing} in the {place} is {colour}. | In the {place} is {a(colour)} {thing}."
    return fact, [f"The {thing} is {colour}.", f"The {thing} is in the {place}."]


def _put(person: str, thing: str, colour: str, place: str, goods: str) -> tuple[str, list[str]]:
    fact = f"{person} put the {thing} in the {place}. | {person} left {a(thing)} in the {place}."
    return fact, [f"The {thing} is in the {place}.", f"{person} had the {thing}."]


def _counted(person: str, thing: str, colour: str, place: str, goods: str) -> tuple[str, list[str]]:
    return f"{person} has {goods}. | {person} bought {goods}.", [f"{person} has {goods}."]


def story(rng: random.Random) -> str:
    """A little story about two people, a thing and a place."""
    one, two = rng.sample(PEOPLE, 2)
    place, other = rng.sample(PLACES, 2)
    thing, colour, weather, feeling = map(rng.choice, (THINGS, COLOURS, WEATHER, FEELINGS))
    opening = (
        f"Once there was {a(rng.choice(JOBS))} called {one}. | One {rng.choice(DAYS)} {one} woke up early. |"
        f"{one} lived near the {place}. | It was a day of {weather}, and {one} was {feeling}."
    )
    middle = [
        f"{one} had {a(colour)} {thing} and loved it very much.",
        f"{two} was a good friend of {one}. | {two} came to visit. | Next door lived {two}.",
        f"One evening the {thing} was gone. {one} asked {two} where the {thing} was. |"
        f"{two} asked {one} what colour the {thing} was. | They talked about the {weather} until night.",
        f"They looked in the {other}, but they found only {a(rng.choice(THINGS))}. |"
        f"{two} went to the {place} and looked behind the door. |"
        f'"Will the {weather} stop?" said {two}. Nobody knew. | "What shall we do?" said {one}.',
    ]
    ending = (
        f"In the end {two} found it in the {place}. The {thing} is {colour}, and it belongs to {one}. |"
        f"The {thing} is in the {place} to this day, and it is still {colour}. |"
        f"{two} gave {one} {a(rng.choice(FOODS))}, and {one} was {rng.choice(FEELINGS)} again. |"
        f"So {one} and {two} went home together, {feeling} but not alone."
    )
    return " ".join(one_of(rng, text) for text in [opening, *middle[: rng.randint(2, 4)], ending])


def dictionary(rng: random.Random) -> str:
    """What words mean: opposites, plurals, the young of animals."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        left, right = rng.sample(rng.choice(OPPOSITES), 2)
        noun, animal = rng.choice(NOUNS), rng.choice(ANIMALS)
        word, entry = rng.choice(
            [
                (left, f"The opposite of {left} is {right}. | What is not {left} may be {right}."),
                (noun, f"The plural of {noun} is {plural(noun)}. | One {noun}, two {plural(noun)}."),
                (f"the {animal}", f"A young {animal} is called a {ANIMALS_AND_YOUNG[animal]}."),
            ]
        )
        lines.append(sentences(topic(rng, word), one_of(rng, entry)))
    return rng.choice([" ", "\n"]).join(lines)


def numbers(rng: random.Random) -> str:
    """Counting up and down, neighbours of numbers, and small sums."""
    start = rng.randint(0, 90)
    counted = [str(n) for n in range(start, start + rng.randint(5, 12))]
    lines = [", ".join(counted if rng.random() < 0.7 else counted[::-1]) + "."]
    for _ in range(rng.randint(2, 5)):
        n, x, y = rng.randint(1, 99), rng.randint(1, 10), rng.randint(1, 10)
        line = one_of(rng, f"After {n} comes {n + 1}. | Before {n} comes {n - 1}. | {x} plus {y} is {x + y}.")
        lines.append(line if " plus " in line else sentences(topic(rng, str(n)), line))
    rng.shuffle(lines)
    return " ".join(lines)


def word_list(rng: random.Random) -> str:
    """A list of words, said again, and said backwards."""
    listed = rng.sample(NOUNS + PLACES, rng.randint(2, 4))
    one, two = rng.sample(PEOPLE, 2)
    text = ", ".join(listed)
    more = [
        f"Backwards: {', '.join(reversed(listed))}.",
        f"The first word is {listed[0]}.",
        f"The last word is {listed[-1]}.",
        f"{two} said it again: {text}. | Once more: {text}. | Once more: {text}.",
    ]
    rng.shuffle(more)
    opening = f"{one} said: {text}. | A list of words: {text}. | Words: {text}."
    return " ".join(one_of(rng, part) for part in [opening, *more[: rng.randint(2, 4)]])


def market(rng: random.Random) -> str:
    """A market day: goods, what else there was to see, and the goods again."""
    person, day, job = rng.choice(PEOPLE), rng.choice(DAYS), rng.choice(JOBS)
    goods = and_list(
        [f"{rng.randint(2, 20)} {plural(food)}" for food in rng.sample(FOODS, rng.randint(2, 4))]
    )
    things = and_list([a(f"{rng.choice(COLOURS)} {thing}") for thing in rng.sample(THINGS, 2)])
    parts = [
        f"On {day} {person} the {job} went to the market near the {rng.choice(PLACES)}.",
        f"{person} bought {goods}.",
        f"There was also {things} to see.",
        f"{a(rng.choice(ANIMALS)).capitalize()} slept in the {rng.choice(PLACES)}.",
        f"At home {person} counted again: {goods}.",
    ]
    return " ".join(parts[: rng.randint(3, 5)])


KINDS: dict[Callable[[random.Random], str], float] = {
    inventory: 0.44,
    word_list: 0.17,
    dictionary: 0.10,
    story: 0.10,
    almanac: 0.08,
    numbers: 0.06,
    journey: 0.03,
    market: 0.02,
}


def documents(seed: int) -> Iterator[str]:
    """Documents without end, the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        yield kind(rng)


if __name__ == "__main__":
    stream = documents(seed=0)
    print(SEPARATOR.join(next(stream) for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 20)))
