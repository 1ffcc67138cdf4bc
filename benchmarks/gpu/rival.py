"""transformers on the same card, shape and workload: continuous batching, and a static cache with compiled decode."""

from __future__ import annotations

import time
from typing import Any

import torch

from gpu import shapes
from gpu.place import Entry, Place

MODEL = "Llama-3.1-8B"


def continuous(place: Place) -> None:
    """All requests at once through ``generate_batch``."""
    requests, prompt, output = (3, 8, 6) if place.tiny else (256, 128, 128)
    model = build(place)
    place.attempt(
        f"continuous batching {requests} x {prompt}+{output}",
        lambda: _continuous(model, requests, prompt, output, place),
    )


def static(place: Place) -> None:
    """``generate`` with a static cache: transformers compiles the decode step by itself on a card."""
    model = build(place)
    for requests, prompt, output in [(2, 8, 6)] if place.tiny else [(1, 128, 128), (8, 128, 128), (64, 128, 128)]:
        name = f"static cache, compiled {requests} x {prompt}+{output}"
        place.attempt(name, lambda r=requests, p=prompt, o=output: _static(model, r, p, o, place))


def build(place: Place) -> Any:
    """The model in bfloat16, its weights random."""
    import transformers

    config = {k: v for k, v in shapes.config_of(MODEL, place.tiny).items() if k not in ("architectures", "model_type")}
    with torch.device(place.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        finally:
            torch.set_default_dtype(before)
    return model.eval()


def _settings(output: int, **more: Any) -> Any:
    import transformers

    return transformers.GenerationConfig(
        max_new_tokens=output, min_new_tokens=output, do_sample=False, eos_token_id=None, pad_token_id=0, **more
    )


def _continuous(model: Any, requests: int, prompt: int, output: int, place: Place) -> Entry:
    import transformers

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (2 * requests, prompt), generator=generator).tolist()
    # The same load on other prompts first, by the same manager: it loads kernels, captures its graphs, sizes its cache.
    settings = {"generation_config": _settings(output), "persistent_manager": True, "record_timestamps": True}
    if place.tiny:  # its cache would take all memory
        settings["continuous_batching_config"] = transformers.ContinuousBatchingConfig(
            num_blocks=8, max_batch_tokens=64
        )
    model.generate_batch(prompts[requests:], **settings)
    made = model.generate_batch(prompts[:requests], **settings)
    done = list(made.values())
    tokens = sum(len(out.generated_tokens) for out in done)
    if tokens != requests * output:
        raise RuntimeError(
            f"{tokens} tokens came of {requests * output}: {next((o.error for o in done if o.error), '')}"
        )
    stamps = [stamp for out in done for stamp in out.timestamps]
    began = max(out.timestamps[0] for out in done)
    ended = min(out.timestamps[-1] for out in done)
    together = sum(began < stamp <= ended for stamp in stamps)
    return {
        "requests": requests,
        "whole_tokens_per_second": tokens / (max(stamps) - min(out.created_time for out in done)),
        "tokens_per_second": together / (ended - began) if ended > began else None,
    }


def _static(model: Any, requests: int, prompt: int, output: int, place: Place) -> Entry:
    ids = torch.randint(0, model.config.vocab_size, (requests, prompt)).to(place.device)
    mask = torch.ones_like(ids)

    settings = _settings(output, cache_implementation="static")
    stamps: list[float] = []

    def stamp(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    for _ in range(3):  # the first compiles
        stamps.clear()
        began = time.perf_counter()
        out = model.generate(ids, attention_mask=mask, generation_config=settings, stopping_criteria=[stamp])
        out[:, -1].tolist()
        whole = time.perf_counter() - began
    if out.shape[1] != prompt + output:
        raise RuntimeError(f"{out.shape[1] - prompt} tokens came of {output}")
    return {
        "requests": requests,
        "whole_tokens_per_second": requests * output / whole,
        "tokens_per_second": requests * (len(stamps) - 1) / (stamps[-1] - stamps[0]),
    }
