"""Text in and text out over a simulated model that says what a script tells it to."""

from __future__ import annotations

import asyncio
import time

import pytest
from engine_parts import TEXTS, byte_level, engine, sentencepiece, speaker, text_engine, wait_idle

from tuili.base.errors import EngineDead, OverloadedError, RequestError, RequestFailed
from tuili.core.params import SamplingParams
from tuili.core.plan import TopLogprobs
from tuili.core.request import FinishReason, Request, Update
from tuili.engine.transcript import Transcript

PROMPT = [40, 41, 42]


def speaking(line: str, tokenizer=None, limits=None, **options):
    """A text engine whose model answers ``line`` to three tokens, and then ends the text."""
    tokenizer = tokenizer or byte_level()
    ids = [*tokenizer.encode(line, add_special_tokens=False), tokenizer.eos]
    run = engine(tokens=speaker({"r": ids}, len(PROMPT)), **options)
    return text_engine(tokenizer, run, **(limits or {}))


async def collect(text, params, **options) -> dict[int, list]:
    deltas: dict[int, list] = {}
    async for delta in text.generate(PROMPT, params, request_id="r", **options):
        deltas.setdefault(delta.index, []).append(delta)
    return deltas


def generate(text, **params) -> dict[int, list]:
    try:
        deltas = asyncio.run(collect(text, SamplingParams(**{"max_tokens": None, **params})))
        wait_idle(text)
        return deltas
    finally:
        text.close()


def joined(deltas) -> str:
    return "".join(d.text for d in deltas)


