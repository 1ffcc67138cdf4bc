"""What was asked becomes engine requests, for servers and offline use alike: here, once, with every bound. No torch.

Whatever is wrong raises RequestError that names the field, before anything runs. A prompt and its params are looked at
once, however many choices they are to have.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from typing import Any

from tuili.base.errors import RequestError
from tuili.core.params import SamplingParams, shown, token_ids, whole
from tuili.core.request import Request
from tuili.engine.tokenizer import Tokenizer

_SEED_BITS = 63
#: Choices (prompts x n) of one call.
MAX_CHOICES = 1024
SALT_LENGTH = 128
SALT_FORBIDDEN = "@/\\\0"
#: Characters of a tenant's and of a session's name.
NAME_LENGTH = 256
#: Characters of a text per token of context that are tokenized first, to see whether it can fit at all.
CHARACTERS_PER_TOKEN = 12


@dataclass(frozen=True)
class Bounds:
    """What a request may ask here. ``vocab_size`` is the model's; ``max_new_tokens`` the model's own default limit;
    ``max_requests`` may run and wait together (None: any number); without ``priorities`` all have 0."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    max_logprobs: int = 20
    max_new_tokens: int | None = None
    max_requests: int | None = None
    priorities: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody wants: ``params.n`` outputs for a prompt, which is text or token ids. ``arrival`` is in seconds on
    the engine's clock; ``salt`` None shares prefixes with all who give none."""

    prompt: str | Sequence[int]
    params: SamplingParams
    id: str
    arrival: float = 0.0
    priority: int = 0
    salt: str | None = None
    tenant: str = ""
    session: str = ""


@dataclass(frozen=True, slots=True)
class Admitted:
    """What was asked, checked and complete. ``params`` are resolved but for the seeds, which each request has;
    ``first`` counts the choices of those admitted before in the same call."""

    id: str
    ids: list[int]
    params: SamplingParams
    requests: tuple[Request, ...]
    arrival: float
    first: int


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


