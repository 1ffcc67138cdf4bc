"""A training run: documents, weights, optimizer and where it stands. Steps, evaluates, saves, resumes."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tuili.base.errors import ConfigError, TuiliError, nearest
from tuili.base.hardware import probe
from tuili.layers.decoder import Decoder
from tuili.models.checkpoint import open_checkpoint
from tuili.models.weights import load_model
from tuili.train import checkpoint, corpus, data, loop, schedule, tokenizer
from tuili.train.export import model_spec
from tuili.train.optimizer import Optimizer
from tuili.train.prompts import Prompter
from tuili.train.recipe import Recipe

#: The checkpoint's file in a run's folder.
CHECKPOINT = "checkpoint.safetensors"
#: Arguments of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class Diverged(TuiliError):
    """Loss or gradient are no finite numbers any more; the last checkpoint is from before."""


class TrainingRun:
    """A training run in folder ``out``: all that a step needs, and where it stands."""

    def __init__(self, recipe: Recipe, archive: Path, out: Path, device: torch.device):
        self.recipe, self.out, self.device = recipe, out, device
        out.mkdir(parents=True, exist_ok=True)
        documents = corpus.read(archive, recipe.data.categories)
        training = [d for d in documents if not d.held_out]
        self.tokenizer = self._tokenizer(training)
        prompter = Prompter(training)
        made = (prompter, self.tokenizer, recipe.data)
        self.stories = data.Stories(training, *made, recipe.train.seed)
        self.held_out = data.Stories([d for d in documents if d.held_out], *made, data.HELD_OUT_SEED)
        workers = recipe.train.workers or (1 if device.type != "cpu" else os.cpu_count() or 1)
        dtype = dtype_of(recipe.train.dtype, device)
        self.team = loop.Team(model_spec(recipe), dtype, device, workers)
        model = self.team.replicas[0].model
        loop.initialize(model, recipe.train.seed)
        if recipe.train.start:
            start_from(recipe.train.start, model)
        self.master = {n: p.detach().float().clone() for n, p in model.named_parameters()}
        fast, slow = recipe.train.betas
        muon = recipe.train.optimizer == "muon"
        self.optimizer = Optimizer(model, self.master, muon, (fast, slow), recipe.train.weight_decay, dtype)
        self.progress = checkpoint.Progress()

    def _tokenizer(self, training: list[corpus.Document]) -> Tokenizer:
        """The recipe's, or a new one; kept in the run's folder, so that resuming takes the same."""
        own = self.out / "tokenizer.json"
        given, size = self.recipe.tokenizer.path, self.recipe.tokenizer.vocab_size
        source = Path(given) / "tokenizer.json" if given else own
        if source.is_file():
            made = Tokenizer.from_file(str(source))
        elif given:
            raise ConfigError(f"tokenizer.path: no tokenizer at {source}; train the model that it belongs to first")
        else:
            made = tokenizer.train((d.text for d in training), size)
        if made.get_vocab_size() > size:
            raise ConfigError(f"tokenizer.vocab_size: {size}, but {source} has {made.get_vocab_size()} entries")
        made.save(str(own))
        return made

    @property
    def done(self) -> float:
        """Share of the run that is over."""
        r = self.recipe.train
        return self.progress.step / r.steps if r.steps else self.progress.seconds / (60 * r.minutes)

    def step(self) -> tuple[loop.StepReport, float]:
        """One update; returns what it measured and its learning rate."""
        r, p = self.recipe.train, self.progress
        lr = r.lr * schedule.factor(p.step, self.done, r.warmup_steps, r.decay)
        cursor = data.Cursor(p.epoch, p.index)
        batches = data.pack(self.stories.batch(cursor, r.batch_tokens), r.micro_tokens)
        self.team.read(self.master)
        grads, loss = self.team.gradient(batches)
        norm = loop.clip(grads, r.grad_clip)
        if not math.isfinite(norm):
            raise Diverged(f"step {p.step}: gradient norm {norm}, loss {loss}; lower train.lr and go on with --resume")
        count = p.step + 1
        jobs = [self.team.threads.submit(self.optimizer.update, n, g, lr, count) for n, g in grads.items()]
        for job in jobs:
            job.result()
        report = loop.StepReport(loss, norm, sum(len(b.ids) for b in batches), sum(b.learned for b in batches))
        p.step, p.epoch, p.index = p.step + 1, cursor.epoch, cursor.index
        p.tokens, p.learned = p.tokens + report.tokens, p.learned + report.learned
        return report, lr

    def evaluate(self, raw: bool, limit: int | None = None) -> float:
        """Loss in nats per token of the held-out documents as raw text, or as answers in chats; of the weights rounded
        to bf16, as they are exported."""
        self.team.read({name: weight.bfloat16() for name, weight in self.master.items()})
        return self.team.evaluate(data.held_out(self.held_out, limit or len(self.held_out.documents), raw))

    def save(self) -> None:
        checkpoint.save(self.out / CHECKPOINT, self.master, self.optimizer.state, self.progress, asdict(self.recipe))

    def resume(self) -> None:
        self.progress = checkpoint.load(self.out / CHECKPOINT, self.master, self.optimizer.state)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype that ``name`` stands for; "auto" is the faster one on ``device``."""
    if name == "auto":
        name = "bfloat16" if device.type != "cpu" or probe().fast_bfloat16 else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def start_from(directory: str, model: Decoder) -> None:
    """Copy the weights of a model directory into ``model``; ConfigError when the shapes are not the recipe's."""
    source = load_model(open_checkpoint(directory), "float32", model.spec.max_model_len).state_dict()
    own = model.state_dict()
    wrong = [f"{name} {list(source[name].shape)}" for name in own if source[name].shape != own[name].shape]
    if wrong:
        raise ConfigError(f"train.start: {directory} is another model than the recipe's: {', '.join(wrong)}")
    model.load_state_dict(source)


def open_run(recipe: Recipe, archive: Path, out: Path, device: str, resume: bool) -> TrainingRun:
    """The run of ``recipe`` in folder ``out``: from its checkpoint with ``resume``, else new.

    Raises ConfigError when there is nothing to resume, or a checkpoint that a new run would overwrite.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"unknown device {device!r}.{nearest(device, ('auto', 'cpu', 'cuda'))}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch sees no CUDA device here; use --device cpu")
    if not resume and (out / CHECKPOINT).exists():
        raise ConfigError(f"{out} holds a checkpoint; go on with --resume, or choose another --out")
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    run = TrainingRun(recipe, archive, out, torch.device(chosen))
    if resume:
        run.resume()
    return run


@contextmanager
def prepared(device: torch.device) -> Iterator[None]:
    """One thread per op while the block runs; as before afterwards."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
        keep_memory()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_memory() -> None:
    """Let glibc reuse activations' memory instead of giving it back to the kernel after each op (a fifth of a step)."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        return
