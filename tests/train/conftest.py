"""A corpus small enough to train on within a test, in the real archive's format."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from random import Random

import pytest
import torch

from tuili.train.recipe import DataRecipe, ModelRecipe, Recipe, ReportRecipe, TokenizerRecipe, TrainRecipe

ANIMALS = ("fox", "owl", "bear", "mouse", "whale", "hare")
PLACES = ("forest", "lighthouse", "village", "river", "castle")


def story(random: Random) -> str:
    """A record of the archive: prompt, title line, and a story about an animal and a place."""
    animal, place, name = random.choice(ANIMALS), random.choice(PLACES), random.choice(("Hilda", "Otto", "Mina"))
    body = f"Once upon a time there was a little {animal} named {name}. The {animal} was in the {place}, and the "
    body += f"{place} was “quiet”. " + f"The {animal} had a {place} of {random.randint(0, 10**6)} stars. " * 4
    return f"Write a bedtime story called `The {animal.title()}`.<start>**The {animal.title()}**\n\n{body}\n<end>\n\n"


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """260 stories of two categories, and a file of a third."""
    random = Random(0)
    path = tmp_path_factory.mktemp("corpus") / "stories.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for name, count in (
            ("data/night-1.md", 100),
            ("data/night-2.md", 100),
            ("data/day.md", 60),
            ("x/jokes-1.md", 5),
        ):
            content = "".join(story(random) for _ in range(count)).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """A model of a few thousand parameters, trained for eight steps."""
    return Recipe(
        name="tiny",
        data=DataRecipe(categories=("night", "day"), max_len=160),
        tokenizer=TokenizerRecipe(vocab_size=400),
        model=ModelRecipe(32, 48, 2, 2, 1, 16),
        train=TrainRecipe(steps=8, batch_tokens=600, micro_tokens=256, warmup_steps=2, lr=1e-2, workers=2),
        report=ReportRecipe(sample_tokens=8, eval_documents=4),
    )


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