@pytest.mark.parametrize("line", TEXTS)
@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece])
def test_streamed_text_is_whole_and_ends_at_eos(line, tokenizer):
    deltas = generate(speaking(line, tokenizer=tokenizer(), max_model_len=400))[0]
    assert joined(deltas) == (line if tokenizer is byte_level else " " + line), "SentencePiece starts a word by a space"
    assert all("\ufffd" not in d.text for d in deltas)
    last = deltas[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", None)
    assert last.usage.completion_tokens == sum(len(d.token_ids) for d in deltas)
    assert last.usage.prompt_tokens == 3
    assert all(d.finish_reason is None and d.usage is None for d in deltas[:-1])


@pytest.mark.parametrize(
    ("params", "text", "reason", "stop_reason"),
    [
        ({}, "The quick brown fox jumps.", "stop", None),
        ({"stop": "brown"}, "The quick ", "stop", "brown"),
        ({"stop": ["fox jumps", "own", "zebra"]}, "The quick br", "stop", "own"),
        ({"stop": "brown", "include_stop_str_in_output": True}, "The quick brown", "stop", "brown"),
        ({"stop": "zebra"}, "The quick brown fox jumps.", "stop", None),
        ({"stop": "The", "min_tokens": 8}, "The quick brown fox jumps.", "stop", None),
        ({"stop": "."}, "The quick brown fox jumps", "stop", "."),
    ],
)
def test_stop_strings(params, text, reason, stop_reason):
    engine_text = speaking("The quick brown fox jumps.")
    finished = []
    engine_text.on_finish.append(finished.append)
    deltas = generate(engine_text, **params)[0]
    assert joined(deltas) == text
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (reason, stop_reason)
    assert [(f.id, f.finish_reason, f.usage) for f in finished] == [("r", reason, deltas[-1].usage)]
    assert engine_text.snapshot().kv_blocks_used == 0


def test_a_stop_string_overrides_length_and_stops_the_engine():
    line = "The quick brown fox"
    ids = byte_level().encode(line)
    whole = generate(speaking(line), max_tokens=len(ids))[0]
    assert whole[-1].finish_reason == "length"
    stopped = generate(speaking(line), max_tokens=len(ids), stop=line[-2:])[0]
    assert (joined(stopped), stopped[-1].finish_reason) == (line[:-2], "stop")
    text = speaking("a b c d e f g h i j k l m n o p q", before=lambda plan: time.sleep(0.02))
    early = generate(text, stop="c")[0]
    assert early[-1].usage.completion_tokens <= 6
    assert text.snapshot().steps <= 10, "the engine went on"


def test_a_stop_token_is_not_part_of_the_text_unless_asked_for():
    tokenizer = byte_level()
    line = tokenizer.encode("The quick brown")
    for include, expected in ((False, tokenizer.decode(line[:3])), (True, tokenizer.decode(line[:4]))):
        deltas = generate(speaking("The quick brown"), stop_token_ids=[line[3]], include_stop_str_in_output=include)[0]
        assert joined(deltas) == expected
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", line[3])
        assert deltas[-1].usage.completion_tokens == 4
    shown = generate(speaking("Hi"), skip_special_tokens=False, include_stop_str_in_output=True)[0]
    assert joined(shown) == "Hi<|end|>"
    assert joined(generate(speaking("Hi"), skip_special_tokens=False)[0]) == "Hi"
    assert joined(generate(speaking("Hi"), ignore_eos=True, max_tokens=6)[0]) == "Hi"


def test_without_detokenizing_there_are_ids_only():
    deltas = generate(speaking("Hi there"), detokenize=False)[0]
    assert joined(deltas) == ""
    assert [t for d in deltas for t in d.token_ids] == [*byte_level().encode("Hi there"), byte_level().eos]


def test_choices_interleave_and_each_ends():
    tokenizer = byte_level()
    script = {f"r-{i}": [*tokenizer.encode(f"choice {i} " * (i + 1)), tokenizer.eos] for i in range(3)}
    text = text_engine(tokenizer, engine(tokens=speaker(script, len(PROMPT))))
    finished = []
    text.on_finish.append(finished.append)
    deltas = generate(text, n=3, seed=1)
    assert {i: joined(d) for i, d in deltas.items()} == {i: f"choice {i} " * (i + 1) for i in range(3)}
    assert all(d[-1].finish_reason == "stop" and d[-1].usage for d in deltas.values())
    assert sorted(f.id for f in finished) == ["r-0", "r-1", "r-2"]


def test_one_choice_stopping_leaves_the_others_running():
    tokenizer = byte_level()
    script = {"r-0": [*tokenizer.encode("stop now please"), 0], "r-1": [*tokenizer.encode("go on and on"), 0]}
    text = text_engine(tokenizer, engine(tokens=speaker(script, len(PROMPT))))
    deltas = generate(text, n=2, stop="now")
    assert {i: joined(d) for i, d in deltas.items()} == {0: "stop ", 1: "go on and on"}


def test_records_of_finished_requests():
    text = speaking("The quick brown fox")
    finished, steps = [], []
    text.on_finish.append(lambda record: 1 / 0)  # a broken metric ends nobody's request
    text.on_finish.append(finished.append)
    text.on_step.append(lambda plan, result, stats: steps.append(stats))
    generate(text)
    (record,) = finished
    timing = record.timing
    assert (
        record.arrival <= timing.queued <= timing.scheduled <= timing.first_token <= timing.last_token <= record.ended
    )
    assert len(steps) == text.snapshot().steps


def test_records_say_whose_it_was_when_it_came_and_how_often_it_gave_way():
    """Of a pool so small that requests are preempted."""
    tokenizer = byte_level()
    run = engine(tokens=lambda id, history: 50 + len(history) % 7, blocks=26, max_model_len=100, verify=True)
    text = text_engine(tokenizer, run)
    finished: dict = {}
    text.on_finish.append(lambda record: finished.update({record.id: record}))

    async def one(i: int) -> None:
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        owner = {"tenant": f"t{i % 3}", "session": f"s{i}"}
        async for _ in text.generate(PROMPT, params, request_id=f"r{i}", arrival=-float(i), **owner):
            pass

    async def main() -> None:
        await asyncio.gather(*map(one, range(12)))

    asyncio.run(main())
    for i in range(12):
        record = finished[f"r{i}"]
        assert (record.arrival, record.tenant, record.session) == (-float(i), f"t{i % 3}", f"s{i}")
    assert sum(record.preemptions for record in finished.values()) == text.snapshot().preemptions > 0
    text.close()
    assert not text.healthy()


def test_an_arrival_that_nobody_gave_is_now():
    text = speaking("Hi")
    finished = []
    text.on_finish.append(finished.append)
    before = text.clock.now()
    generate(text)
    assert before <= finished[0].arrival <= finished[0].timing.queued


def test_leaving_the_iterator_aborts():
    text = speaking("word " * 30, before=lambda plan: time.sleep(0.002))
    finished = []
    text.on_finish.append(finished.append)

    async def main():
        iterator = text.generate(PROMPT, SamplingParams(max_tokens=None), request_id="r")
        async for _ in iterator:
            break
        await iterator.aclose()
        for _ in range(200):
            if not text.client.engine.scheduler.has_work:
                break
            await asyncio.sleep(0.005)
        assert text.snapshot().kv_blocks_used == 0

    asyncio.run(main())
    assert [f.finish_reason for f in finished] == ["abort"]
    text.close()


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [([], {}, "prompt"), ("", {}, "prompt"), (PROMPT, {"max_tokens": 999}, "max_tokens"), ("x" * 2000, {}, "prompt")],
)
def test_errors_before_the_first_delta(prompt, params, param):
    text = speaking("x")
    finished = []
    text.on_finish.append(finished.append)

    async def main():
        with pytest.raises(RequestError) as raised:
            await anext(text.generate(prompt, SamplingParams(**params), request_id="r"))
        assert raised.value.param == param

    asyncio.run(main())
    assert not finished, "it was never accepted"


