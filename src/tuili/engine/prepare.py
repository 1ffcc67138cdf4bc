"""What a user asks, made definite: engine requests whose params hold numbers for everything. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count

from tuili.base.errors import RequestError
from tuili.core.params import SamplingParams
from tuili.core.request import Request
from tuili.engine.tokenizer import Tokenizer

_SEED_BITS = 63


@dataclass(frozen=True)
class Limits:
    """What bounds a request here. ``vocab_size`` is the model's; ``max_new_tokens`` the model's own default limit."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    max_logprobs: int = 20
    max_new_tokens: int | None = None


class Seeds:
    """Seeds for requests that bring none: a function of the engine's seed and how many came before.

    So a run that gets the same requests in the same order can be repeated exactly.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._count = count()

    def next(self) -> int:
        digest = blake2b(f"{self._seed}/{next(self._count)}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> (64 - _SEED_BITS)


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice ``index``: the user's plus the index, as in vLLM, so that choice 0 is what n = 1 gives."""
    return (seed + index + 2**63) % 2**64 - 2**63


def engine_requests(
    id: str,
    tokens: Sequence[int],
    params: SamplingParams,
    *,
    limits: Limits,
    tokenizer: Tokenizer,
    seeds: Seeds,
    priority: int = 0,
    salt: str = "",
) -> list[Request]:
    """One request, or for n > 1 ``id-0`` to ``id-{n-1}``. RequestError names the field that is wrong."""
    tokens = list(tokens)
    check_prompt(tokens, limits)
    params = resolve_params(params, len(tokens), limits, tokenizer)
    seed = params.seed if params.seed is not None else seeds.next()
    requests = []
    for index in range(params.n):
        own = params.with_(
            n=1, seed=choice_seed(seed, index), prompt_logprobs=params.prompt_logprobs if index == 0 else None
        )
        name = id if params.n == 1 else f"{id}-{index}"
        requests.append(Request(name, len(tokens), list(tokens), own, priority, salt))
    return requests


def check_prompt(tokens: Sequence[int], limits: Limits) -> None:
    if not tokens:
        raise RequestError("the prompt is empty; send at least one token", "prompt")
    wrong = next((t for t in tokens if type(t) is not int or not 0 <= t < limits.vocab_size), None)
    if wrong is not None:
        raise RequestError(
            f"prompt token ids must be integers from 0 to {limits.vocab_size - 1}, got {wrong!r}", "prompt"
        )
    if len(tokens) >= limits.max_model_len:
        raise RequestError(
            f"the prompt has {len(tokens)} tokens and the model takes {limits.max_model_len} for prompt and output "
            f"together; shorten it to at most {limits.max_model_len - 1}",
            "prompt",
        )


def resolve_params(params: SamplingParams, prompt_len: int, limits: Limits, tokenizer: Tokenizer) -> SamplingParams:
    """``params`` checked against the model, with ``max_tokens``, ``eos_token_ids`` and ``bad_words_ids`` filled in."""
    _check_ids(params, limits)
    _check_logprobs(params, limits)
    if params.stop and not params.detokenize:
        raise RequestError("stop strings are found in text; they cannot be used with detokenize=False", "stop")
    max_tokens = _max_tokens(params.max_tokens, prompt_len, limits)
    if params.min_tokens > max_tokens:
        raise RequestError(f"min_tokens {params.min_tokens} is more than the {max_tokens} that fit", "min_tokens")
    return params.with_(
        max_tokens=max_tokens,
        eos_token_ids=tuple(dict.fromkeys(params.eos_token_ids + limits.eos_token_ids)),
        bad_words_ids=bad_words_ids(params.bad_words or (), tokenizer),
    )


def _max_tokens(asked: int | None, prompt_len: int, limits: Limits) -> int:
    room = limits.max_model_len - prompt_len
    if asked is None:
        return room if limits.max_new_tokens is None else min(room, limits.max_new_tokens)
    if asked > room:
        raise RequestError(
            f"{prompt_len} prompt tokens + max_tokens {asked} = {prompt_len + asked} is more than the model's "
            f"{limits.max_model_len}; lower max_tokens to {room} or shorten the prompt",
            "max_tokens",
        )
    return asked


def _check_ids(params: SamplingParams, limits: Limits) -> None:
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        wrong = next((id for id in getattr(params, name) or () if id >= limits.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"{name} has id {wrong}, and the vocabulary ends at {limits.vocab_size - 1}", name)


def _check_logprobs(params: SamplingParams, limits: Limits) -> None:
    if limits.max_logprobs < 0:
        return
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        if asked is not None and (asked < 0 or asked > limits.max_logprobs):
            shown = "the whole vocabulary" if asked < 0 else asked
            raise RequestError(
                f"{name} asks for {shown}; at most {limits.max_logprobs} are allowed (--max-logprobs)", name
            )


def bad_words_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it starts a text and as it follows a space; RequestError for one that has no tokens."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if not ids or not text.strip():
                raise RequestError(f"bad_words has {word!r}, which is no word", "bad_words")
            found[ids] = None
    return tuple(found)
