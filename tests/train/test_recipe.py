"""Recipes: what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuili.base.errors import ConfigError
from tuili.train import recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_load(path: Path) -> None:
    loaded = recipe.load(path)
    assert Path(loaded.data.path).is_absolute()
    assert loaded.data.categories


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nsteps = 3\nlearning_rat = 1", r"unknown key 'train.learning_rat'"),
        ("[trian]\nsteps = 3", r"unknown key 'trian'. Did you mean 'train'"),
        ("[train]\nsteps = 'many'", r"train.steps: 'many' is no int"),
        ("[train]\nsteps = true", r"train.steps: True is no int"),
        ("[train]\nsteps = 3\nminutes = 3", r"give either steps or minutes"),
        ("name = 'x'", r"give either steps or minutes"),
        ("[train]\nsteps = 3\noptimizer = 'sgd'", r"train.optimizer: unknown 'sgd'"),
        ("[train]\nsteps = 3\nbetas = [0.9, 'a']", r"train.betas\[1\]: 'a' is no float"),
        ("[train]\nsteps = 3\n[model]\nnum_heads = 3", r"3 heads do not divide among 2 KV heads"),
        ("[train]\nsteps = 3\n[data]\nraw = 1.5", r"data.raw: a share from 0 to 1, not 1.5"),
        ("[train]\nsteps = 3\n[data]\nrecast = nan", r"data.recast: a share from 0 to 1, not nan"),
        ("[train\n", r"is not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        recipe.load(path)


def test_paths_are_relative_to_the_recipe_and_integers_do_for_floats(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[data]\npath = '../x.tar'\n[tokenizer]\npath = 'model'\n[train]\nminutes = 3\nbetas = [0, 1]")
    loaded = recipe.load(path)
    assert loaded.data.path == str(tmp_path.parent.resolve() / "x.tar")
    assert loaded.tokenizer.path == str(tmp_path.resolve() / "model")
    assert loaded.train.minutes == 3.0
    assert loaded.train.betas == (0.0, 1.0)
