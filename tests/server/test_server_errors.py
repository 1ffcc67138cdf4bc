"""Whatever is sent: a typed 4xx that names the field, never a 500, never a hang (issue 2, "Bad input")."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from scripted import END, TOKENIZER, Server, executor, run

from tuili.base.errors import ConfigError
from tuili.server.protocol import ChatRequest, CompletionRequest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def refused(server: Server, path: str, body: dict[str, Any], param: str | None, status: int = 400) -> str:
    answer = server.post(path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, status, param), answer.text
    assert error["type"] == {400: "BadRequestError", 404: "NotFoundError"}[status]
    return error["message"]


# ------------------------------------------------------------------------------------- bytes, not JSON

OPEN = b'{"model":"scripted","prompt":"x","max_tokens":1'
NASTY: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 400),
    "blank": (b"  \n", 400),
    "cut": (b'{"prompt": "x', 400),
    "trailing comma": (OPEN + b",}", 400),
    "two values": (OPEN + b"}{}", 400),
    "array": (b"[1]", 400),
    "string": (b'"x"', 400),
    "null": (b"null", 400),
    "number": (b"3", 400),
    "single quotes": (b"{'prompt': 'x'}", 400),
    "not UTF-8": (b'{"prompt": "\xff"}', 400),
    "half a character": (b'{"prompt": "\xe6\x8e"}', 400),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), 400),
    "byte order mark is fine": (b"\xef\xbb\xbf" + OPEN + b"}", 200),
    "two byte order marks": (b"\xef\xbb\xbf" * 2 + OPEN + b"}", 400),
    "surrogate": (b'{"prompt": "\\ud800"}', 400),
    "surrogate in a key": (OPEN + b',"\\udfff": 1}', 400),
    "surrogate pair is fine": (b'{"prompt": "\\ud83d\\ude00","max_tokens":1}', 200),
    "NUL in a string is fine": (b'{"prompt": "a\\u0000b","max_tokens":1}', 200),
    "raw control character": (b'{"prompt": "a\x00b"}', 400),
    "NaN": (OPEN + b',"temperature": NaN}', 400),
    "Infinity": (OPEN + b',"temperature": -Infinity}', 400),
    "infinite number": (OPEN + b',"temperature": 1e999}', 400),
    "infinite number in an unknown field": (OPEN + b',"x": -1e999}', 400),
    "huge integer": (OPEN + b',"top_k": ' + b"9" * 5000 + b"}", 400),
    "large integer": (OPEN + b',"top_k": ' + b"9" * 40 + b"}", 400),
    "large integer as a float": (OPEN + b',"temperature": ' + b"9" * 400 + b"}", 400),
    "duplicate key": (OPEN + b',"prompt": "y"}', 400),
    "duplicate key inside": (OPEN + b',"stream_options": {"a": 1, "a": 2}}', 400),
    "deep arrays": (OPEN + b',"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "deep objects": (OPEN + b',"x": ' + b'{"a":' * 3000 + b"1" + b"}" * 3001, 400),
    "a little too deep": (OPEN + b',"x": ' + b"[" * 100 + b"]" * 100 + b"}", 400),
    "deep enough": (OPEN + b',"x": ' + b"[" * 90 + b"]" * 90 + b"}", 200),
    "wide is not deep": (OPEN + b',"x": [' + b"[]," * 500 + b"[]]}", 200),
}


@pytest.mark.parametrize("name", NASTY)
def test_nasty_bodies(server: Server, name: str) -> None:
    raw, status = NASTY[name]
    for path in (TEXT, CHAT, "/tokenize", "/detokenize"):
        answer = server.send("POST", path, content=raw, headers={"content-type": "application/json"})
        assert answer.status_code == status or (path != TEXT and answer.status_code in (200, 400)), answer.text
        if answer.status_code == 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert len(answer.text) < 2000


def test_param_of_bytes_that_lie(server: Server) -> None:
    def param(raw: bytes) -> str | None:
        return server.send("POST", TEXT, content=raw).json()["error"]["param"]

    assert param(b'{"prompt": "\\ud800"}') == "prompt"
    assert param(OPEN + b',"prompt": "y"}') == "prompt"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_media_types(server: Server, kind: str) -> None:
    answer = server.send("POST", TEXT, content=OPEN + b"}", headers={"content-type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, 415)
    assert server.send("POST", TEXT, content=OPEN + b"}", headers={"content-encoding": "gzip"}).status_code == 415
    for good in ("application/json; charset=utf-8", "APPLICATION/JSON"):
        assert server.send("POST", TEXT, content=OPEN + b"}", headers={"content-type": good}).status_code == 200


def test_too_large_a_body(make_server: Callable[..., Server]) -> None:
    server = make_server(max_body_bytes=2000)
    assert server.post(TEXT, {"prompt": "x" * 3000}).status_code == 413

    async def parts() -> AsyncIterator[bytes]:  # no content-length
        for _ in range(300):
            yield b" " * 10

    assert server.send("POST", TEXT, content=parts()).status_code == 413
    assert server.post(TEXT, {"prompt": "x" * 900, "max_tokens": 1}).status_code == 200


def test_unknown_routes_methods_and_models(server: Server) -> None:
    missing = server.get("/v2/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFoundError")
    wrong = server.get(CHAT)
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "MethodNotAllowedError")
    assert wrong.headers["allow"] == "OPTIONS, POST"
    for path, body in (
        (TEXT, {"prompt": "x"}),
        (CHAT, {"messages": HELLO}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": []}),
    ):
        refused(server, path, {**body, "model": "gpt-9"}, "model", 404)


# ------------------------------------------------------------------------------------- field by field

BAD_VALUES: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", 2.5),
    ("temperature", "1"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.01),
    ("repetition_penalty", 0),
    ("repetition_penalty", 1e-300),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -3),
    ("n", 0),
    ("n", 5000),
    ("seed", 2**63),
    ("seed", 1.5),
    ("stop", 3),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [f"s{i}" for i in range(1000)]),
    ("stop", "x" * 5000),
    ("stop_token_ids", [5] * 2000),
    ("bad_words", [f"s{i}" for i in range(1000)]),
    ("logit_bias", {str(i): 1 for i in range(2000)}),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [2**40]),
    ("stop_token_ids", [5000]),
    ("min_tokens", -1),
    ("min_tokens", 500),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"99999": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", [1]),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [99999]),
    ("allowed_token_ids", [5, 6, 7] * 1000),
    ("bad_words", [""]),
    ("bad_words", "a"),
    ("skip_special_tokens", "yes"),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", -2),
    ("priority", 1),
    ("cache_salt", ""),
    ("cache_salt", "a/b"),
    ("cache_salt", "x" * 129),
    ("request_id", ""),
    ("truncate_prompt_tokens", 0),
    ("truncate_prompt_tokens", -2),
    ("truncate_prompt_tokens", 5000),
    ("truncation_side", "middle"),
    ("truncation_side", "left"),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 10**9),
    ("max_tokens", "5"),
    ("model", 3),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda value: repr(value)[:30])
def test_wrong_values_name_their_field(server: Server, name: str, value: Any) -> None:
    for path, body in ((TEXT, {"prompt": "x", "max_tokens": 9}), (CHAT, {"messages": HELLO, "max_tokens": 9})):
        answer = server.post(path, {**body, "temperature": 1.0, name: value})
        error = answer.json()["error"]
        assert answer.status_code == 400, answer.text
        assert error["param"].startswith((name, f"logit_bias[{name}")), error
        assert name in error["message"] or "choices" in error["message"]


@pytest.mark.parametrize("name", [*ChatRequest.unserved(), "tool_choice"])
def test_fields_that_are_not_served_are_refused_in_chat(server: Server, name: str) -> None:
    for value in ({"type": "json_object"}, "something", 7):
        refused(server, CHAT, {"messages": HELLO, "max_tokens": 1, name: value}, name)
    for value in (None, *ChatRequest.unserved().get(name, ["none"])):
        answer = server.post(CHAT, {"messages": HELLO, "max_tokens": 1, name: value})
        assert answer.status_code == 200, answer.text
        assert "x-tuili-warning" not in answer.headers


@pytest.mark.parametrize("name", CompletionRequest.unserved())
def test_fields_that_are_not_served_are_refused_in_completions(server: Server, name: str) -> None:
    refused(server, TEXT, {"prompt": "x", "max_tokens": 1, name: "something"}, name)
    for value in CompletionRequest.unserved()[name]:
        assert server.post(TEXT, {"prompt": "x", "max_tokens": 1, name: value}).status_code == 200


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CHATS: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [3]}, "messages.0"),
    ({"messages": [{"content": "x"}]}, "messages.0"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0"),
    ({"messages": [*HELLO, {"role": "user"}]}, "messages.1.content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages.0.content.0.text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.type",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}, *HELLO]}, "messages"),
    ({"tools": [TOOL]}, "tools"),
    ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"max_completion_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 5000}, "max_completion_tokens"),
    ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    ({"documents": 3}, "documents"),
]


@pytest.mark.parametrize(("fields", "param"), CHATS, ids=lambda value: repr(value)[:60])
def test_wrong_chats(server: Server, fields: dict[str, Any], param: str) -> None:
    refused(server, CHAT, {"messages": HELLO, **fields} if fields else {}, param)


PROMPTS: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 3]}, "prompt"),
    ({"prompt": [-1]}, "prompt.0"),
    ({"prompt": [99999]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [65] * 1024}, "prompt"),
    ({"prompt": ["x"] * 2000}, "prompt"),
    ({"prompt": ["x"] * 500, "n": 3}, "n"),
    ({"prompt": "x", "best_of": 2}, "best_of"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logprobs": True}, "logprobs"),
    ({"prompt": "x", "max_tokens": 1024}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
]


@pytest.mark.parametrize(("body", "param"), PROMPTS, ids=lambda value: repr(value)[:60])
def test_wrong_prompts(server: Server, body: dict[str, Any], param: str) -> None:
    answer = server.post(TEXT, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].split(".")[0] == param.split(".")[0]


def test_wrong_tokenizer_calls(server: Server) -> None:
    refused(server, "/tokenize", {}, "prompt")
    refused(server, "/tokenize", {"prompt": "x", "messages": HELLO}, "prompt")
    refused(server, "/detokenize", {"tokens": [5000]}, "tokens")
    refused(server, "/detokenize", {"tokens": [-1]}, "tokens.0")
    refused(server, "/detokenize", {}, "tokens")


def test_no_chat_template(make_server: Callable[..., Server]) -> None:
    server = make_server(chat_template="none")
    assert "chat template" in refused(server, CHAT, {"messages": HELLO}, "messages")
    assert "chat template" in refused(server, "/tokenize", {"messages": HELLO}, "messages")


def test_a_trusted_template_may_still_be_wrong(make_server: Callable[..., Server]) -> None:
    server = make_server(trust_request_chat_template=True)
    ask = {"messages": HELLO, "max_tokens": 1, "return_token_ids": True, "temperature": 0}
    assert (
        server.post(CHAT, {**ask, "chat_template": "{{ messages[0].content }}"}).json()["prompt_token_ids"]
        == (server.post("/tokenize", {"prompt": "hello"}).json()["tokens"])
    )
    refused(server, CHAT, {**ask, "chat_template": "{% if %}"}, "chat_template")
    refused(server, CHAT, {**ask, "chat_template": "{{ messages[7].content.x }}"}, "messages")
    refused(server, CHAT, {**ask, "chat_template": "{{ raise_exception('no') }}"}, "messages")
    refused(server, CHAT, {**ask, "chat_template": "{{ ''.__class__.__mro__ }}"}, "messages")


def test_rules_that_leave_no_token(server: Server) -> None:
    for stream in (False, True):
        body = {"prompt": "x", "max_tokens": 5, "stream": stream}
        refused(
            server,
            TEXT,
            {**body, "allowed_token_ids": [65], "bad_words": [TOKENIZER.token_text(65)]},
            "allowed_token_ids",
        )
        refused(server, TEXT, {**body, "allowed_token_ids": [END], "min_tokens": 2}, "allowed_token_ids")


def test_a_seed_of_minus_one_is_random(server: Server) -> None:
    body = {"prompt": "x", "max_tokens": 3, "temperature": 1.0, "seed": -1, "n": 8}
    texts = {choice["text"] for _ in range(8) for choice in server.post(TEXT, body).json()["choices"][:1]}
    assert len(texts) > 1


def test_priority_with_its_policy(make_server: Callable[..., Server]) -> None:
    server = make_server(scheduling_policy="priority")
    assert server.post(TEXT, {"prompt": "x", "priority": -3, "max_tokens": 1}).status_code == 200


# ------------------------------------------------------------------------------------- errors that are ours


def test_a_request_that_fails(server: Server) -> None:
    answer = server.post(TEXT, {"prompt": "FAIL", "temperature": 0})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
    assert "a bad number" in answer.json()["error"]["message"]
    stream = server.post(TEXT, {"prompt": "FAIL", "temperature": 0, "stream": True})
    *chunks, error, done, rest = stream.text.split("\n\n")
    assert (stream.status_code, len(chunks), done, rest) == (200, 3, "data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 500
    several = server.post(TEXT, {"prompt": ["ok", "FAIL", "ok"], "temperature": 0})
    assert several.status_code == 500
    server.wait_idle()


def test_a_full_queue(make_server: Callable[..., Server]) -> None:
    server = make_server(max_num_queued_reqs=2, max_num_seqs=1)
    body = {"prompt": ["x"] * 3, "temperature": 0}
    assert server.post(TEXT, body).status_code == 200, "one row and two places in the queue are free"

    async def two_at_once() -> list[httpx.Response]:
        executor(server.engine).gate.clear()
        async with server.client() as client:
            first = asyncio.create_task(client.post(TEXT, json=body))
            while not server.engine.snapshot().num_running:
                await asyncio.sleep(0.001)
            others = [
                asyncio.create_task(client.post(TEXT, json={**body, "stream": stream})) for stream in (False, True)
            ]
            while len(server.app.service.flight) < 3:  # all have asked; the engine looks at them when its step is done
                await asyncio.sleep(0.001)
            executor(server.engine).gate.set()
            return [await first, *[await other for other in others]]

    first, *others = run(two_at_once())
    assert first.status_code == 200
    for answer in others:
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "ServiceUnavailableError")
        assert int(answer.headers["retry-after"]) >= 1
    server.wait_idle()
    assert "takes 3 requests at a time" in refused(server, TEXT, {**body, "prompt": ["x"] * 20}, "prompt")
    assert "takes 3 requests at a time" in refused(server, TEXT, {"prompt": "x", "n": 4}, "n")
    assert server.post(TEXT, {**body, "prompt": "x"}).status_code == 200
    text = server.get("/metrics").text
    line = 'vllm:admission_rejections_total{engine="0",model_name="scripted",reason="queue_full"} 2.0'
    assert line in text
    assert [done.finish_reason for done in server.finished] == ["length"] * 7  # what is refused never ran
    for reason, count in {"length": 7, "stop": 0, "abort": 0, "error": 0}.items():
        ended = f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="scripted"}} {count}.0'
        assert ended in text
    assert 'vllm:e2e_request_latency_seconds_count{engine="0",model_name="scripted"} 7.0' in text


def test_a_dead_engine(make_server: Callable[..., Server]) -> None:
    server = make_server()
    stream = server.post(TEXT, {"prompt": "DIE", "temperature": 0, "stream": True})
    assert stream.status_code == 200
    *_, error, done, _ = stream.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
    assert done == "data: [DONE]"
    for answer in (server.post(TEXT, {"prompt": "x"}), server.get("/health"), server.get("/health/ready")):
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "ServiceUnavailableError")
    assert server.get("/metrics").status_code == 200


def test_a_bug_is_a_500_with_a_traceback_in_the_log(
    make_server: Callable[..., Server], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server()

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(server.engine, "encode_chat", broken)
    monkeypatch.setattr(server.engine, "stream", broken)
    for path, body in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "x"}), (TEXT, {"prompt": "x", "stream": True})):
        caplog.clear()
        answer = server.post(path, body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"]
        assert "ZeroDivisionError: secret detail" in caplog.text


# ------------------------------------------------------------------------------------- pages of other origins

PREFLIGHT = {
    "origin": "https://a.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def cross_origin(server: Server, origin: str) -> dict[str, str]:
    """The CORS headers of an answer, of an error and of a stream: the same, without their prefix."""
    found = []
    for body in ({"prompt": "x", "max_tokens": 1}, {"prompt": 3}, {"prompt": "x", "max_tokens": 1, "stream": True}):
        answer = server.send("POST", TEXT, json=body, headers={"origin": origin})
        found.append({k: v for k, v in answer.headers.items() if k.startswith("access-control-") or k == "vary"})
    assert found[0] == found[1] == found[2]
    return {key.removeprefix("access-control-"): value for key, value in found[0].items()}


def test_any_origin_by_default(server: Server) -> None:
    preflight = server.send("OPTIONS", CHAT, headers=PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
    allowed = cross_origin(server, "https://a.example")
    assert (allowed["allow-origin"], "x-request-id" in allowed["expose-headers"]) == ("*", True)
    assert "allow-credentials" not in allowed
    assert not [name for name in server.get("/health").headers if name.startswith("access-control")]


def test_listed_origins(make_server: Callable[..., Server]) -> None:
    server = make_server(allowed_origins='["https://a.example", "http://localhost:5173"]', allow_credentials=True)
    for origin in ("https://a.example", "http://localhost:5173"):
        allowed = cross_origin(server, origin)
        assert (allowed["allow-origin"], allowed["allow-credentials"], allowed["vary"]) == (origin, "true", "origin")
    for origin in ("https://b.example", "http://a.example", "null", "https://a.example.evil"):
        assert cross_origin(server, origin) == {"vary": "origin"}
        preflight = server.send("OPTIONS", CHAT, headers={**PREFLIGHT, "origin": origin})
        assert "access-control-allow-origin" not in preflight.headers
    assert cross_origin(make_server(allowed_origins=""), "https://a.example") == {"vary": "origin"}
    # with credentials a browser does not take "*"
    assert cross_origin(make_server(allow_credentials=True), "https://b.example")["allow-origin"] == "https://b.example"


@pytest.mark.parametrize("origins", ["[1]", "[", "example.com", '["ftp"]'])
def test_wrong_origins_are_told_at_the_start(make_server: Callable[..., Server], origins: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-origins"):
        make_server(allowed_origins=origins)


def test_options_and_head_of_every_route(server: Server) -> None:
    for path, methods in server.get("/openapi.json").json()["paths"].items():
        path = path.replace("{model}", "scripted")
        answer = server.send("OPTIONS", path)
        assert answer.status_code == 200
        assert set(answer.headers["allow"].lower().split(", ")) - {"options", "head"} == methods.keys()
        assert server.send("HEAD", path).status_code == (200 if "get" in methods else 405)
    assert server.send("OPTIONS", "/nowhere").status_code == 404


# ------------------------------------------------------------------------------------- paths


def test_a_base_url_with_v1_twice_is_explained(server: Server) -> None:
    answer = server.get("/v1/v1/models")
    assert answer.status_code == 404
    assert "base URL" in answer.json()["error"]["message"]
    assert server.get("/v1/models/").json() == server.get("/v1/models").json()
    long = server.get("/" + "a" * 50_000)
    assert (long.status_code, len(long.text) < 500) == (404, True)
