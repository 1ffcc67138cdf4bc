"""Documents to batches of token rows, in an order that depends on the seed and the epoch only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer

from tuili.train.batch import TrainBatch
from tuili.train.corpus import Document
from tuili.train.prompts import SYSTEMS, Prompter
from tuili.train.recast import recast
from tuili.train.recipe import DataRecipe
from tuili.train.tokenizer import END, END_OF_TEXT, START

#: Ids, and how many of the first of them are not learned.
Row = tuple[list[int], int]
#: Where a raw text may begin other than at its document's beginning: at a sentence, or at any word; and how often.
SENTENCE, WORD = re.compile(r"(?<=[.!?] )(?=[A-Z\"])|(?<=\n)(?=\S)"), re.compile(r"(?<=\s)(?=[A-Za-z])")
SENTENCE_SHARE, WORD_SHARE = 0.4, 0.2
#: Characters that a raw text has at least.
LEAST = 200
#: Held-out prompts are drawn with this seed whatever the recipe's, so that losses of all runs compare.
HELD_OUT_SEED = 1


@dataclass
class Cursor:
    """Where the stream of documents stands."""

    epoch: int = 0
    index: int = 0


class Stories:
    """Documents as chats and as raw text. ``row`` takes a share of them as text; each epoch words prompts anew."""

    def __init__(
        self, documents: list[Document], prompter: Prompter, tokenizer: Tokenizer, recipe: DataRecipe, seed: int
    ):
        self.documents, self.prompter, self.tokenizer = documents, prompter, tokenizer
        self.categories, self.max_len, self.seed = recipe.categories, recipe.max_len, seed
        self.recast, self.raw, self.passage = recipe.recast, recipe.raw, recipe.passage or recipe.max_len
        self.answers = self.encode(documents)

    def encode(self, documents: list[Document]) -> list[np.ndarray]:
        """Ids of the answers, with the end of the turn."""
        encoded = self.tokenizer.encode_batch([d.text + END + "\n" for d in documents])
        return [np.array(e.ids, dtype=np.uint16) for e in encoded]

    def row(self, index: int, epoch: int, copy: int) -> Row:
        """Document ``index`` as it is trained in this epoch: as raw text, or as a chat."""
        random = Random(f"{self.seed}/{epoch}/{copy}/raw/{self.documents[index].text[:200]}")
        return self.text(index, random) if random.random() < self.raw else self.chat(index, epoch, copy)

    def text(self, index: int, random: Random | None = None) -> Row:
        """Ids of document ``index`` as raw text with <|endoftext|> behind it, cut at ``max_len + 1``.

        No token stands before it, as none does before a raw prompt, so that its first one is not learned. With
        ``random``, some texts begin inside of their document, as a user's prompt may.
        """
        text = self.documents[index].text
        begin = beginning(text, random) if random else 0
        limit = self.passage if begin else self.max_len
        return self.tokenizer.encode(text[begin:] + END_OF_TEXT).ids[: limit + 1], 1

    def chat(self, index: int, epoch: int, copy: int = 0) -> Row:
        """Ids of the chat of document ``index``, cut at ``max_len + 1``, and how many of them are the prompt's."""
        document = self.documents[index]
        random = Random(f"{self.seed}/{epoch}/{copy}/{document.text[:200]}")
        system = f"{START}system\n{random.choice(SYSTEMS)}{END}\n" if random.random() < 0.06 else ""
        told = recast(document, random) if epoch >= 0 and random.random() < self.recast else None
        if told is not None:
            ask = self.prompter.ask(told.document, random, told.topics)
            answer = self.encode([told.document])[0][: self.passage]
        else:
            ask, answer = self.prompter.ask(document, random), self.answers[index]
        prompt = self.tokenizer.encode(f"{system}{START}user\n{ask}{END}\n{START}assistant\n").ids
        return (prompt + answer.tolist())[: self.max_len + 1], len(prompt)

    def order(self, epoch: int) -> list[tuple[int, int]]:
        """(index, copy) of every document, as often as its category is listed."""
        order = [(i, copy) for i, d in enumerate(self.documents) for copy in range(self.categories.count(d.category))]
        Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def tokens(self) -> int:
        """Tokens of answers in an epoch."""
        return sum(len(self.answers[index]) for index, _ in self.order(0))

    def batch(self, cursor: Cursor, tokens: int) -> list[Row]:
        """The next rows, at least ``tokens`` tokens of them; moves ``cursor``."""
        rows: list[Row] = []
        order = self.order(cursor.epoch)
        total = 0
        while total < tokens:
            if cursor.index == len(order):
                cursor.epoch, cursor.index = cursor.epoch + 1, 0
                order = self.order(cursor.epoch)
            index, copy = order[cursor.index]
            rows.append(self.row(index, cursor.epoch, copy))
            cursor.index += 1
            total += len(rows[-1][0]) - 1
        return rows


def beginning(text: str, random: Random) -> int:
    """Where a raw text begins in its document: 0 mostly, else at a sentence or a word."""
    draw = random.random()
    if draw >= SENTENCE_SHARE + WORD_SHARE:
        return 0
    places = (SENTENCE if draw < SENTENCE_SHARE else WORD).finditer(text, 0, max(0, len(text) - LEAST))
    return random.choice([0, *(m.start() for m in places)])


def pack(rows: list[Row], tokens: int) -> list[TrainBatch]:
    """``rows`` in groups of at most ``tokens`` tokens (one row at least), longest group first."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: -len(r[0])):
        fit = next((g for g in groups if sum(len(ids) - 1 for ids, _ in g) + len(row[0]) - 1 <= tokens), None)
        if fit is None:
            groups.append([row])
        else:
            fit.append(row)
    return [join(group) for group in groups]


def join(rows: list[Row]) -> TrainBatch:
    """One batch of ``rows``; of chats, only the answers' tokens are learned."""
    ids: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    starts = [0]
    for row, prompt in rows:
        ids += row[:-1]
        targets += [-100] * (prompt - 1) + row[prompt:]
        positions += range(len(row) - 1)
        starts.append(len(ids))
    return TrainBatch(torch.tensor(ids), torch.tensor(targets), torch.tensor(positions), tuple(starts))


def held_out(stories: Stories, limit: int, raw: bool) -> list[TrainBatch]:
    """Held-out documents as raw texts or as chats, at most ``limit``, evenly over all, always the same, with the same
    prompts."""
    step = max(1, -(-len(stories.documents) // limit))
    chosen = range(0, len(stories.documents), step)
    return [join([stories.text(index) if raw else stories.chat(index, -1)]) for index in chosen]
