"""Stories retold with another hero, place or thing: only the prompt tells which, so that prompts must be read.

The corpus tells of boys and girls with magical things; a model of it writes of those, whatever it is asked for. Here a
noun is drawn at random (counterfactual augmentation, Lu et al., arXiv:1807.11714, for topics instead of genders).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from random import Random

from tuili.train.corpus import Document


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = frozenset(
    words("""
    boy girl man woman lady lad lass kid child fella fellow person adventurer warrior apprentice traveler guy
    gentleman explorer artist musician youth dreamer soul creature being
""")
)
CAST = words("""
    dragon fox robot rabbit owl bear squirrel cat mouse dog wolf lion tiger elephant penguin turtle frog hedgehog
    hare deer pony horse unicorn fairy wizard witch pirate knight princess prince king queen giant dwarf elf ghost
    monster goblin troll mermaid snail bee butterfly ladybug ant spider duck goose chicken hen rooster pig cow goat
    sheep lamb donkey monkey panda koala kangaroo whale dolphin octopus crab seal otter beaver badger raccoon skunk
    mole hamster parrot crow sparrow robin swan eagle bat kitten puppy bunny dinosaur snowman scarecrow doll
    astronaut scientist farmer baker sailor fisherman gardener teacher doctor painter inventor detective clown chef
    shepherd cowboy llama superhero blacksmith weaver giraffe zebra camel toad lizard caterpillar dragonfly worm
    pigeon peacock reindeer moose yeti phoenix mammoth alien vampire mummy skeleton tree cloud star teapot train
    boat toaster
""")
PLACES = words("""
    forest village town city castle cave garden house cabin cottage lighthouse library attic island beach meadow
    farm barn school museum park desert jungle mountain valley river lake pond mansion tower palace kitchen bakery
    market circus zoo hospital theater bridge harbor ship spaceship tent treehouse windmill swamp orchard canyon
    volcano temple shop basement cellar playground planet kingdom hill well iceberg submarine hotel
""")
THINGS = words("""
    map key book door mirror lantern hat paintbrush crystal stone box clock bell ring necklace feather flower seed
    kite balloon umbrella telescope compass violin flute drum piano guitar camera bicycle boat train rocket coin
    shell pearl egg cake pie cookie apple pumpkin candle lamp blanket quilt scarf coat teapot cup spoon broom wand
    sword shield crown letter puzzle machine wheel ladder bucket basket backpack whistle notebook pencil painting
    statue mop sock bottle chest flashlight amulet gem locket potion carpet sled wagon snowflake rainbow rose acorn
    carrot
""")
KINDS = (CAST, PLACES, THINGS)
#: People ask for "a wise old owl": words that a topic may have whatever the story says, so that its noun must be found.
ADJECTIVES = words("""
    wise old little brave tiny small big young lonely friendly grumpy shy clever kind lost magical sleepy curious golden
    silver strange happy sad red blue green white black silly gentle mysterious ancient abandoned enchanted hidden quiet
    beautiful haunted forgotten cheerful
""")
HERO = re.compile(
    r"\b[Aa]n? ((?:[a-z-]+,? ){0,3})([a-z]+) (?:named|called) ([A-Z][a-z]+)"
    r"( who (?:[a-z'-]+ ){1,7}[a-z'-]+(?=[,.]))?"
)
WORD = re.compile(r"[a-z]+")
IRREGULAR = {"mouse": "mice", "wolf": "wolves", "man": "men", "woman": "women", "child": "children", "goose": "geese"}
SAME = frozenset(("deer", "sheep", "moose", "reindeer"))


@dataclass(frozen=True)
class Recast:
    """A story retold, and the phrases that say what it is about now; the hero first."""

    document: Document
    topics: tuple[str, ...]


def recast(document: Document, random: Random) -> Recast | None:
    """``document`` with its hero, or a place or thing that matters in it, replaced; None where nothing fits."""
    text, taken = document.text, ""
    topics: list[str] = []
    hero = HERO.search(text[: len(text) // 2])
    if hero and (hero[2] in PEOPLE or hero[2] in CAST):
        new = random.choice(CAST)
        text, topic = retell_hero(text, hero, new, random)
        topics.append(topic)
        taken = new
    if (not topics or random.random() < 0.5) and (swap := choose(text, taken, random)):
        text = exchange(text, *swap)
        topics.append(with_article(described(swap[1], random)))
    return Recast(replace(document, text=text), tuple(topics)) if topics else None


def retell_hero(text: str, hero: re.Match[str], new: str, random: Random) -> tuple[str, str]:
    """The text with ``new`` as its hero, who is called by kind more often than before; and the topic."""
    adjectives, old, name, clause = hero.groups()
    adjectives = " ".join(re.findall("[a-z]+", adjectives)[-1:])
    text = exchange(text, old, new)
    share = random.uniform(0.15, 0.65)
    at = text.find(name) + len(name)
    starts = re.compile(rf"(?<=[.\n\"] ){name}\b(?!'s)|(?<=\n){name}\b(?!'s)")
    rest = starts.sub(lambda m: f"The {new}" if random.random() < share else m[0], text[at:])
    phrase = f"{adjectives} {new}" if adjectives and random.random() < 0.4 else described(new, random)
    topic = with_article(phrase)
    if random.random() < 0.35:
        topic += f" named {name}"
    if clause and random.random() < 0.5:
        topic += exchange(clause, old, new)
    return text[:at] + rest, topic


def described(noun: str, random: Random) -> str:
    """The noun, with one or two adjectives that the story does not know in two of five cases."""
    count = random.choice((0, 0, 0, 1, 2))
    return " ".join((*random.sample(ADJECTIVES, count), noun))


def choose(text: str, taken: str, random: Random) -> tuple[str, str] | None:
    """A place, thing or animal told of at least twice and early, and another of its kind that is not in the text."""
    early = set(WORD.findall(text[: len(text) // 3]))
    told = WORD.findall(text)
    for kind in random.sample(KINDS, len(KINDS)):
        known = [w for w in kind if w in early and w != taken and told.count(w) >= 2]
        others = [w for w in kind if w not in told]
        if known and others:
            return max(known, key=told.count), random.choice(others)
    return None


def exchange(text: str, old: str, new: str) -> str:
    """``text`` with ``new`` for ``old``, in singular and plural, small and capital, with the article that it needs."""

    def one(match: re.Match[str]) -> str:
        indefinite, word = match.groups()
        lower = word.lower()
        put = plural(new) if lower != old else new
        put = put.capitalize() if word[0].isupper() else put
        if not indefinite:
            return put
        phrase = with_article(put)
        return indefinite[0] + phrase[1:]

    forms = "|".join((old, old.capitalize(), plural(old), plural(old).capitalize()))
    return re.sub(rf"\b(?:([Aa]n?) )?({forms})\b", one, text)


def plural(noun: str) -> str:
    if noun in SAME:
        return noun
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith("man"):
        return noun[:-3] + "men"
    if noun.endswith(("s", "x", "sh", "ch")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def with_article(phrase: str) -> str:
    vowel = phrase[0] in "aeioAEIO" or phrase.startswith("um")
    return f"{'an' if vowel else 'a'} {phrase}"
