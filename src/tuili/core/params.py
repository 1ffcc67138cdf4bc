"""``SamplingParams``: what a user may ask of sampling, with vLLM's names, ranges and defaults (interfaces.md 5.1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tuili.base.errors import RequestError

#: Below this temperature sampling is greedy, as in vLLM.
GREEDY_BELOW = 1e-5
#: Strings of ``stop`` and of ``bad_words``, and characters of each: all are looked for at every token.
MAX_STRINGS, MAX_CHARACTERS = 128, 1024
#: Different ids of ``stop_token_ids`` and ``logit_bias``: all are looked at in every step.
MAX_IDS = 1024
#: Ids that a list may hold, repetitions included: no vocabulary is larger.
LONGEST_LIST = 2**19
LARGEST = 2**31 - 1


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when generation stops.

    ``max_tokens`` is 16 offline as in vLLM; None means "to the end of the context" and is what the chat server uses.
    ``top_k`` 0 or -1 and ``logprobs`` -1 mean the whole vocabulary. ``seed`` None or -1 lets the engine draw one.
    Numbers may be numpy's or torch's, lists any iterable; they are kept as Python's own. Fields may be changed until
    the params are handed in: the engine works on a copy, checked again.
    Raises RequestError that names the field for values out of range.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str | None = ()
    stop_token_ids: tuple[int, ...] | list[int] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: tuple[str, ...] | list[str] | None = ()
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    #: Token ids of ``bad_words``, filled by the tokenizer's side; each inner tuple is one forbidden sequence.
    bad_words_ids: tuple[tuple[int, ...], ...] = field(default=())
    #: Ids that end the text of this model, filled by the engine from generation_config.json.
    eos_token_ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        for name, low, high in INTEGERS:
            value = getattr(self, name)
            if type(value) is int and low <= value <= high:  # as nearly always
                continue
            if value is not None or name not in OPTIONAL:
                setattr(self, name, _within(name, whole(name, value), low, high))
        for name, least, most in NUMBERS:
            value = getattr(self, name)
            if type(value) is not float or not least <= value <= most:
                setattr(self, name, _within(name, _number(name, value), least, most))
        for name in FLAGS:
            if type(value := getattr(self, name)) is not bool:
                setattr(self, name, _flag(name, value))
        self._take_lists()
        self.top_k = max(self.top_k, 0)
        self.seed = None if self.seed == -1 else self.seed
        _check_together(self)

    def _take_lists(self) -> None:
        self.stop = _strings("stop", self.stop)
        self.bad_words = _strings("bad_words", self.bad_words)
        self.stop_token_ids = _ids("stop_token_ids", self.stop_token_ids, MAX_IDS)
        self.eos_token_ids = _ids("eos_token_ids", self.eos_token_ids, MAX_IDS)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids must not be empty", "allowed_token_ids")
        if self.logit_bias is not None:
            self.logit_bias = _biases(self.logit_bias)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that may end the text: eos (unless ignored), then ``stop_token_ids``."""
        own = tuple(self.stop_token_ids or ())
        return own if self.ignore_eos else tuple(dict.fromkeys(self.eos_token_ids + own))

    def with_(self, **changes: object) -> SamplingParams:
        """A copy with ``changes``, checked."""
        twin = copy.copy(self)
        for name, value in changes.items():
            setattr(twin, name, value)
        twin.__post_init__()
        return twin

    def __copy__(self) -> SamplingParams:
        """Not checked."""
        twin = object.__new__(SamplingParams)
        for name in self.__slots__:
            setattr(twin, name, getattr(self, name))
        return twin

    def clone(self) -> SamplingParams:
        """A copy that shares nothing with this one."""
        return copy.deepcopy(self)


#: Fields and their bounds, both included. ``top_p`` and ``repetition_penalty`` must be more than 0; beyond 1e6 float32
#: scores overflow.
INTEGERS = (
    ("n", 1, LARGEST),
    ("max_tokens", 1, LARGEST),
    ("min_tokens", 0, LARGEST),
    ("top_k", -1, 2**63 - 1),
    ("seed", -(2**63), 2**63 - 1),
    ("logprobs", -1, LARGEST),
    ("prompt_logprobs", -1, LARGEST),
)
OPTIONAL = frozenset({"max_tokens", "seed", "logprobs", "prompt_logprobs"})
NUMBERS = (
    ("temperature", 0.0, 2.0),
    ("top_p", math.ulp(0.0), 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 1e-6, 1e6),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)
