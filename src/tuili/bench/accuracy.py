"""What each width of the weights costs in accuracy: on text, the model so stored beside the same model in float32.

Perplexity, the Kullback-Leibler divergence of the next-token distributions (in nats, from float32's to the width's) and
how often both rank the same token first. Every judged token counts alike. Torch is imported when a measurement runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tuili
from tuili.base.config import Config
from tuili.base.errors import ConfigError, RequestError, nearest
from tuili.bench.provenance import provenance
from tuili.bench.statistics import ci95, mean, percentile

if TYPE_CHECKING:
    import torch

    from tuili.engine.text import TextEngine

#: What a width changes in the config. float32 is what the others are compared with.
WIDTHS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int8 weight-only": {"quantization": "int8_weight_only"},
    "int4 g32": {"quantization": "int4", "quantization_group_size": 32},
    "int4 g64": {"quantization": "int4", "quantization_group_size": 64},
    "int4 g128": {"quantization": "int4", "quantization_group_size": 128},
    "int4 weight-only": {"quantization": "int4_weight_only", "quantization_group_size": 32},
    "fp8": {"quantization": "fp8"},
    "bfloat16 + int8 KV": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
    "bfloat16 + fp8 KV": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    "int8 + int8 KV": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int4 g32 + int8 KV": {"quantization": "int4", "quantization_group_size": 32, "kv_cache_dtype": "int8"},
}
#: Scores are compared this many rows at a time: bounds memory at large vocabularies.
ROWS = 128
#: Tokens at once, where ``--max-model-len`` does not say and the model can.
LONGEST = 1024
#: Held-out stories (see benchmarks/data/README.md); in a checkout only.
STORIES = Path(tuili.__file__).parents[2] / "benchmarks" / "data" / "stories.jsonl"


@dataclass(frozen=True, slots=True)
class JudgedText:
    """``text`` is judged; ``prompt`` is what it answers, or None."""

    text: str
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """One document's tokens: negative log-likelihood of each, its divergence, and whether the first ranks agree."""

    nll: list[float]
    divergence: list[float]
    agrees: list[bool]


def read_documents(path: Path | None, limit: int) -> list[JudgedText]:
    """Lines of JSON with ``text`` and perhaps ``prompt``, or a whole file of plain text. ConfigError if neither."""
    if path is None and not STORIES.is_file():
        raise ConfigError("no text to judge by; give a file with --text (plain text, or JSON lines with 'text')")
    path = path or STORIES
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path} cannot be read: {error}") from error
    if path.suffix != ".jsonl":
        return [JudgedText(content)]
    lines = [line for line in content.splitlines() if line.strip()][:limit]
    try:
        return [JudgedText(record["text"], record.get("prompt")) for record in map(json.loads, lines)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--text {path}: every line must be a JSON object with a string 'text' ({error!r})"
        ) from error


def widths_of(names: str) -> dict[str, dict[str, Any]]:
    """The widths that a comma-separated list names; "all" for all."""
    if names == "all":
        return WIDTHS
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in WIDTHS:
            raise ConfigError(f"unknown width {name!r}.{nearest(name, WIDTHS)}")
    return {name: WIDTHS[name] for name in chosen}