def test_overload_death_and_failure_are_typed():
    async def main():
        full = speaking("word " * 30, max_queued=1, seqs=1, before=lambda plan: time.sleep(0.01))
        first = full.generate(PROMPT, SamplingParams(max_tokens=50), request_id="r")
        await anext(first)
        with pytest.raises(OverloadedError):
            await anext(full.generate(PROMPT, SamplingParams(n=2, max_tokens=5), request_id="q"))
        await first.aclose()

        failing = speaking("word", fails=lambda plan, chunk: "no luck" if plan.step == 1 else None)
        finished = []
        failing.on_finish.append(finished.append)
        with pytest.raises(RequestFailed, match="no luck"):
            await collect(failing, SamplingParams())
        assert [f.finish_reason for f in finished] == ["error"]
        assert failing.healthy()

        def die(plan):
            raise OSError("gone")

        dead = speaking("word", before=die)
        with pytest.raises(EngineDead):
            await collect(dead, SamplingParams())
        assert not dead.healthy()

    asyncio.run(main())


def test_a_bug_outside_of_the_engine_ends_one_request(monkeypatch):
    text = speaking("word")
    monkeypatch.setattr(Transcript, "push", lambda self, update: 1 / 0)

    async def main():
        with pytest.raises(RequestFailed, match="ZeroDivisionError"):
            await collect(text, SamplingParams())

    asyncio.run(main())
    wait_idle(text)
    assert text.healthy()


@pytest.mark.parametrize("stop", [None, "✋"])
def test_hundreds_of_streams(stop):
    tokenizer = byte_level()
    tail = "" if stop is None else stop + " not to be seen" * 3
    lines = {f"r{i}": f"{i} 你好 🙂 " * (1 + i % 3) for i in range(300)}
    script = {id: [*tokenizer.encode(line + tail), tokenizer.eos] for id, line in lines.items()}
    text = text_engine(tokenizer, engine(tokens=speaker(script, len(PROMPT)), seqs=64, budget=256))

    async def one(id):
        params = SamplingParams(max_tokens=None, stop=stop)
        return "".join([d.text async for d in text.generate(PROMPT, params, request_id=id)])

    async def main():
        return await asyncio.gather(*map(one, lines))

    try:
        assert asyncio.run(main()) == list(lines.values())
        text.client.engine.scheduler.check_integrity()
    finally:
        text.close()


