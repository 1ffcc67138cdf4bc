"""Recast stories tell of what their topics say, and of nothing that was replaced."""

from __future__ import annotations

import re
from random import Random

import pytest

from tuili.train.corpus import Document
from tuili.train.recast import CAST, exchange, plural, recast

STORY = (
    "Once upon a time there was a little boy named Jack who loved to paint. Jack lived near a castle.\n\n"
    "One day Jack took an old brush to the castle. The boy sang. Jack's friends, two boys, ran to the castles.\n\n"
    "Jack was happy."
)


def document(text: str) -> Document:
    return Document("generated-child", "a prompt", text)


@pytest.mark.parametrize("seed", range(60))
def test_every_topic_is_told_and_the_old_hero_is_gone(seed: int) -> None:
    told = recast(document(STORY), Random(seed))
    assert told is not None
    hero = re.search(r"\ban? (?:little )?(\w+) named Jack", told.document.text)
    assert hero is not None
    assert hero[1] in CAST
    assert not re.search(r"\bboys?\b", told.document.text)
    assert hero[1] in told.topics[0]
    for topic in told.topics[1:]:
        assert topic.split()[-1] in told.document.text
        assert "castle" not in told.document.text
    assert "Jack" in told.document.text


def test_topics_have_adjectives_that_the_story_does_not_know() -> None:
    told = [recast(document(STORY), Random(seed)) for seed in range(300)]
    words = [(topic.split(" named")[0].split(), t.document.text) for t in told if t is not None for topic in t.topics]
    assert all(article == ("an" if first[0] in "aeiou" else "a") for (article, first, *_), _ in words)
    unknown = [len(set(described) - set(re.findall(r"\w+", text))) for (_, *described, _noun), text in words]
    assert 0.15 < sum(count > 0 for count in unknown) / len(unknown) < 0.35
    assert max(unknown) == 2


def test_same_random_same_story() -> None:
    assert recast(document(STORY), Random(3)) == recast(document(STORY), Random(3))


def test_a_story_without_hero_place_or_thing_stays() -> None:
    assert recast(document("It rained. Nobody came, and that was all there was to say of it."), Random(0)) is None


@pytest.mark.parametrize(
    ("text", "old", "new", "wanted"),
    [
        ("A boy met the boy; boys ran.", "boy", "owl", "An owl met the owl; owls ran."),
        ("An owl's nest. Owls!", "owl", "fox", "A fox's nest. Foxes!"),
        ("a cowboy and a boy", "boy", "mouse", "a cowboy and a mouse"),
        ("the boys' kite", "boy", "mouse", "the mice' kite"),
    ],
)
def test_exchange_keeps_number_case_and_article(text: str, old: str, new: str, wanted: str) -> None:
    assert exchange(text, old, new) == wanted


@pytest.mark.parametrize(
    ("noun", "wanted"),
    [("fox", "foxes"), ("fairy", "fairies"), ("monkey", "monkeys"), ("sheep", "sheep"), ("fisherman", "fishermen")],
)
def test_plural(noun: str, wanted: str) -> None:
    assert plural(noun) == wanted