def measure(
    config: Config,
    documents: Sequence[JudgedText],
    widths: dict[str, dict[str, Any]],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Every width's figures on ``documents``; float32's always come first. ``tick``: once per width and document."""
    from tuili.models.checkpoint import open_checkpoint

    longest = open_checkpoint(config.model, config.revision).spec.max_model_len
    config = config.with_(max_model_len=config.max_model_len or min(LONGEST, longest))
    reference = _open(config, WIDTHS["float32"])
    try:
        rows = [row for document in documents for row in encode(reference.text, document)]
        truth = [_hidden(reference, ids) for ids, _ in rows]
        arms: list[dict[str, Any]] = []
        for name, changes in ({"float32": {}, **widths}).items():
            engine = reference if name == "float32" else _open(config, changes)
            judged = []
            for (ids, first), hidden in zip(rows, truth, strict=True):
                judged.append(_judge(reference, hidden, engine, ids, first))
                tick()
            arms.append({"width": name, **_size(engine), **_figures(judged)})
            arms[-1]["perplexity_ratio"] = arms[-1]["perplexity"] / arms[0]["perplexity"]
            if engine is not reference:
                engine.text.close()
    finally:
        reference.text.close()
    digest = hashlib.sha256("\0".join(document.text for document in documents).encode()).hexdigest()
    text = {"documents": len(documents), "sha256": digest, "tokens": sum(len(ids) - first for ids, first in rows)}
    return {"benchmark": "accuracy", "text": text, "arms": arms, "provenance": provenance(None, config)}


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine for one sequence at a time, and its runner: nothing of it but model, KV and attention is used."""

    text: TextEngine
    runner: Any


def _open(config: Config, changes: dict[str, Any]) -> Opened:
    from tuili.engine.build import build
    from tuili.engine.client import ThreadClient
    from tuili.engine.engine import Engine

    engines: list[Engine] = []

    def keep(engine: Engine) -> ThreadClient:
        engines.append(engine)
        return ThreadClient(engine)

    plain = {"quantization": "none", "quantization_group_size": None, "kv_cache_dtype": "auto", "max_num_seqs": 1}
    sizes = {"max_num_batched_tokens": config.max_model_len, "kv_cache_memory_bytes": None}
    text = build(config.with_(**(plain | sizes | changes)), None, keep)
    return Opened(text, engines[0].executor.runner)  # type: ignore[attr-defined]


def encode(engine: TextEngine, document: JudgedText) -> list[tuple[list[int], int]]:
    """Token ids of a document, in pieces that the model can hold, and the first position of each that is judged."""
    prompt = [] if document.prompt is None else _prompt(engine, document.prompt)
    text = engine.tokenizer.encode(document.text, document.prompt is None)
    if prompt:
        return [((prompt + text)[: engine.max_model_len], len(prompt))]
    pieces = [text[start : start + engine.max_model_len] for start in range(0, len(text), engine.max_model_len)]
    return [(piece, 1) for piece in pieces if len(piece) > 1]


def _prompt(engine: TextEngine, prompt: str) -> list[int]:
    try:
        return engine.encode_chat([{"role": "user", "content": prompt}], fits=False)
    except RequestError:  # no chat template: the prompt is a text like any other
        return engine.tokenizer.encode(prompt + "\n\n", True)


def _hidden(engine: Opened, ids: list[int]) -> torch.Tensor:
    """Hidden states [n, hidden] of ``ids``, through the engine's own KV cache and attention."""
    import torch

    from tuili.runtime.batch import assemble

    runner = engine.runner
    size, count = runner.kv.block_size, len(ids)
    table = torch.arange(-(-count // size)).unsqueeze(0)
    place = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.tensor([0, count])
    with torch.inference_mode():
        batch = assemble(*place, count, count, table, size, runner.attention)
        hidden: torch.Tensor = runner.model.forward(runner.model.embed(torch.tensor(ids)), batch, runner.kv)
    return hidden


def _judge(reference: Opened, truth: torch.Tensor, engine: Opened, ids: list[int], first: int) -> Judged:
    import torch

    ours, theirs = (each.runner.model for each in (engine, reference))
    hidden = truth if engine is reference else _hidden(engine, ids)
    out = Judged([], [], [])
    with torch.inference_mode():
        for start in range(first, len(ids), ROWS):
            end = min(start + ROWS, len(ids))
            wanted = theirs.logits(truth[start - 1 : end - 1]).float().log_softmax(-1)
            have = ours.logits(hidden[start - 1 : end - 1]).float().log_softmax(-1)
            out.nll.extend((-have[torch.arange(end - start), torch.tensor(ids[start:end])]).tolist())
            out.divergence.extend((wanted.exp() * (wanted - have)).sum(-1).tolist())
            out.agrees.extend((wanted.argmax(-1) == have.argmax(-1)).tolist())
    return out


def _size(engine: Opened) -> dict[str, Any]:
    """The width as it was resolved, and the bytes of its weights as stored."""
    from tuili.layers.sizes import parameter_count, weight_bytes
    from tuili.quant.scheme import scheme_of

    config, spec = engine.text.config, engine.runner.model.spec
    names = ("dtype", "quantization", "quantization_group_size", "kv_cache_dtype")
    size = weight_bytes(
        spec, config.activation_dtype, scheme_of(config.quantization, config.quantization_group_size, config.dtype)
    )
    chosen = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return chosen | {"weight_bytes": size, "bits_per_weight": 8 * size / parameter_count(spec)}


def _figures(judged: Sequence[Judged]) -> dict[str, Any]:
    nll = [value for each in judged for value in each.nll]
    divergence = [value for each in judged for value in each.divergence]
    return {
        "perplexity": math.exp(mean(nll)),
        "kl_mean": mean(divergence),
        "kl_ci95": ci95([mean(each.divergence) for each in judged]),
        "kl_p99": percentile(divergence, 99),
        "top1_agreement": mean([float(agrees) for each in judged for agrees in each.agrees]),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a page with one table."""
    origin, text = report["provenance"], report["text"]
    commit = origin["commit"] or {"id": "unknown", "dirty": False}
    lines = [
        "# Accuracy of the widths",
        "",
        f"Measured {origin['date']} with {origin['config']['model']} on {text['documents']} documents, "
        f"{text['tokens']} judged tokens (sha256 `{text['sha256'][:12]}`), {origin['machine']['cpu']}, commit "
        f"`{commit['id'][:12]}`"
        f"{' with local changes' if commit['dirty'] else ''}. KL divergence in nats from float32's next-token "
        "distribution; its interval is over documents. Weights as stored, scales and padding included.",
        "",
        "| width | weights MB | bits/weight | perplexity | x float32 | KL mean | 95 % CI | KL p99 | same first token |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in cells(report)]
    return "\n".join(lines) + "\n"


def cells(report: dict[str, Any]) -> list[list[str]]:
    """The table's rows as text."""
    rows = []
    for arm in report["arms"]:
        low, high = arm["kl_ci95"] or (arm["kl_mean"],) * 2
        rows.append(
            [
                arm["width"],
                f"{arm['weight_bytes'] / 1e6:.2f}",
                f"{arm['bits_per_weight']:.2f}",
                f"{arm['perplexity']:.3f}",
                f"{arm['perplexity_ratio']:.4f}",
                f"{arm['kl_mean']:.5f}",
                f"{low:.5f} .. {high:.5f}",
                f"{arm['kl_p99']:.4f}",
                f"{arm['top1_agreement']:.2%}",
            ]
        )
    return rows
