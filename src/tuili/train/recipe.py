"""A training recipe: a TOML file into frozen dataclasses. Unknown keys, wrong types and impossible values are named."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from tuili.base.config import read_toml
from tuili.base.errors import ConfigError, nearest


@dataclass(frozen=True)
class DataRecipe:
    path: str = "../../shared/data/text/stories.tar.xz"
    #: A category listed n times is seen n times in each epoch, under other prompts.
    categories: tuple[str, ...] = ()
    #: Longest chat in tokens; longer ones are cut.
    max_len: int = 1024
    #: Share of the documents that are told with another hero, place or thing than the corpus has.
    recast: float = 0.0
    #: Share of the documents that are plain text, without a chat around them.
    raw: float = 0.0
    #: Tokens of a raw text that begins inside its document, and of an answer with another hero, place or thing; 0: all.
    #: It is beginnings that are learned from both, and short ones are more.
    passage: int = 0


@dataclass(frozen=True)
class TokenizerRecipe:
    vocab_size: int = 4096
    #: Take the tokenizer of this model directory instead of making one.
    path: str = ""


@dataclass(frozen=True)
class ModelRecipe:
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10_000.0


@dataclass(frozen=True)
class TrainRecipe:
    """The length of the run is ``steps`` or, by the clock, ``minutes``; exactly one is given."""

    steps: int = 0
    minutes: float = 0.0
    batch_tokens: int = 16_384
    #: Tokens of one forward and backward pass.
    micro_tokens: int = 2048
    optimizer: str = "muon"
    lr: float = 3e-3
    warmup_steps: int = 50
    #: Share of the run at the end over which the rate falls to zero.
    decay: float = 0.25
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    grad_clip: float = 1.0
    #: What forward and backward run in; auto: bfloat16 on GPUs and on CPUs that have it in hardware, else float32.
    dtype: str = "auto"
    seed: int = 0
    #: Begin with the weights of this model directory (a second stage); empty: with random ones.
    start: str = ""
    #: Replicas of the model, one thread each; 0: one per core on a CPU, one on a GPU.
    workers: int = 0


@dataclass(frozen=True)
class ReportRecipe:
    """Intervals in seconds."""

    line_every: float = 30.0
    eval_every: float = 600.0
    checkpoint_every: float = 300.0
    #: Held-out documents of the evaluations during the run; the last one takes all.
    eval_documents: int = 40
    sample_tokens: int = 300
    sample_prompts: tuple[str, ...] = ("Tell a bedtime story about a dragon who is afraid of the dark.",)
    #: Raw texts that the samples continue.
    openings: tuple[str, ...] = ("Once upon a time",)
    #: Topics asked for at the end, "a *fox* and a lighthouse": does the answer name the word between the stars?
    topics: tuple[str, ...] = ()
    #: Answers drawn for each topic, and their length.
    topic_draws: int = 5
    topic_tokens: int = 160


@dataclass(frozen=True)
class Recipe:
    name: str = "model"
    data: DataRecipe = field(default_factory=DataRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    report: ReportRecipe = field(default_factory=ReportRecipe)

    def __post_init__(self) -> None:
        if bool(self.train.steps) == bool(self.train.minutes):
            raise ConfigError("train: give either steps or minutes")
        choices = (("optimizer", ("muon", "adamw")), ("dtype", ("auto", "bfloat16", "float32")))
        for key, known in choices:
            if (value := getattr(self.train, key)) not in known:
                raise ConfigError(f"train.{key}: unknown {value!r}.{nearest(value, known)}")
        if len(self.train.betas) != 2:
            raise ConfigError(f"train.betas: two numbers, not {list(self.train.betas)}")
        for topic in self.report.topics:
            if topic.count("*") != 2:
                raise ConfigError(
                    f"report.topics: {topic!r} has no word between stars, as in 'a *fox* and a lighthouse'"
                )
        for key in ("recast", "raw"):
            if not 0 <= (share := getattr(self.data, key)) <= 1:
                raise ConfigError(f"data.{key}: a share from 0 to 1, not {share}")
        m = self.model
        if m.num_heads % m.num_kv_heads:
            raise ConfigError(f"model: {m.num_heads} heads do not divide among {m.num_kv_heads} KV heads")


def load(path: Path) -> Recipe:
    """The recipe in TOML file ``path``; paths in it are relative to its folder. ConfigError names the key at fault."""
    if not path.exists():
        raise ConfigError(f"no recipe at {path}")
    recipe: Recipe = build(Recipe, read_toml(path), "")
    here = path.resolve().parent
    given = recipe.tokenizer.path
    data = replace(recipe.data, path=str((here / recipe.data.path).resolve()))
    tokenizer = replace(recipe.tokenizer, path=str((here / given).resolve()) if given else "")
    start = recipe.train.start
    train = replace(recipe.train, start=str((here / start).resolve()) if start else "")
    return replace(recipe, data=data, tokenizer=tokenizer, train=train)


def build(kind: type[Any], content: dict[str, Any], where: str) -> Any:
    """A ``kind`` from a parsed table; ``where`` is the table's name for messages."""
    hints = get_type_hints(kind)
    names = {f.name for f in fields(kind)}
    values = {}
    for key, value in content.items():
        at = f"{where}.{key}" if where else key
        if key not in names:
            raise ConfigError(f"unknown key {at!r}.{nearest(key, names)}")
        values[key] = convert(hints[key], value, at)
    return kind(**values)


def convert(kind: Any, value: Any, at: str) -> Any:
    if is_dataclass(kind) and isinstance(value, dict):
        return build(kind, value, at)  # type: ignore[arg-type]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list) and kind in (tuple[str, ...], tuple[float, ...]):
        item = str if kind == tuple[str, ...] else float
        return tuple(convert(item, v, f"{at}[{i}]") for i, v in enumerate(value))
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ConfigError(f"{at}: {value!r} is no {getattr(kind, '__name__', kind)}")