# ------------------------------------------------------------------------------------- a transcript, update by update


def transcript(**params) -> Transcript:
    request = Request("r", 2, [40, 41], SamplingParams(max_tokens=50, eos_token_ids=(0,), **params))
    return Transcript(request, byte_level())


def test_tokens_behind_a_stop_string_do_not_count_however_many_come_at_once():
    ids = tuple(byte_level().encode("one two three four"))
    logprobs = tuple(TopLogprobs(t, -1.0, 1, ((t, -1.0),)) for t in ids)
    one = transcript(stop="two", logprobs=1)
    together = one.push(Update("r", ids, logprobs))
    step_by_step = transcript(stop="two", logprobs=1)
    pieces = []
    for token, entry in zip(ids, logprobs, strict=True):
        pieces.append(step_by_step.push(Update("r", (token,), (entry,))))
        if step_by_step.stopped:
            break
    assert together.token_ids == tuple(t for p in pieces for t in p.token_ids)
    assert together.usage == pieces[-1].usage
    assert (together.text, together.stop_reason) == ("one ", "two")
    assert len(together.logprobs) == len(together.token_ids)


def test_logprobs_have_exact_bytes():
    tokenizer = byte_level()
    ids = tuple(tokenizer.encode("你🙂"))
    choice = transcript(logprobs=2)
    delta = choice.push(Update("r", ids, tuple(TopLogprobs(t, -0.5, 1, ((t, -0.5), (5, -3.0))) for t in ids)))
    assert b"".join(entry.chosen.bytes for entry in delta.logprobs) == "你🙂".encode()
    assert delta.logprobs[0].top[1].text == tokenizer.token_text(5)
    assert delta.logprobs[0].rank == 1
    assert transcript().push(Update("r", ids)).logprobs is None


def test_prompt_logprobs_come_once_with_the_first_delta():
    choice = transcript(prompt_logprobs=0)
    entries = [TopLogprobs(t, -1.0, 2) for t in (41, 42)]
    assert choice.push(Update("r", (), (), (entries[0],))) is None
    first = choice.push(Update("r", (50,), (), (entries[1],)))
    assert first.prompt_logprobs[0] is None
    assert [e.chosen.id for e in first.prompt_logprobs[1:]] == [41, 42]
    assert choice.push(Update("r", (51,))).prompt_logprobs is None


def test_a_character_cut_off_by_the_end():
    ids = tuple(byte_level().encode("🙂"))
    delta = transcript().push(Update("r", ids[:-1], finish=FinishReason.LENGTH))
    assert delta.text == byte_level().decode(ids[:-1]) == "\ufffd"


# ---------------------------------------------------------------------------------------------------------------- chat


def test_chat_uses_the_models_template_or_the_requests():
    tokenizer = byte_level()
    text = text_engine(tokenizer, engine())
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(RequestError, match="no chat template") as raised:
        text.encode_chat(messages)
    assert raised.value.param == "messages"
    own = "{% for m in messages %}<|start|>{{ m.content }}{{ eos_token }}{% endfor %}"
    ids = text.encode_chat(messages, chat_template=own)
    assert ids == [tokenizer.token_id("<|start|>"), *tokenizer.encode("Hi"), tokenizer.eos]
    text._templates = lambda tools: "tools" if tools else "{{ messages[0].content }}"
    assert tokenizer.decode(text.encode_chat(messages)) == "Hi"
    assert tokenizer.decode(text.encode_chat(messages, tools=[{"type": "function"}])) == "tools"
    with pytest.raises(RequestError, match="not valid Jinja") as raised:
        text.encode_chat(messages, chat_template="{% for %}")
    assert raised.value.param == "chat_template"
