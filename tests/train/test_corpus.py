"""Reading, cleaning and splitting the archive; wording prompts; rows of batches."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuili.base.errors import ConfigError
from tuili.train import corpus, data, tokenizer
from tuili.train.prompts import Prompter
from tuili.train.recipe import DataRecipe


@pytest.fixture(scope="module")
def documents(archive: Path) -> list[corpus.Document]:
    return corpus.read(archive, ("night", "day"))


@pytest.fixture(scope="module")
def stories(documents: list[corpus.Document]) -> data.Stories:
    bpe = tokenizer.train((d.text for d in documents), 400)
    return data.Stories(documents, Prompter(documents), bpe, DataRecipe(categories=("night", "day"), max_len=160), 7)


def test_documents_are_cleaned(documents: list[corpus.Document]) -> None:
    assert 200 < len(documents) <= 260
    assert {d.category for d in documents} == {"night", "day"}
    assert all(d.text.startswith("Once upon a time") and '"quiet"' in d.text for d in documents)
    assert all(d.prompt.startswith("Write a bedtime story called `The ") for d in documents)


def test_a_missing_category_is_named(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no files of dawn"):
        corpus.read(archive, ("night", "dawn"))
    with pytest.raises(ConfigError, match=r"no corpus at .*--data"):
        corpus.read(tmp_path / "absent.tar.xz", ("night",))


def test_the_split_depends_on_the_text_alone() -> None:
    texts = [f"story {i}" for i in range(20_000)]
    held = {t for t in texts if corpus.Document("a", "b", t).held_out}
    assert held == {t for t in texts if corpus.Document("c", "d", t).held_out}
    assert 140 < len(held) < 260


def test_prompts_are_of_the_story(documents: list[corpus.Document]) -> None:
    prompter = Prompter(documents)
    asks = [prompter.ask(d, Random(i)) for i, d in enumerate(documents)]
    assert asks == [prompter.ask(d, Random(i)) for i, d in enumerate(documents)]
    assert len(set(asks)) > 50
    for document in documents:
        assert all(topic in document.text for topic in prompter.salient(document))


def test_only_answers_are_learned_and_targets_are_the_next_ids(stories: data.Stories) -> None:
    rows = stories.batch(data.Cursor(), 1000)
    batch = data.join(rows)
    for (ids, prompt), (a, b) in zip(rows, pairwise(batch.starts), strict=True):
        assert batch.ids[a:b].tolist() == ids[:-1]
        assert batch.positions[a:b].tolist() == list(range(len(ids) - 1))
        assert batch.targets[a:b].tolist() == [-100] * (prompt - 1) + ids[prompt:]
        text = stories.tokenizer.decode(ids[:prompt], skip_special_tokens=False)
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert stories.tokenizer.decode(ids[prompt:]).startswith("Once upon a time")


def raw_stories(stories: data.Stories, share: float) -> data.Stories:
    recipe = DataRecipe(categories=("night", "day"), max_len=160, raw=share, passage=60)
    return data.Stories(stories.documents, stories.prompter, stories.tokenizer, recipe, 7)


def test_raw_texts_begin_with_no_token_of_their_own_and_learn_all_but_the_first(
    stories: data.Stories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "LEAST", 20)
    made = raw_stories(stories, 1.0)
    assert stories.text(0)[0] == stories.tokenizer.encode(stories.documents[0].text + "<|endoftext|>").ids[:161]
    begun = []
    for index, document in enumerate(made.documents):
        ids, prompt = made.row(index, 0, 0)
        text = made.tokenizer.decode(ids, skip_special_tokens=False)
        begun.append(document.text.index(text.removesuffix("<|endoftext|>")))
        assert text.endswith("<|endoftext|>") or len(ids) == (60 if begun[-1] else 160) + 1
        assert data.join([(ids, prompt)]).targets.tolist() == ids[1:]
        assert begun[-1] == 0 or not document.text[begun[-1]].isspace()
        assert len(document.text) - begun[-1] >= data.LEAST
    inside = sum(b > 0 for b in begun) / len(begun)
    assert inside == pytest.approx(data.SENTENCE_SHARE + data.WORD_SHARE, abs=0.1)


def test_the_share_of_raw_texts_is_the_recipes_and_the_rest_is_as_before(stories: data.Stories) -> None:
    some = raw_stories(stories, 0.3)
    rows = [(some.row(i, 0, 0), stories.row(i, 0, 0)) for i in range(len(stories.documents))]
    raw = [i for i, (ids, prompt) in enumerate(row for row, _ in rows) if prompt == 1]
    assert len(raw) / len(rows) == pytest.approx(0.3, abs=0.1)
    assert all(row == before for i, (row, before) in enumerate(rows) if i not in raw)


def test_held_out_documents_are_measured_whole_in_both_forms(stories: data.Stories) -> None:
    made = raw_stories(stories, 0.5)
    for raw in (False, True):
        batches = data.held_out(made, 7, raw)
        assert len(batches) <= 7
        assert [b.ids.tolist() for b in batches] == [b.ids.tolist() for b in data.held_out(made, 7, raw)]
        assert all((b.targets[0] >= 0) == raw for b in batches)
        texts = [stories.tokenizer.decode(b.targets[b.targets >= 0].tolist()) for b in batches]
        assert all(" a time there was" in text for text in texts)


def test_an_epoch_holds_every_document_once_and_words_it_anew(stories: data.Stories) -> None:
    cursor = data.Cursor()
    seen = []
    while cursor.epoch == 0 and cursor.index < len(stories.documents):
        seen += stories.batch(cursor, 1)
    assert len(seen) == len(stories.documents)
    assert sorted(stories.order(0)) == sorted(stories.order(1)) == [(i, 0) for i in range(len(stories.documents))]
    assert stories.order(0) != stories.order(1)
    assert sum(stories.row(i, 0, 0) != stories.row(i, 1, 0) for i in range(100)) > 50


def test_a_category_listed_twice_is_seen_twice_under_other_prompts(stories: data.Stories) -> None:
    recipe = DataRecipe(categories=("night", "day", "night"), max_len=160)
    made = data.Stories(stories.documents, stories.prompter, stories.tokenizer, recipe, 7)
    count = {c: sum(d.category == c for d in stories.documents) for c in ("night", "day")}
    assert len(made.order(0)) == 2 * count["night"] + count["day"]
    assert sum(made.row(i, 0, 0) != made.row(i, 0, 1) for i in range(50)) > 25


@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(1, 80))
def test_packing_keeps_every_row_once(lengths: list[int], limit: int) -> None:
    rows = [([i] * n, 1) for i, n in enumerate(lengths)]
    packed = data.pack(rows, limit)
    assert sorted(torch.cat([b.ids for b in packed]).tolist()) == sorted(
        i for i, n in enumerate(lengths) for _ in range(n - 1)
    )
    assert all(len(b.ids) <= limit or len(b.starts) == 2 for b in packed)
