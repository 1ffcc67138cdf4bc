"""Shapes and values of answers (interfaces.md 5.1, 5.2), whole ones and streams of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripted import LINE, SCRIPT, TOKENIZER, Server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "temperature": 0, **fields}


def text(prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, **fields}


def good(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = server.post(path, {**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    raw = answer.content.split(b"\n\n")
    assert raw[-2:] == [b"data: [DONE]", b""]
    assert all(item.startswith(b"data: ") and b"\n" not in item for item in raw[:-1])
    return [json.loads(item.removeprefix(b"data: ")) for item in raw[:-2]]


# ------------------------------------------------------------------------------------- one answer


def test_chat(server: Server) -> None:
    answer = good(server, CHAT, chat())
    prompt = TOKENIZER.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", False)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "scripted"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": SCRIPT, "refusal": None, "reasoning": None}
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("stop", None, None)
    count = len(LINE) + 1  # and the end of text
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["completion_tokens"] == count
    assert answer["usage"]["total_tokens"] == len(prompt) + count


def test_completion_has_16_tokens_by_default(server: Server) -> None:
    answer = good(server, TEXT, text())
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"][0]["text"] == TOKENIZER.decode(LINE[:16])
    assert answer["choices"][0]["finish_reason"] == "length"
    whole = good(server, TEXT, text(max_tokens=None))
    assert whole["choices"][0]["text"] == SCRIPT


def test_default_length_fits_at_the_end_of_the_context(server: Server) -> None:
    answer = good(server, TEXT, text([65] * 1020))
    assert answer["usage"]["completion_tokens"] == 4


def test_max_completion_tokens_wins(server: Server) -> None:
    answer = good(server, CHAT, chat(max_completion_tokens=3, max_tokens=9))
    assert answer["usage"]["completion_tokens"] == 3
    assert good(server, CHAT, chat(max_tokens=9))["usage"]["completion_tokens"] == 9


def test_several_prompts_and_choices_are_numbered_prompt_first(server: Server) -> None:
    answer = good(server, TEXT, text(["a", "b", "c"], n=2, temperature=1, seed=3, max_tokens=4, echo=True))
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for index, choice in enumerate(answer["choices"]):
        start = 3 + index % 2  # the script starts at the seed, and a choice's seed is the request's plus its number
        assert choice["text"] == "abc"[index // 2] + TOKENIZER.decode(LINE[start : start + 4])
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("prompt", ["ab", [65, 66], ["ab"], [[65, 66]]])
def test_all_kinds_of_prompts(server: Server, prompt: Any) -> None:
    assert good(server, TEXT, text(prompt))["usage"]["prompt_tokens"] == 2


def test_stop_string_and_stop_token(server: Server) -> None:
    choice = good(server, CHAT, chat(stop=["Zürich", "END"]))["choices"][0]
    assert choice["message"]["content"] == SCRIPT[: SCRIPT.index("Zürich")]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "Zürich")
    choice = good(server, CHAT, chat(stop="Zürich", include_stop_str_in_output=True))["choices"][0]
    assert choice["message"]["content"] == SCRIPT[: SCRIPT.index("Zürich") + 6]
    comma = TOKENIZER.encode(",", False)[0]
    choice = good(server, CHAT, chat(stop_token_ids=[comma]))["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Once", comma)


def test_seed_decides(server: Server) -> None:
    bodies = [chat(temperature=1, seed=seed, max_tokens=9) for seed in (1, 1, 2)]
    one, same, other = (good(server, CHAT, body)["choices"][0]["message"]["content"] for body in bodies)
    assert one == same != other


def test_min_tokens_and_ignore_eos(server: Server) -> None:
    answer = good(server, CHAT, chat(ignore_eos=True, max_tokens=len(LINE) + 5))
    assert answer["choices"][0]["message"]["content"] == SCRIPT + SCRIPT[:5]


def test_chat_logprobs(server: Server) -> None:
    content = good(server, CHAT, chat(max_tokens=8, logprobs=True, top_logprobs=3))["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [list(TOKENIZER.token_bytes(id)) for id in LINE[:8]]
    for place, entry in enumerate(content):
        assert entry["logprob"] == (-1.25 if place % 4 == 3 else -0.25)
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][2]["logprob"] == -9999.0  # minus infinity
    plain = good(server, CHAT, chat(max_tokens=2, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in plain] == [[], []]


def test_completion_logprobs(server: Server) -> None:
    choice = good(server, TEXT, text(max_tokens=12, logprobs=2))["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == 12
    for place, top in enumerate(found["top_logprobs"]):
        assert found["tokens"][place] in top
    # "Once, " then 推 in three tokens, 理 in three
    assert found["text_offset"] == [0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 7, 7]
    only = good(server, TEXT, text(max_tokens=4, logprobs=1))["choices"][0]["logprobs"]["top_logprobs"]
    assert [len(top) for top in only] == [1, 1, 1, 2], "the chosen token is added where it is not among the top ones"


def test_echo_with_logprobs(server: Server) -> None:
    choice = good(server, TEXT, text("héy", max_tokens=3, logprobs=1, echo=True))["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == "héyOnc"
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert None not in found["token_logprobs"][1:]
    assert found["text_offset"] == [0, 1, 1, 2, 3, 4, 5]


def test_echo_alone_scores_a_prompt(server: Server) -> None:
    answer = good(server, TEXT, text("abc", max_tokens=0, logprobs=0, echo=True))
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 0


def test_echo_of_special_tokens(server: Server) -> None:
    prompt = "<|im_start|>hi"
    choice = good(server, TEXT, text(prompt, max_tokens=1, logprobs=0, echo=True))["choices"][0]
    assert choice["text"] == prompt + "O"
    assert choice["logprobs"]["text_offset"] == [0, 12, 13, 14]
    ids = TOKENIZER.encode(prompt, False)
    assert good(server, TEXT, text(ids, max_tokens=1, echo=True))["choices"][0]["text"] == "hiO"


def test_token_ids_and_names(server: Server) -> None:
    body = chat(max_tokens=3, return_token_ids=True, logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
    answer = good(server, CHAT, body)
    assert answer["prompt_token_ids"] == TOKENIZER.encode(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", False
    )
    choice = answer["choices"][0]
    assert choice["token_ids"] == LINE[:3]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [f"token_id:{id}" for id in LINE[:3]]
    choice = good(server, TEXT, text([65, 66], max_tokens=2, return_token_ids=True))["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([65, 66], LINE[:2])


def test_prompt_logprobs(server: Server) -> None:
    choice = good(server, TEXT, text([65, 66, 67], max_tokens=1, prompt_logprobs=1))["choices"][0]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert second["66"] == {"logprob": -0.25, "rank": 1, "decoded_token": TOKENIZER.token_text(66)}
    assert "67" in third
    assert good(server, CHAT, chat(max_tokens=1, prompt_logprobs=0))["prompt_logprobs"][0] is None


def test_truncation(server: Server) -> None:
    ids = list(range(65, 90))
    for fields, kept in (
        ({"truncate_prompt_tokens": 3}, ids[-3:]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, ids[:3]),
        ({"truncate_prompt_tokens": 100}, ids),
    ):
        choice = good(server, TEXT, text(ids, max_tokens=1, return_token_ids=True, **fields))["choices"][0]
        assert choice["prompt_token_ids"] == kept
    long = good(server, TEXT, text([65] * 5000, max_tokens=10, truncate_prompt_tokens=-1))
    assert long["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": 1014,
        "completion_tokens": 10,
        "total_tokens": 1024,
        "prompt_tokens_details": None,
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_continue_final_message_and_echo(server: Server) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well: "}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 4, "continue_final_message": True}
    answer = good(server, CHAT, {**body, "echo": True, "return_token_ids": True})
    assert TOKENIZER.decode(answer["prompt_token_ids"], False).endswith("<|im_start|>assistant\nWell: ")
    assert answer["choices"][0]["message"]["content"] == "Well: Once"
    assert good(server, CHAT, body)["choices"][0]["message"]["content"] == "Once"


def test_content_parts_become_text(server: Server) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    answer = good(server, CHAT, chat(messages=messages, max_tokens=1, return_token_ids=True))
    assert "user\na\nb<|im_end|>" in TOKENIZER.decode(answer["prompt_token_ids"], False)


def test_cached_tokens_are_counted_once_per_prompt(server: Server) -> None:
    prompt = [70] * 40
    good(server, TEXT, text(prompt, max_tokens=1))
    answer = good(server, TEXT, text(prompt, max_tokens=1, n=3, temperature=1))
    assert answer["usage"]["prompt_tokens"] == 40
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 36
    salted = good(server, TEXT, text(prompt, max_tokens=1, cache_salt="mine"))
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


# ------------------------------------------------------------------------------------- other routes


def test_models(server: Server) -> None:
    (card,) = server.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"], card["parent"]) == ("scripted", "model", 1024, None)
    assert server.get("/v1/models/scripted").json() == card
    assert server.get("/v1/models/other").status_code == 404


def test_tokenize_and_back(server: Server) -> None:
    for prompt in ("hello 推理 👩‍🚀", ""):
        answer = good(server, "/tokenize", {"prompt": prompt, "return_token_strs": True})
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["max_model_len"] == 1024
        assert good(server, "/detokenize", {"tokens": answer["tokens"]}) == {"prompt": prompt}
    chatted = good(server, "/tokenize", {"messages": HELLO, "add_generation_prompt": False})
    assert good(server, "/detokenize", chatted)["prompt"] == "<|im_start|>user\nhello<|im_end|>\n"


def test_probes(server: Server) -> None:
    for path in ("/health", "/health/ready", "/ping"):
        answer = server.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert server.send("POST", "/ping").status_code == 200
    assert set(server.get("/version").json()) == {"version"}
    assert server.get("/load").json() == {"server_load": 0}


def test_server_info_says_where_defaults_come_from(server: Server) -> None:
    info = server.get("/server_info").json()
    assert info["sampling_defaults"]["temperature"] == {"value": 1.0, "source": "neutral"}
    assert info["config"]["max_model_len"] == 1024


def test_request_ids(server: Server) -> None:
    given = {"x-request-id": "abc-1"}
    answer = server.send("POST", TEXT, json=text(), headers=given)
    assert (answer.headers["x-request-id"], answer.json()["id"]) == ("abc-1", "cmpl-abc-1")
    assert server.post(TEXT, text(request_id="mine")).json()["id"] == "cmpl-mine"
    new = server.send("POST", TEXT, json=text(), headers={"x-request-id": "no good"}).headers["x-request-id"]
    assert len(new) == 32


def test_unknown_fields_are_named(server: Server) -> None:
    answer = server.post(TEXT, text(**{"temprature": 0.3, "x\ny": 1, "推": 2}))
    assert answer.status_code == 200
    assert answer.headers["x-tuili-warning"] == r"ignored unknown fields: 'temprature', 'x\ny', '\u63a8'"
    assert "x-tuili-warning" not in server.post(TEXT, text()).headers
    many = server.post(TEXT, text(**{"f" * 90 + str(i): 1 for i in range(99)}))
    assert len(many.headers["x-tuili-warning"]) <= 1500


def test_unknown_fields_are_named_wherever_they_stand(server: Server) -> None:
    """docs/server.md: fields that would be ignored are refused or named in a header."""

    def warning(path: str, body: dict[str, Any]) -> str | None:
        answer = server.post(path, body)
        assert answer.status_code == 200
        return answer.headers.get("x-tuili-warning")

    options = {"stream": True, "stream_options": {"includes_usage": True}}
    assert warning(TEXT, text(**options)) == "ignored unknown fields: 'stream_options.includes_usage'"
    parts = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "On", "prefix": True}]
    seen = "only the chat template sees: 'messages.0.content.0.cache_control', 'messages.1.prefix'"
    assert warning(CHAT, chat(messages=messages)) == seen
    assert warning("/tokenize", {"messages": messages}) == seen
    assert warning(CHAT, chat(messages=messages, n_best=1)) == f"ignored unknown fields: 'n_best'; {seen}"
    nothing = [*HELLO, {"role": "assistant", "content": "x", "refusal": None, "audio": None, "annotations": None}]
    assert warning(CHAT, chat(messages=nothing)) is None  # null asks for nothing: OpenAI's own messages have it
    # names of other routes' fields are no fields here
    assert warning(TEXT, text(messages=[1], tokens=2)) == "ignored unknown fields: 'messages', 'tokens'"


# ------------------------------------------------------------------------------------- streams

CASES: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    *({"max_tokens": count} for count in range(6, 13)),
    {"max_tokens": 22},  # half an emoji
    {"stop": "Zürich"},
    {"stop": ["推理 met", "a"]},
    {"stop": "理", "include_stop_str_in_output": True},
    {"stop": "never there", "max_tokens": 40},
    {"stop": "END was", "min_tokens": 70},
    {"temperature": 1, "seed": 5, "n": 3},
    {"max_tokens": 20, "return_token_ids": True},
    {"echo": True, "max_tokens": 9},
]


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chat_stream_equals_answer(server: Server, case: dict[str, Any], logprobs: bool) -> None:
    body = chat(**case, **({"logprobs": True, "top_logprobs": 2} if logprobs else {}))
    whole, chunks = good(server, CHAT, body), events(server, CHAT, body)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    for choice in whole["choices"]:
        own = [item for chunk in chunks for item in chunk["choices"] if item["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in item["delta"] for item in own[1:])
        assert "".join(item["delta"].get("content", "") for item in own) == choice["message"]["content"]
        assert [item["finish_reason"] for item in own[:-1]] == [None] * (len(own) - 1)
        end = own[-1]
        assert (end["delta"], end["finish_reason"], end["stop_reason"]) == (
            {},
            choice["finish_reason"],
            choice["stop_reason"],
        )
        if logprobs:
            streamed = [entry for item in own if item["logprobs"] for entry in item["logprobs"]["content"]]
            assert streamed == choice["logprobs"]["content"]
        if case.get("return_token_ids"):
            assert [id for item in own for id in item.get("token_ids", ())] == choice["token_ids"]


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("prompt", ["hé推y", ["a", "b"], [[256 + 1, 65, 66]]], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_completion_stream_equals_answer(server: Server, case: dict[str, Any], prompt: Any, logprobs: bool) -> None:
    body = text(prompt, **{"max_tokens": None, **case}, **({"logprobs": 2} if logprobs else {}))
    whole, chunks = good(server, TEXT, body), events(server, TEXT, body)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    for choice in whole["choices"]:
        own = [item for chunk in chunks for item in chunk["choices"] if item["index"] == choice["index"]]
        assert "".join(item["text"] for item in own) == choice["text"]
        assert (own[-1]["finish_reason"], own[-1]["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])
        if logprobs:
            for key, values in choice["logprobs"].items():
                assert [value for item in own if item["logprobs"] for value in item["logprobs"][key]] == values
        if case.get("return_token_ids"):
            assert own[0]["prompt_token_ids"] == choice["prompt_token_ids"]
            assert [id for item in own for id in item["token_ids"]] == choice["token_ids"]


def test_echoed_logprobs_reach_every_choice_of_a_stream(server: Server) -> None:
    body = text(["ab", "cde"], n=3, temperature=1, seed=0, max_tokens=4, echo=True, logprobs=1)
    whole, chunks = good(server, TEXT, body), events(server, TEXT, body)
    for choice in whole["choices"]:
        own = [item for chunk in chunks for item in chunk["choices"] if item["index"] == choice["index"]]
        for key, values in choice["logprobs"].items():
            assert [value for item in own for value in item["logprobs"][key]] == values
        assert choice["logprobs"]["token_logprobs"][0] is None


def test_usage_in_streams(server: Server) -> None:
    body = chat(max_tokens=5)
    assert not any("usage" in chunk for chunk in events(server, CHAT, body))
    usage = good(server, CHAT, body)["usage"]
    for path, sent in ((CHAT, body), (TEXT, text(max_tokens=5))):
        usage = good(server, path, sent)["usage"]
        *chunks, last = events(server, path, {**sent, "stream_options": {"include_usage": True}})
        assert not any("usage" in chunk for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 5
        assert last["usage"]["total_tokens"] == usage["total_tokens"]
        options = {"include_usage": True, "continuous_usage_stats": True}
        running = [chunk["usage"] for chunk in events(server, path, {**sent, "stream_options": options})]
        counts = [item["completion_tokens"] for item in running]
        assert counts == sorted(counts)
        assert counts[-1] == 5
        assert all(item["total_tokens"] == item["prompt_tokens"] + item["completion_tokens"] for item in running)


def test_characters_that_end_lines_are_escaped(server: Server) -> None:
    odd = "a\u2028b\x85c\u2029d"
    answer = server.post(TEXT, text(odd, echo=True, stream=True, max_tokens=1))
    assert not {"\u2028", "\x85", "\u2029"} & set(answer.text)
    first = json.loads(answer.text.split("\n\n")[0].removeprefix("data: "))
    assert first["choices"][0]["text"] == odd + "O"
