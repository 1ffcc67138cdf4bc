"""What a user asks becomes definite, or an error that names the field."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from engine_parts import byte_level
from hypothesis import given
from hypothesis import strategies as st

from tuili.base.errors import RequestError
from tuili.core.params import SamplingParams
from tuili.engine.admission import Admission, Asked, Bounds, Seeds, choice_seed

BOUNDS = Bounds(max_model_len=100, vocab_size=410, eos_token_ids=(0, 1), max_logprobs=5)


def admit(tokens=(5, 6, 7), bounds=BOUNDS, **params):
    (admitted,) = Admission(byte_level(), bounds, 0).admit([Asked(tokens, SamplingParams(**params), "r", salt="s")])
    return admitted


def make(*args, **params):
    return list(admit(*args, **params).requests)


def test_one_request_is_complete():
    (request,) = make(max_tokens=None)
    assert (request.id, request.prompt_len, request.tokens, request.salt) == (
        "r",
        3,
        [5, 6, 7],
        "s",
    )
    assert request.params.max_tokens == 97
    assert request.params.eos_token_ids == (0, 1)
    assert request.params.seed is not None


def test_max_tokens_default_is_capped_by_the_models_own():
    capped = Bounds(100, 410, max_new_tokens=10)
    assert make(bounds=capped, max_tokens=None)[0].params.max_tokens == 10
    assert make(bounds=capped, max_tokens=97)[0].params.max_tokens == 97, "what the user gives wins"
    assert make(bounds=Bounds(100, 410, max_new_tokens=500), max_tokens=None)[0].params.max_tokens == 97


def test_choices_have_their_own_ids_and_seeds():
    requests = make(n=3, seed=7, prompt_logprobs=1)
    assert [r.id for r in requests] == ["r-0", "r-1", "r-2"]
    assert [r.params.seed for r in requests] == [7, 8, 9]
    assert [r.params.n for r in requests] == [1, 1, 1]
    assert [r.params.prompt_logprobs for r in requests] == [1, None, None]
    assert requests[0].tokens is not requests[1].tokens
    assert make(seed=7)[0].params.seed == requests[0].params.seed


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 100))
def test_choice_seeds_stay_in_64_bits(seed, index):
    SamplingParams(seed=choice_seed(seed, index))
    assert (choice_seed(seed, index) - seed - index) % 2**64 == 0


def test_seeds_of_a_run_repeat_and_differ():
    first, second, other = Seeds(3), Seeds(3), Seeds(4)
    run = [first.next() for _ in range(50)]
    assert run == [second.next() for _ in range(50)]
    assert len(set(run)) == 50
    assert other.next() not in run
    assert all(0 <= seed < 2**63 for seed in run)


@pytest.mark.parametrize(
    ("tokens", "params", "param"),
    [
        ([], {}, "prompt"),
        ([1] * 100, {}, "prompt"),
        ([410], {}, "prompt"),
        ([-1], {}, "prompt"),
        (["a"], {}, "prompt"),
        ([True], {}, "prompt"),
        ([1], {"max_tokens": 100}, "max_tokens"),
        ([1] * 95, {"max_tokens": None, "min_tokens": 6}, "min_tokens"),
        ([1], {"stop_token_ids": [410]}, "stop_token_ids"),
        ([1], {"allowed_token_ids": [1, 999]}, "allowed_token_ids"),
        ([1], {"logit_bias": {500: 1.0}}, "logit_bias"),
        ([1], {"logprobs": 6}, "logprobs"),
        ([1], {"logprobs": -1}, "logprobs"),
        ([1], {"prompt_logprobs": 6}, "prompt_logprobs"),
        ([1], {"bad_words": [" "]}, "bad_words"),
        ([1], {"stop": "x", "detokenize": False}, "stop"),
    ],
)
def test_errors_name_the_field(tokens, params, param):
    with pytest.raises(RequestError) as raised:
        make(tokens, **params)
    assert raised.value.param == param


def test_too_long_says_the_numbers():
    with pytest.raises(RequestError, match=r"3 prompt tokens \+ max_tokens 98 = 101 .* 100; lower max_tokens to 97"):
        make(max_tokens=98)
    make(max_tokens=97)
    make([1] * 99, max_tokens=1)


def test_the_whole_vocabulary_of_logprobs_needs_permission():
    make(bounds=Bounds(100, 410, max_logprobs=-1), logprobs=-1)


def test_bad_words_with_and_without_space():
    tokenizer = byte_level()
    ids = admit(bad_words=["fox", " fox"]).params.bad_words_ids
    assert {tokenizer.decode(i) for i in ids} == {"fox", " fox"}
    assert len(ids) == 2


# ------------------------------------------------------------------------------------------- numbers, lists and texts


def test_numbers_of_numpy_and_torch_are_numbers():
    torch = pytest.importorskip("torch")
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=torch.tensor(7),
        max_tokens=np.int64(3),
        seed=np.int32(5),
        ignore_eos=np.bool_(True),
        stop_token_ids=np.array([5, 6, 5]),
        allowed_token_ids=torch.tensor([9, 8]),
        logit_bias={np.int64(5): np.float64(1.5), "6": 2},
    )
    assert params == SamplingParams(
        temperature=0.5,
        top_k=7,
        max_tokens=3,
        seed=5,
        ignore_eos=True,
        stop_token_ids=[5, 6],
        allowed_token_ids=(9, 8),
        logit_bias={5: 1.5, 6: 2.0},
    )
    for value in (params.temperature, params.logit_bias[5]):
        assert type(value) is float
    for value in (params.top_k, params.max_tokens, params.seed, *params.stop_token_ids, *params.allowed_token_ids):
        assert type(value) is int
    assert params.ignore_eos is True
    for ids in (np.array([5, 6, 7]), torch.tensor([5, 6, 7]), [np.int64(5), 6, 7], range(5, 8), iter([5, 6, 7])):
        (request,) = make(ids)
        assert request.tokens == [5, 6, 7]
        assert {type(id) for id in request.tokens} == {int}


WRONG = [
    *[("temperature", value) for value in ("1", None, True, float("nan"), float("inf"), 10**400, np.array([1.0, 2.0]))],
    *[
        (name, value)
        for name in ("n", "max_tokens", "min_tokens", "top_k", "seed")
        for value in (1.5, "1", True, 10**30)
    ],
    ("max_tokens", 10**5000),
    *[("logprobs", value) for value in (True, -2, 10**30)],
    *[("stop", value) for value in (5, b"a", [b"a"], [None], [""], {"a": 1}, ["a"] * 1000, ["x" * 5000])],
    *[("bad_words", value) for value in (5, b"a", [5], ["\ud800"], [str(i) for i in range(1000)])],
    *[("stop_token_ids", value) for value in (5, "ab", b"ab", ["5"], [5.0], [True], {5: 1}, range(2000), [10**30])],
    *[("allowed_token_ids", value) for value in ([], "ab", [None], count(), [-1])],
    *[("logit_bias", value) for value in ([5], {"a": 1}, {5.5: 1}, {-1: 1}, dict.fromkeys(range(2000), 1.0))],
    *[(name, value) for name in ("ignore_eos", "detokenize", "skip_special_tokens") for value in ("no", 1, None)],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: str(type(value).__name__))
def test_what_is_no_value_is_refused_by_name_also_when_it_is_set_later(name, value):
    def refused(work) -> str:
        with pytest.raises(RequestError) as raised:
            work()
        assert raised.value.param == name
        assert len(str(raised.value)) < 300
        return str(raised.value)

    refused(lambda: make(**{name: value}))
    params = SamplingParams()
    setattr(params, name, value)
    refused(lambda: Admission(byte_level(), BOUNDS, 0).admit([Asked([5], params, "r")]))


def test_params_may_be_changed_until_they_are_handed_in():
    params = SamplingParams(stop=["a"], logit_bias={5: 1.0}, seed=3)
    twin = params.clone()
    assert twin == params == pickle.loads(pickle.dumps(params)) == copy.deepcopy(params)
    params.max_tokens, params.stop = np.int64(5), "b"
    (admitted,) = Admission(byte_level(), BOUNDS, 0).admit([Asked([5], params, "r")])
    params.max_tokens, params.logit_bias[5] = 50, 9.0
    (request,) = admitted.requests
    assert (request.params.max_tokens, request.params.stop, request.params.logit_bias) == (5, ("b",), {5: 1.0})
    assert (twin.max_tokens, twin.stop, twin.logit_bias) == (16, ("a",), {5: 1.0})
    with pytest.raises(AttributeError):
        params.max_token = 3


def test_a_seed_of_minus_one_is_none():
    assert SamplingParams(seed=-1) == SamplingParams()
    seeds = [make(seed=-1, n=1, temperature=1.0)[0].params.seed for _ in range(2)]
    admission = Admission(byte_level(), BOUNDS, 0)
    first, second = (admission.admit([Asked([5], SamplingParams(seed=-1), "r")])[0].requests[0] for _ in range(2))
    assert first.params.seed != second.params.seed
    assert seeds == [first.params.seed] * 2, "the first of an engine's seed"


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({"allowed_token_ids": [5], "bad_words": ["<5>"]}, ("allowed_token_ids", "bad_words")),
        ({"allowed_token_ids": [0, 1], "min_tokens": 2}, ("allowed_token_ids", "min_tokens")),
        ({"allowed_token_ids": [7, 0], "min_tokens": 2, "stop_token_ids": [7]}, ("allowed_token_ids", "min_tokens")),
    ],
)
def test_rules_that_leave_no_token_are_refused(params, names):
    if "bad_words" in params:
        params = params | {"bad_words": [byte_level().token_text(5)]}
    with pytest.raises(RequestError) as raised:
        make(**params)
    assert all(name in str(raised.value) for name in names)
    make(**(params | {"allowed_token_ids": [*params["allowed_token_ids"], 9]}))
    if "min_tokens" in params:
        make(**(params | {"min_tokens": 0}))


def test_the_whole_vocabulary_and_more_is_no_top_k():
    assert [make(top_k=k)[0].params.top_k for k in (409, 410, 2**62, -1, 0)] == [409, 0, 0, 0, 0]


def test_params_are_checked_once_however_many_prompts_and_choices_share_them(monkeypatch):
    checks = []
    check = Admission._check_params
    monkeypatch.setattr(Admission, "_check_params", lambda self, params: checks.append(1) or check(self, params))
    params = SamplingParams(n=100, bad_words=["fox"])
    admitted = Admission(byte_level(), BOUNDS, 0).admit([Asked([5, i], params, f"r{i}") for i in range(20)])
    assert len(checks) == 1
    assert [each.first for each in admitted] == list(range(0, 2000, 100))
    assert len({request.id for each in admitted for request in each.requests}) == 2000


def test_choices_beyond_what_can_ever_run_are_refused():
    bounds = replace(BOUNDS, max_requests=4)
    assert len(make(bounds=bounds, n=4)) == 4
    for n in (5, 2000):
        with pytest.raises(RequestError) as raised:
            make(bounds=bounds, n=n)
        assert raised.value.param == "n"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("id", "", "request_id"),
        ("id", 5, "request_id"),
        ("priority", 1, "priority"),
        ("priority", "high", "priority"),
        ("salt", "", "cache_salt"),
        ("salt", "a/b", "cache_salt"),
        ("salt", 5, "cache_salt"),
        ("salt", "x" * 129, "cache_salt"),
        ("tenant", None, "tenant"),
        ("session", "x" * 300, "session"),
        ("prompt", "half \ud800", "prompt"),
        ("prompt", b"bytes", "prompt"),
        ("prompt", None, "prompt"),
        ("params", None, "sampling_params"),
    ],
)
def test_what_stands_on_the_label_is_checked(field, value, param):
    asked = Asked([5], SamplingParams(), "r")
    with pytest.raises(RequestError) as raised:
        Admission(byte_level(), BOUNDS, 0).admit([replace(asked, **{field: value})])
    assert raised.value.param == param


def test_requests_say_whose_they_are():
    bounds = replace(BOUNDS, priorities=True)
    asked = Asked([5], SamplingParams(n=2), "r", 7.0, -3, "salt", "tenant", "session")
    (admitted,) = Admission(byte_level(), bounds, 0).admit([asked])
    for request in admitted.requests:
        found = request.priority, request.salt, request.tenant, request.session
        assert found == (-3, "salt", "tenant", "session")
    assert admitted.arrival == 7.0


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized_whole(monkeypatch):
    tokenizer = byte_level()
    admission = Admission(tokenizer, BOUNDS, 0)
    seen = []
    encode = tokenizer.encode_batch
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda texts, *more, **options: seen.extend(texts) or encode(texts, *more, **options)
    )
    for text in ("the cat sat on a mat. " * 100_000, "x" * 1_000_000, "👍🏽" * 100_000):
        seen.clear()
        with pytest.raises(RequestError) as raised:
            admission.encode([text])
        assert raised.value.param == "prompt"
        assert sum(map(len, seen)) < 10_000
        assert len(admission.encode([text[:50_000]], fits=False)[0]) > 100, "what will be cut is not refused"


@given(st.text(max_size=60), st.integers(1, 40), st.integers(1, 30))
def test_whatever_fits_is_never_refused(text, times, longest):
    """The check of the beginning against the tokens of the whole."""
    tokenizer = byte_level()
    text *= times
    whole = len(tokenizer.encode(text))
    try:
        Admission(tokenizer, Bounds(longest, 410), 0).encode([text])
    except RequestError:
        assert whole >= longest