class Admission:
    """The door of one engine. Safe to use from several threads; tokenizing blocks, and long texts free the GIL."""

    def __init__(self, tokenizer: Tokenizer, bounds: Bounds, seed: int):
        self.tokenizer = tokenizer
        self.bounds = bounds
        self._seeds = Seeds(seed)

    def admit(self, asked: Sequence[Asked], add_special_tokens: bool = True) -> list[Admitted]:
        """All that is asked in one call, or RequestError for the first that is wrong."""
        texts = [each.prompt for each in asked if isinstance(each.prompt, str)]
        encoded = iter(self.encode(texts, add_special_tokens))
        checked: dict[int, SamplingParams] = {}  # several prompts may share their params
        first, admitted = 0, []
        for each in asked:
            ids = next(encoded) if isinstance(each.prompt, str) else each.prompt
            if (params := checked.get(id(each.params))) is None:
                params = checked[id(each.params)] = self._check_params(each.params)
            admitted.append(self._admit_one(each, self._check_prompt(ids), params, first))
            first += params.n
        return admitted

    def _admit_one(self, asked: Asked, ids: list[int], params: SamplingParams, first: int) -> Admitted:
        self._check_labels(asked)
        params = self._fit(params, len(ids))
        seed = params.seed if params.seed is not None else self._seeds.next()
        requests = []
        for index in range(params.n):
            own = copy.copy(params)  # checked already
            own.n, own.seed = 1, choice_seed(seed, index)
            own.prompt_logprobs = params.prompt_logprobs if index == 0 else None
            name = asked.id if params.n == 1 else f"{asked.id}-{index}"
            priority, salt = whole("priority", asked.priority), asked.salt or ""
            requests.append(Request(name, len(ids), list(ids), own, priority, salt, asked.tenant, asked.session))
        return Admitted(asked.id, ids, params, tuple(requests), asked.arrival, first)

    # ---------------------------------------------------------------------------------------------------- the prompt

    def encode(
        self, texts: Sequence[str], add_special_tokens: bool = True, param: str = "prompt", fits: bool = True
    ) -> list[list[int]]:
        """Token ids of each text. One that cannot fit the context is refused before all of it is tokenized, unless
        ``fits`` is False because it will be cut."""
        for text in texts:
            check_text(text, param)
            if fits:
                self._check_size(text, param)
        return self.tokenizer.encode_batch(texts, add_special_tokens)

    def _check_size(self, text: str, param: str) -> None:
        """Tokens of a text's beginning are tokens of the text, but for those at the cut: twice the context is too
        long, whatever follows."""
        longest = self.bounds.max_model_len
        size = longest * CHARACTERS_PER_TOKEN
        while size < len(text):
            if len(self.tokenizer.encode_batch([text[:size]], add_special_tokens=False)[0]) > 2 * longest:
                raise RequestError(
                    f"the prompt has {len(text)} characters, more than {longest} tokens, and the model takes {longest} "
                    "for prompt and output together; shorten it",
                    param,
                )
            size *= 4

    def _check_prompt(self, ids: Any) -> list[int]:
        limits = self.bounds
        size = len(ids) if hasattr(ids, "__len__") else 0
        if size < limits.max_model_len:
            ids = token_ids("prompt", ids, limits.max_model_len)
            size = len(ids)
        if size >= limits.max_model_len:
            raise RequestError(
                f"the prompt has {size} tokens and the model takes {limits.max_model_len} for prompt and output "
                f"together; shorten it to at most {limits.max_model_len - 1}",
                "prompt",
            )
        if not ids:
            raise RequestError("the prompt is empty; send at least one token", "prompt")
        self._check_known("prompt", ids)
        return ids

    def _check_known(self, name: str, ids: Sequence[int]) -> None:
        if max(ids, default=0) >= self.bounds.vocab_size:
            raise RequestError(
                f"{name} has token id {max(ids)}, and the vocabulary ends at {self.bounds.vocab_size - 1}", name
            )

    # ---------------------------------------------------------------------------------------------------- the params

    def _check_params(self, params: SamplingParams) -> SamplingParams:
        """A copy, checked again (its fields may have been set since it was made) and against the model, with the ids of
        end tokens and bad words filled in."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling params must be SamplingParams, got {shown(params)}", "sampling_params")
        bounds, params = self.bounds, params.with_()
        params.eos_token_ids = tuple(dict.fromkeys(params.eos_token_ids + bounds.eos_token_ids))
        params.bad_words_ids = self._bad_words_ids(params.bad_words or ())
        if params.n > min(MAX_CHOICES, bounds.max_requests or MAX_CHOICES):
            raise too_many_choices(params.n, bounds)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._check_known(name, getattr(params, name) or ())
        self._check_logprobs(params)
        if params.stop and not params.detokenize:
            raise RequestError("stop strings are found in text; they cannot be used with detokenize=False", "stop")
        self._check_possible(params)
        params.top_k = params.top_k if params.top_k < bounds.vocab_size else 0
        return params

    def _check_logprobs(self, params: SamplingParams) -> None:
        limit = self.bounds.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if limit >= 0 and asked is not None and not 0 <= asked <= limit:
                number = "the whole vocabulary" if asked < 0 else asked
                raise RequestError(f"{name} asks for {number}; at most {limit} are allowed (--max-logprobs)", name)

    def _check_possible(self, params: SamplingParams) -> None:
        """Some token must be left for the first place."""
        banned = {word[0] for word in params.bad_words_ids if len(word) == 1}
        if params.min_tokens:
            banned.update(params.stop_ids)
        allowed = params.allowed_token_ids
        if banned.issuperset(range(self.bounds.vocab_size) if allowed is None else allowed):
            rules = [name for name in ("allowed_token_ids", "bad_words", "min_tokens") if getattr(params, name)]
            raise RequestError(f"{' and '.join(rules)} leave no token to choose; change one of them", rules[0])

    def _bad_words_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it starts a text and as it follows a space; RequestError for one that has no tokens."""
        for word in words:
            if not word.strip():
                raise RequestError(f"bad_words has {word!r}, which is no word", "bad_words")
        texts = [text for word in words for text in (word.lstrip(), " " + word.lstrip())]
        found = dict.fromkeys(map(tuple, self.encode(texts, False, "bad_words", fits=False)))
        if () in found:
            raise RequestError("bad_words has a word without tokens", "bad_words")
        return tuple(found)

    def _fit(self, params: SamplingParams, prompt_len: int) -> SamplingParams:
        """A copy whose ``max_tokens`` is a number that fits behind the prompt."""
        room, asked = self.bounds.max_model_len - prompt_len, params.max_tokens
        if asked is None:
            asked = min(room, self.bounds.max_new_tokens or room)
        if asked > room:
            raise RequestError(
                f"{prompt_len} prompt tokens + max_tokens {asked} = {prompt_len + asked} is more than the model's "
                f"{self.bounds.max_model_len}; lower max_tokens to {room} or shorten the prompt",
                "max_tokens",
            )
        if params.min_tokens > asked:
            raise RequestError(f"min_tokens {params.min_tokens} is more than the {asked} that fit", "min_tokens")
        params = copy.copy(params)
        params.max_tokens = asked
        return params

    # ---------------------------------------------------------------------------------------------------- the labels

    def _check_labels(self, asked: Asked) -> None:
        if not isinstance(asked.id, str) or not asked.id:
            raise RequestError(f"a request's id must be a string, got {shown(asked.id)}", "request_id")
        if asked.priority != 0 and not self.bounds.priorities:
            raise RequestError(
                f"priority {shown(asked.priority)} needs --scheduling-policy priority; this engine has another",
                "priority",
            )
        for name, value in (("tenant", asked.tenant), ("session", asked.session)):
            if not isinstance(value, str) or len(value) > NAME_LENGTH:
                raise RequestError(
                    f"{name} must be a string of at most {NAME_LENGTH} characters, got {shown(value)}", name
                )
        check_salt(asked.salt)


def check_salt(salt: Any) -> None:
    if salt is None:
        return
    if not isinstance(salt, str) or not 1 <= len(salt) <= SALT_LENGTH or any(char in SALT_FORBIDDEN for char in salt):
        raise RequestError(
            f"cache_salt must have 1 to {SALT_LENGTH} characters and none of @ / \\ NUL, got {shown(salt)}",
            "cache_salt",
        )


def check_text(text: Any, param: str = "prompt") -> None:
    """RequestError for what is no text: other types, and strings with half a character (a lone surrogate)."""
    if not isinstance(text, str):
        raise RequestError(f"{param} must be text, got {shown(text)}", param)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{param} holds half of a surrogate pair at character {error.start}, which is not text", param
            ) from error


def too_many_choices(asked: int, bounds: Bounds, prompts: int = 1) -> RequestError:
    """For a call that asks for more than this engine could ever take."""
    if asked > MAX_CHOICES:
        why = f"a request may have {MAX_CHOICES} choices"
    else:
        why = f"this server takes {bounds.max_requests} requests at a time (--max-num-seqs + --max-num-queued-reqs)"
    return RequestError(f"{why}, got {asked} choices of {prompts} prompts", "n" if prompts == 1 else "prompt")
