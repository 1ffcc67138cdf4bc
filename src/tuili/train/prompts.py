"""What a person might have asked to get this story: another wording, and another topic out of the story, in each epoch.

The corpus asks by title only; people ask by topic ("a story about a fox and a lighthouse").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from random import Random

from tuili.train.corpus import Document

#: A noun phrase ends where a function word or a comma follows; this spares a part-of-speech tagger.
NOUN = re.compile(
    r"\b(a|an|the|his|her|their) (?:[a-z]+ )?([a-z]{3,})"
    r"(?=[,.;!?]| (?:was|is|had|who|that|of|in|on|and|with|to|from|at|as|for|were|could)\b)"
)
NAMED = re.compile(r"\b(an? (?:[a-z'-]+,? ){0,4}?([a-z'-]+)) (?:named|called) ([A-Z][a-z]+)\b")
CLAUSE = re.compile(r"\b(an? (?:[a-z'-]+ ){1,3}(?:who|that) (?:[a-z'-]+ ){2,8}[a-z'-]+)[,.]")
NAME = re.compile(r"(?<=[a-z,] )([A-Z][a-z]{2,})\b")
TITLE = re.compile(r"`([^`]+?)\.?`")
DEED = re.compile(r"[A-Z][a-z]+ ([A-Z][a-z]+(?<!s)(?<!ou)s .+)")
ASKS = (
    *("Tell", "Tell me", "Write", "Please tell me", "Please write", "Write me"),
    *("Can you tell me", "Could you write", "I would like"),
)
#: The corpus calls its ornate tales bedtime stories; who asks for one is better served by its children's stories.
KINDS = {
    "generated-bedtime": ("fantasy story", "fantasy story", "tale", "story", "bedtime story"),
    "generated-campfire": ("campfire story", "campfire story", "spooky story", "ghost story"),
    "generated-child": ("bedtime story", "bedtime story", "children's story", "story for children", "story"),
    "llama-stories": ("story", "short story"),
    "llama-slice-of-life": ("slice-of-life story", "short story", "story"),
}
#: Nouns that are in every story.
COMMON = frozenset(
    re.findall(
        "[a-z]+",
        """way time day night end one world moment heart eyes hand hands face voice air ground side edge rest place part
        thing sound sense words feeling first same other others next top middle center feet head mind back while bit
        lot future past truth life story tale name people things days hours years year man woman few
        began seemed who""",
    )
)
#: Largest share of stories that may have a noun that is a topic.
TELLING = 0.06
SYSTEMS = ("You are a helpful assistant.", "You tell stories.", "You are a storyteller.")


class Prompter:
    """Words prompts; made from all training documents, whose noun counts tell the salient from the usual."""

    def __init__(self, documents: Iterable[Document]):
        #: Documents that have the noun, and times that it follows "a" and any determiner.
        self.spread: Counter[str] = Counter()
        self.single: Counter[str] = Counter()
        self.total: Counter[str] = Counter()
        self.count = 0
        for document in documents:
            self.count += 1
            found = [(determiner, w) for determiner, w in NOUN.findall(document.text) if w not in COMMON]
            self.spread.update({w for _, w in found})
            self.total.update(w for _, w in found)
            self.single.update(w for determiner, w in found if determiner in ("a", "an"))

    def ask(self, document: Document, random: Random, topics: tuple[str, ...] = ()) -> str:
        """A user's message that this document answers; ``topics`` are what a recast one is about."""
        draw = random.random()
        if topics:
            named = random.sample(topics, random.randint(1, len(topics)))
            return self.word(document, f" about {' and '.join(named)}", random)
        if draw < 0.12:
            return document.prompt
        topic = "" if draw < 0.14 else f" about {self.topic(document, random)}"
        return self.word(document, topic, random)

    def word(self, document: Document, topic: str, random: Random) -> str:
        """The request for a story of the document's kind, in one of many wordings."""
        kind = random.choice(KINDS.get(document.category, ("story",)))
        verb = random.choice(ASKS)
        end = "?" if verb.startswith(("Can", "Could")) else "."
        ask = f"{verb} {article(kind)} {kind}{topic}{end}"
        return ask.lower() if random.random() < 0.04 else ask

    def topic(self, document: Document, random: Random) -> str:
        """The title, what somebody does, or who and what the story is about."""
        draw = random.random()
        title = TITLE.search(document.prompt)
        if title and draw < 0.2:
            return self.deed(document, title[1], random)
        clauses = CLAUSE.findall(document.text[: len(document.text) // 2])
        if clauses and draw < 0.32:
            return random.choice(clauses)
        things = [self.thing(w) for w in self.salient(document)]
        hero = self.hero(document, random) if random.random() < 0.4 or not things else ""
        count = random.choice((0, 1, 1, 1, 2) if hero else (1, 1, 1, 2, 3))
        chosen = random.sample(things[: count + 1], min(count, len(things)))
        *most, last = [hero] * bool(hero) + chosen or ["a dream"]
        return f"{', '.join(most)} and {last}" if most else last

    def deed(self, document: Document, title: str, random: Random) -> str:
        """The title as a topic: "Kevin Meets a Dragon" becomes "Kevin" or "a boy" "who meets a dragon"."""
        if found := DEED.fullmatch(title):
            return f"{self.hero(document, random) or title.split()[0]} who {found[1].lower()}"
        first, *rest = title.split()
        known = first not in ("The", "A", "An") and first.removesuffix("'s") in NAME.findall(document.text)
        return " ".join((first if known else first.lower(), *(word.lower() for word in rest)))

    def salient(self, document: Document) -> list[str]:
        """Nouns that come early and often in this story and seldom in others; the most salient first."""
        early = {w for _, w in NOUN.findall(document.text[: len(document.text) // 3])}
        count = Counter(w for _, w in NOUN.findall(document.text) if w in early and w not in COMMON)
        scored = {w: n / (self.spread[w] + 10) ** 0.5 for w, n in count.items() if n >= 2 and self.telling(w)}
        return sorted(scored, key=lambda w: (-scored[w], w))[:5]

    def telling(self, noun: str) -> bool:
        """Whether few stories have the noun, so that naming it says something about the story."""
        return 3 <= self.spread[noun] <= TELLING * self.count

    def thing(self, noun: str) -> str:
        """The noun as a topic: "a fox", "stars", "the darkness"."""
        if noun.endswith("s"):
            return noun
        return f"{article(noun)} {noun}" if self.single[noun] > 0.15 * self.total[noun] else f"the {noun}"

    def hero(self, document: Document, random: Random) -> str:
        """Who the story is about, where it says so: with name, without, or the name alone; else empty."""
        named = NAMED.search(document.text[: len(document.text) // 2])
        if named:
            phrase, noun, name = named.groups()
            plain = f"{article(noun)} {noun}"
            phrase = plain if " was " in phrase else phrase
            return random.choice(
                (f"{phrase} named {name}", f"{plain} named {name}", f"{plain} named {name}", phrase, plain, name)
            )
        names = Counter(NAME.findall(document.text)).most_common(1)
        return names[0][0] if names and names[0][1] >= 3 else ""


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"
