"""Documents to batches of token rows, in an order that depends on the seed and the epoch only."""

from __future__ import annotations

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
from tuili.train.tokenizer import END, START

Row = tuple[list[int], int]


@dataclass
class Cursor:
    """Where the stream of documents stands."""

    epoch: int = 0
    index: int = 0


class Stories:
    """Documents as chats. ``row`` words the prompt anew in each epoch, and recasts a share of the documents."""

    def __init__(
        self, documents: list[Document], prompter: Prompter, tokenizer: Tokenizer, recipe: DataRecipe, seed: int
    ):
        self.documents, self.prompter, self.tokenizer = documents, prompter, tokenizer
        self.categories, self.max_len, self.seed = recipe.categories, recipe.max_len, seed
        self.recast = recipe.recast
        self.answers = self.encode(documents)

    def encode(self, documents: list[Document]) -> list[np.ndarray]:
        """Ids of the answers, with the end of the turn."""
        encoded = self.tokenizer.encode_batch([d.text + END + "\n" for d in documents])
        return [np.array(e.ids, dtype=np.uint16) for e in encoded]

    def row(self, index: int, epoch: int, copy: int = 0) -> Row:
        """Ids of the chat of document ``index``, cut at ``max_len + 1``, and how many of them are the prompt's."""
        document = self.documents[index]
        random = Random(f"{self.seed}/{epoch}/{copy}/{document.text[:200]}")
        system = f"{START}system\n{random.choice(SYSTEMS)}{END}\n" if random.random() < 0.06 else ""
        told = recast(document, random) if epoch >= 0 and random.random() < self.recast else None
        if told is not None:
            ask, answer = self.prompter.ask(told.document, random, told.topics), self.encode([told.document])[0]
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
    """One batch of ``rows``; only the answers' tokens are learned."""
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


def held_out(stories: Stories, limit: int) -> list[TrainBatch]:
    """Held-out chats, at most ``limit`` of them, evenly over all, always the same and with the same prompts."""
    step = max(1, -(-len(stories.documents) // limit))
    return [join([stories.row(index, -1)]) for index in range(0, len(stories.documents), step)]
