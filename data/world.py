"""The made-up world that the tiny base model grows up in: its words, its people and its facts.

Every fact is drawn once from a fixed seed, so the corpus, the quickstart questions and the tests all speak
of the same world. `HELD_OUT` names what no quickstart example may mention: the exact-match set asks about
exactly those things, so a right answer was learned in pre-training and only its format in fine-tuning.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


COLOURS = words("red blue green yellow white black brown grey pink orange purple silver golden")

PEOPLE = words("""
Mira Tom Anna Ben Clara David Ella Finn Greta Hugo Ida Jonas Kira Leo Maya Nils Olga Paul Rosa Sam Tara Uma
Viktor Wanda Yara Zeno Alma Boris Cora Dora Emil Flora Gus Hanna Ivan Jana Karl Lina Marco Nora Otto Petra
Rita Simon Tilda Vera Wim Zora Adam Berta Conrad Dina Edgar Frida Georg Helga Igor Julia Kurt Lotte Mona
Oskar Pia Ralf Selma Theo
""")

THINGS = words("""
lamp bowl kite boat drum book coat hat chair table spoon ladder basket bell box brush candle cart clock cup
door fan flag flute glove hammer jar key kettle knife lock map mirror mug needle net pencil pillow pipe
plate pot ring rope rug saw scarf shirt shoe shovel sock stamp stool sword tent towel toy tray trumpet vase
violin wagon whistle window
""")

FOODS = words("apple pear plum cherry carrot onion potato bean nut lemon peach melon turnip radish fig olive")

PLACES = words("""
barn kitchen garden attic cellar market school tower harbour forest library bakery mill stable church castle
cave meadow workshop station theatre museum shed yard hall tavern orchard pantry
""")

ANIMALS_AND_YOUNG = dict(
    pair.split("/")
    for pair in words("""
dog/puppy cat/kitten cow/calf horse/foal sheep/lamb goat/kid pig/piglet hen/chick duck/duckling
goose/gosling lion/cub deer/fawn frog/tadpole owl/owlet swan/cygnet hare/leveret
""")
)
ANIMALS = list(ANIMALS_AND_YOUNG)

OPPOSITES = [
    pair.split("/")
    for pair in words("""
hot/cold big/small old/new fast/slow high/low long/short wet/dry light/dark hard/soft full/empty loud/quiet
rich/poor strong/weak happy/sad clean/dirty early/late open/closed deep/shallow wide/narrow thick/thin
sweet/bitter near/far up/down left/right day/night summer/winter war/peace love/hate friend/enemy first/last
in/out over/under brave/afraid sharp/blunt smooth/rough tall/tiny
""")
]

IRREGULAR_PLURALS = dict(
    pair.split("/")
    for pair in words("knife/knives potato/potatoes goose/geese sheep/sheep deer/deer radish/radishes")
)

JOBS = words("""
baker miller farmer teacher sailor painter tailor carpenter doctor singer hunter gardener weaver potter
fisher smith shepherd cook writer mason
""")

WEATHER = ["rain", "snow", "wind", "fog", "sun", "storm", "frost", "hail"]
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
FEELINGS = words("glad tired proud hungry calm curious angry lonely cheerful sleepy")

_ONSETS = words("b br c d dr f g gl h k kr l m n p r s st t tr v w z")
_VOWELS = words("a e i o u")
_MIDDLES = words("l m n r s v nd lt rm st lv")
_COUNTRY_ENDINGS = words("ia land ania mark or istan")
_CITY_ENDINGS = words("ek um ov il ast en")
_RIVER_ENDINGS = words("a e o")


@dataclass(frozen=True)
class Country:
    """A country and what the almanac says of it."""

    name: str
    capital: str
    river: str
    flag: str
    crop: str
    animal: str


def plural(noun: str) -> str:
    """The plural of any noun of this world."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("ch", "sh", "s", "x")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def _new_name(rng: random.Random, endings: list[str], taken: set[str]) -> str:
    while True:
        syllables = [rng.choice(_ONSETS), rng.choice(_VOWELS), rng.choice(_MIDDLES), rng.choice(endings)]
        name = "".join(syllables).capitalize()
        if name not in taken:
            taken.add(name)
            return name


def _countries(count: int) -> list[Country]:
    rng = random.Random(1)
    taken: set[str] = set()
    return [
        Country(
            name=_new_name(rng, _COUNTRY_ENDINGS, taken),
            capital=_new_name(rng, _CITY_ENDINGS, taken),
            river=_new_name(rng, _RIVER_ENDINGS, taken),
            flag=rng.choice(COLOURS),
            crop=plural(rng.choice(FOODS)),
            animal=rng.choice(ANIMALS),
        )
        for _ in range(count)
    ]


COUNTRIES = _countries(48)


@dataclass(frozen=True)
class Vocabulary:
    """The part of the world that one set of questions may draw on."""

    people: list[str]
    things: list[str]
    places: list[str]
    countries: list[Country]
    opposites: list[list[str]]
    young: dict[str, str]
    numbers: list[int]


def _part(last: bool) -> Vocabulary:
    """Every third entry is held out; the rest may be used for fine-tuning."""

    def take(entries: list) -> list:
        return [entry for i, entry in enumerate(entries) if (i % 3 == 2) == last]

    return Vocabulary(
        people=take(PEOPLE),
        things=take(THINGS),
        places=take(PLACES),
        countries=take(COUNTRIES),
        opposites=take(OPPOSITES),
        young=dict(take(list(ANIMALS_AND_YOUNG.items()))),
        numbers=take(list(range(2, 99))),
    )


SEEN = _part(last=False)
HELD_OUT = _part(last=True)