FLAGS = (
    *("include_stop_str_in_output", "ignore_eos", "detokenize"),
    *("skip_special_tokens", "spaces_between_special_tokens"),
)


def shown(value: object) -> str:
    """``value`` in an error: never long, and never an error itself."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def plain(value: Any) -> Any:
    """Python's own number for one of numpy's or torch's; anything else as it is."""
    if type(value) in (int, float, bool) or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except Exception:  # an array of several
        return value


def whole(name: str, value: object) -> int:
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise RequestError(f"{name} must be an integer, got {shown(value)}", name)
    return int(number)


def _number(name: str, value: object) -> float:
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise RequestError(f"{name} must be a number, got {shown(value)}", name)
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _flag(name: str, value: object) -> bool:
    flag = plain(value)
    if not isinstance(flag, bool):
        raise RequestError(f"{name} must be True or False, got {shown(value)}", name)
    return flag


def _within(name: str, value: Any, low: float, high: float) -> Any:
    if low <= value <= high:  # not for NaN
        return value
    if high == LARGEST and value < low:
        raise RequestError(f"{name} must be at least {low}, got {value}", name)
    bounds = f"(0, {high:g}]" if low == math.ulp(0.0) else f"[{low}, {high}]"
    raise RequestError(f"{name} must be in {bounds}, got {shown(value)}", name)


def listed(name: str, values: Any, what: str, limit: int = LONGEST_LIST) -> list[Any]:
    """The items of any iterable, at most ``limit``; RequestError for what is none, or is text or a table."""
    try:
        if isinstance(values, (str, bytes, bytearray, Mapping)):
            raise TypeError
        found = list(islice(values.tolist() if hasattr(values, "tolist") else values, limit + 1))
    except TypeError as error:
        raise RequestError(f"{name} must be a list of {what}, got {shown(values)}", name) from error
    if len(found) > limit:
        raise RequestError(f"{name} may hold {limit} {what}, got more; shorten the list", name)
    return found


def _strings(name: str, values: Any) -> tuple[str, ...]:
    if values is None or (type(values) is tuple and not values):
        return ()
    found = [values] if isinstance(values, str) else listed(name, values, "strings", MAX_STRINGS)
    for text in found:
        if not isinstance(text, str) or not text:
            raise RequestError(f"{name} must hold non-empty strings, got {shown(text)}", name)
        if len(text) > MAX_CHARACTERS:
            raise RequestError(f"{name} has {len(text)} characters in {shown(text)}; at most {MAX_CHARACTERS}", name)
    return tuple(dict.fromkeys(map(str, found)))


def token_ids(name: str, values: Any, limit: int = LONGEST_LIST) -> list[int]:
    """``values`` as Python's integers from 0 on; RequestError names the first that is none."""
    found = listed(name, values, "token ids", limit)
    if set(map(type, found)) - {int}:
        found = [plain(id) for id in found]
    if set(map(type, found)) - {int} or min(found, default=0) < 0:
        wrong = next(id for id in found if type(id) is not int or id < 0)
        raise RequestError(f"{name} must hold token ids (integers >= 0), got {shown(wrong)}", name)
    return found


def _ids(name: str, values: Any, limit: int = LONGEST_LIST) -> tuple[int, ...]:
    if values is None or (type(values) is tuple and not values):
        return ()
    found = tuple(dict.fromkeys(token_ids(name, values)))
    if len(found) > limit:
        raise RequestError(f"{name} may hold {limit} different ids, got {len(found)}", name)
    return found


def _biases(values: Any) -> dict[int, float]:
    name = "logit_bias"
    if not isinstance(values, Mapping):
        raise RequestError(f"{name} must map token ids to numbers, got {shown(values)}", name)
    if len(values) > MAX_IDS:
        raise RequestError(f"{name} may hold {MAX_IDS} ids, got {len(values)}", name)
    biases = {}
    for key, bias in values.items():
        written = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10
        (id,) = token_ids(name, [int(key) if written else key])
        biases[id] = _within(f"{name}[{id}]", _number(f"{name}[{id}]", bias), -100.0, 100.0)
    return biases


def _check_together(p: SamplingParams) -> None:
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise RequestError(f"min_tokens {p.min_tokens} is more than max_tokens {p.max_tokens}", "min_tokens")
    if p.n > 1 and p.greedy:
        raise RequestError(f"n must be 1 with greedy sampling (temperature 0), got {p.n}", "n")
