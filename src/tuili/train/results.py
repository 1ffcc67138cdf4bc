"""What a run came to, in numbers: the only source of the model card and of results.json."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from tuili.train import data
from tuili.train.run import TrainingRun, prepared
from tuili.train.sample import answer, continuation

#: What a later stage's results keep of an earlier one's.
STAGE = ("tokens", "step", "seconds", "loss_per_token", "machine", "recipe")


def measure(run: TrainingRun) -> dict[str, Any]:
    """Results of the run as it stands: losses on every held-out document, samples, tokens, time and machine."""
    with prepared(run.device):
        losses = {raw: run.evaluate(raw) for raw in (False, True)}
        generator = torch.Generator().manual_seed(run.recipe.train.seed)
        model = run.team.replicas[0].model
        limit = run.recipe.report.sample_tokens
        samples = {p: answer(model, run.tokenizer, p, limit, generator) for p in run.recipe.report.sample_prompts}
        openings = {p: continuation(model, run.tokenizer, p, limit, generator) for p in run.recipe.report.openings}
        topics = {t: named(run, t, generator) for t in run.recipe.report.topics}
    recipe = asdict(run.recipe)
    for table in (recipe["data"], recipe["tokenizer"]):
        table["path"] = Path(table["path"]).name
    start = Path(recipe["train"]["start"]) if recipe["train"]["start"] else None
    recipe["train"]["start"] = start.name if start else ""
    return {
        "name": run.recipe.name,
        "parameters": sum(w.numel() for w in run.master.values()),
        "training_documents": len(run.stories.documents),
        "training_tokens_per_epoch": run.stories.tokens(),
        "held_out_documents": len(run.held_out.documents),
        **held_out(run, False, losses[False]),
        "raw": held_out(run, True, losses[True]),
        **asdict(run.progress),
        "machine": machine(run.device, len(run.team.replicas)),
        "samples": samples,
        "openings": openings,
        "topics": topics,
        "recipe": recipe,
        "earlier": earlier(start),
    }


def held_out(run: TrainingRun, raw: bool, loss: float) -> dict[str, float]:
    """``loss``, in nats per token of the held-out documents as raw text or as answers, in other units too."""
    batches = data.held_out(run.held_out, len(run.held_out.documents), raw)
    learned = sum(b.learned for b in batches)
    size = sum(byte_count(run.tokenizer, b.targets) for b in batches)
    return {
        "held_out_tokens": learned,
        "held_out_bytes": size,
        "loss_per_token": loss,
        "perplexity_per_token": math.exp(loss),
        "bits_per_byte": loss * learned / size / math.log(2),
        "perplexity_per_byte": math.exp(loss * learned / size),
    }


def named(run: TrainingRun, topic: str, generator: torch.Generator) -> int:
    """How many of ``topic_draws`` answers to a request for the topic name its word between stars."""
    report = run.recipe.report
    word = topic.split("*")[1].lower()
    prompt = f"Tell a bedtime story about {topic.replace('*', '')}."
    made = (
        answer(run.team.replicas[0].model, run.tokenizer, prompt, report.topic_tokens, generator)
        for _ in range(report.topic_draws)
    )
    return sum(word in text.lower() for text in made)


def earlier(start: Path | None) -> list[dict[str, Any]]:
    """The stages before this one, first to last: the results of the model that it began with, and of that one's."""
    known = start / "results.json" if start else None
    if known is None or not known.is_file():
        return []
    last = json.loads(known.read_text())
    before = last.pop("earlier", [])
    return [*before, {key: last[key] for key in STAGE}]


def byte_count(tokenizer: Tokenizer, targets: torch.Tensor) -> int:
    """Bytes of text that the learned ids of ``targets`` stand for; special tokens stand for none."""
    ids = [t for t in targets.tolist() if t >= 0]
    return len(tokenizer.decode(ids, skip_special_tokens=True).encode())


def machine(device: torch.device, workers: int) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (li.split(":")[1].strip() for li in cpuinfo.read_text().splitlines() if li.startswith("model name")), name
        )
    return f"{name}, {workers} threads"
