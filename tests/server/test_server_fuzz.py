"""Fuzzing: schemathesis against the server's own OpenAPI document, and bodies of plausible fields in every combination.

No 5xx, every answer as the document says, and what is accepted gives the same text as a stream.
"""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import schemathesis
from pydantic import BaseModel
from schemathesis import checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from scripted import Server, make_engine

from tuili.server import schemas

SERVER = Server(make_engine(max_model_len=64))
CHECKS = [
    checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
schema = schemathesis.openapi.from_asgi("/openapi.json", SERVER.app)


def fuzzing(*phases: hypothesis.Phase) -> hypothesis.settings:
    quiet = list(hypothesis.HealthCheck)
    return hypothesis.settings(
        max_examples=15, deadline=None, derandomize=True, suppress_health_check=quiet, phases=phases
    )


@schema.parametrize()
@fuzzing(hypothesis.Phase.generate)
def test_random_requests(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)


@pytest.mark.slow
@schema.parametrize()
@fuzzing(hypothesis.Phase.explicit)
def test_every_limit_of_every_field(case: Any) -> None:
    """schemathesis' coverage phase: about 2000 requests, at, below and above what the document allows."""
    case.call_and_validate(checks=CHECKS)


#: Values of each field: good ones, and some that are not.
FIELDS: dict[str, list[Any]] = {
    "model": ["scripted", None, "gpt"],
    "n": [1, 2, 3.0, 0],
    "temperature": [0, 0.7, 1, 2, 2.1],
    "top_p": [1, 0.5, 0],
    "top_k": [-1, 0, 5, 10**12],
    "min_p": [0, 0.1],
    "repetition_penalty": [1, 1.3, 0],
    "presence_penalty": [0, -2, 2],
    "frequency_penalty": [0.5, 3],
    "seed": [0, -1, 2**63 - 1, -(2**63)],
    "stop": ["e", ["推理", "x"], [], ""],
    "stop_token_ids": [[], [11], [258], [259]],
    "include_stop_str_in_output": [True, False],
    "ignore_eos": [True, False],
    "min_tokens": [0, 3, 60],
    "max_tokens": [1, 5, 30, 1000],
    "logit_bias": [{}, {"5": -100, "258": 3.5}, {"300": 1}],
    "allowed_token_ids": [[1, 2, 3], []],
    "bad_words": [[], ["met"], [" "]],
    "skip_special_tokens": [True, False],
    "spaces_between_special_tokens": [True, False],
    "prompt_logprobs": [0, 2, 21],
    "stream_options": [{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}],
    "request_id": ["a", "推"],
    "cache_salt": ["s", "a@b"],
    "truncate_prompt_tokens": [-1, 4, 64, 65],
    "truncation_side": ["left", "right"],
    "return_token_ids": [True],
    "return_tokens_as_token_ids": [True],
    "add_special_tokens": [True, False],
    "echo": [True, False],
    "user": ["me"],
    "unheard_of": [1],
    "stream_interval": [1, 2],
}
ONLY_CHAT: dict[str, list[Any]] = {
    "logprobs": [True, False],
    "top_logprobs": [0, 3, 21],
    "max_completion_tokens": [4, 0],
    "continue_final_message": [True, False],
    "add_generation_prompt": [True, False],
    "chat_template_kwargs": [{}, {"enable_thinking": False}, {"tools": 1}],
    "reasoning_effort": ["low"],
    "tool_choice": ["none", "auto"],
}
MESSAGES: list[Any] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": [{"type": "text", "text": "推"}]}, {"role": "assistant", "content": "Oh "}],
    [{"role": "tool", "content": "3", "tool_call_id": "x"}],
    [{"role": "assistant"}],
]
PROMPTS: list[Any] = ["hi", "推理 👩‍🚀", ["a", "bc"], [65, 66], [[65], [66, 67, 256]], "", [300], "x" * 80]
ONLY_TEXT: dict[str, list[Any]] = {"logprobs": [0, 2, 21], "best_of": [1, 2], "max_tokens": [0, 1, None, 64]}


def bodies(first: dict[str, list[Any]], fields: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """The fields of ``first``, and up to six others."""
    some = st.lists(st.sampled_from(sorted(fields)), max_size=6, unique=True)
    names = some.map(lambda names: [*first, *names])
    values = {**fields, **first}
    return names.flatmap(lambda names: st.fixed_dictionaries({name: st.sampled_from(values[name]) for name in names}))


def text_of(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice.get("message", choice.get("delta"))["content"]


def accepted_or_named(path: str, body: dict[str, Any], answers: type[BaseModel]) -> None:
    whole = SERVER.post(path, body)
    streamed = SERVER.post(path, {**body, "stream": True})
    if whole.status_code != 200:
        assert whole.status_code in (400, 404), whole.text
        assert whole.json()["error"]["param"]
    else:
        answer = answers.model_validate(whole.json()).model_dump()
        if body.get("temperature", 1) == 0 and streamed.status_code == 200:
            chunks = [json.loads(item.removeprefix("data: ")) for item in streamed.text.split("\n\n")[:-2]]
            for choice in answer["choices"]:
                own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
                assert "".join(c.get("text", c.get("delta", {}).get("content", "")) for c in own) == text_of(choice)
                assert own[-1]["finish_reason"] == choice["finish_reason"]
    if streamed.status_code != whole.status_code:  # some fields are for one of the two only
        assert {"stream_options", "prompt_logprobs"} & body.keys(), (whole.text, streamed.text)
    if streamed.status_code == 200:
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert '{"error"' not in streamed.text


PROPERTY = hypothesis.settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)


@PROPERTY
@hypothesis.given(bodies({"messages": MESSAGES}, {**FIELDS, **ONLY_CHAT}))
def test_plausible_chats(body: dict[str, Any]) -> None:
    accepted_or_named("/v1/chat/completions", body, schemas.ChatAnswer)


@PROPERTY
@hypothesis.given(bodies({"prompt": PROMPTS}, {**FIELDS, **ONLY_TEXT}))
def test_plausible_completions(body: dict[str, Any]) -> None:
    accepted_or_named("/v1/completions", body, schemas.CompletionAnswer)


def test_nothing_is_left_behind() -> None:
    SERVER.wait_idle()
    SERVER.engine.client.engine.scheduler.check_integrity()


def test_the_document_covers_all_routes_and_errors() -> None:
    document = SERVER.get("/openapi.json").json()
    wanted = {
        *("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health"),
        *("/health/ready", "/ping", "/load", "/version", "/server_info", "/metrics"),
    }
    assert wanted <= document["paths"].keys()
    for path in ("/v1/chat/completions", "/v1/completions"):
        operation = document["paths"][path]["post"]
        assert {"200", "400", "404", "413", "415", "500", "503"} <= operation["responses"].keys()
        assert "422" not in operation["responses"]
        assert operation["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"]
    assert chat["additionalProperties"] is True
    refs = json.dumps(document).count("#/components/schemas/")
    assert refs > 10


@pytest.fixture(scope="module", autouse=True)
def _close() -> Any:
    yield
    SERVER.engine.close()
