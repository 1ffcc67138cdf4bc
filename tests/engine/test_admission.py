"""What a user asks becomes definite, or an error that names the field."""

from __future__ import annotations

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
