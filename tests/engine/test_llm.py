"""The Python API on a real (tiny, random) checkpoint; transformers is the oracle."""

from __future__ import annotations

import asyncio
import runpy
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import prompt, reference_greedy

from tuili import LLM, SamplingParams
from tuili.base.config import Config, dump, load
from tuili.base.errors import ConfigError, ModelError, RequestError, RequestFailed
from tuili.base.hardware import probe
from tuili.core.params import SamplingParams as Params
from tuili.engine.build import build

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
#: What the tests load: small pools and rows, one thread.
SMALL = {"threads": 1, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 128}


@pytest.fixture(scope="module")
def llm(tiny):
    with LLM(str(tiny("llama")), **SMALL) as llm:
        yield llm


@pytest.fixture
def one_core(monkeypatch):
    """For what takes the default of ``threads``: tests run in parallel, one core each."""
    machine = probe()
    monkeypatch.setattr("tuili.engine.build.probe", lambda: replace(machine, cores=1))


def greedy(**more) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, **more})


def test_greedy_equals_transformers_and_keeps_the_order(llm, tiny):
    prompts = [prompt(length, seed=length) for length in (3, 40, 17, 90, 1)]
    outputs = llm.generate(prompts, greedy(ignore_eos=True))
    for ids, output in zip(prompts, outputs, strict=True):
        assert output.prompt_token_ids == ids
        assert output.outputs[0].token_ids == reference_greedy(tiny("llama"), ids, 24)
        assert output.finished
    llm.engine.client.engine.scheduler.check_integrity()


def test_two_plans_in_flight_say_the_same(llm, tiny, monkeypatch):
    monkeypatch.setattr(llm.engine.client.engine, "depth", 2)
    prompts = [prompt(length, seed=length) for length in (3, 40, 17, 90, 1)]
    for params in (greedy(ignore_eos=True), SamplingParams(seed=1, max_tokens=20), greedy(stop=["a", "e"])):
        deep = llm.generate(prompts, params)
        monkeypatch.setattr(llm.engine.client.engine, "depth", 1)
        assert [o.outputs for o in llm.generate(prompts, params)] == [o.outputs for o in deep]
        monkeypatch.setattr(llm.engine.client.engine, "depth", 2)


def test_every_form_of_prompt(llm):
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode("Hello")
    forms = ["Hello", ids, {"prompt": "Hello"}, {"prompt_token_ids": ids}, {"prompt": "shown", "prompt_token_ids": ids}]
    outputs = llm.generate(forms, greedy())
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert [o.prompt for o in outputs] == ["Hello", None, "Hello", None, "shown"]
    for single in ("Hello", ids, {"prompt": "Hello"}):
        (output,) = llm.generate(single, greedy())
        assert output.outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert llm.generate([], greedy()) == []
    with pytest.raises(RequestError, match="prompt_token_ids"):
        llm.generate({"text": "Hello"})


def test_prompts_and_params_may_come_one_by_one(llm):
    texts = ["one", "two", "three", "four"]
    for prompts in (
        (text for text in texts),
        map(str, texts),
        iter(texts),
        np.array(texts),
        dict.fromkeys(texts).keys(),
    ):
        outputs = llm.generate(prompts, (greedy(max_tokens=2 + i) for i in range(4)))
        assert [output.prompt for output in outputs] == texts
        assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 3, 4, 5]
    ids = [[5, 6, 7], [8, 9, 10]]
    expected = [output.outputs for output in llm.generate(ids, greedy())]
    for prompts in (np.array(ids), torch.tensor(ids), (tuple(each) for each in ids), map(np.array, ids)):
        assert [output.outputs for output in llm.generate(prompts, greedy())] == expected
    for single in (
        np.array(ids[0]),
        torch.tensor(ids[0]),
        tuple(ids[0]),
        iter(ids[0]),
        [np.int64(id) for id in ids[0]],
    ):
        assert [output.outputs for output in llm.generate(single, greedy())] == expected[:1]
    assert len(llm.chat(([{"role": "user", "content": text}] for text in texts), greedy(max_tokens=1))) == 4


@pytest.mark.parametrize(
    ("prompts", "param"),
    [
        (None, "prompts"),
        (5, "prompts"),
        (b"bytes", "prompts"),
        ([b"bytes"], "prompt"),
        ([None], "prompt"),
        (["text", 5], "prompt"),
        ([5.0, 6.0], "prompt"),
        ([True], "prompt"),
        ("half \ud800", "prompt"),
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt_token_ids": "text"}, "prompt_token_ids"),
        ({"prompt": "Hi", "multi_modal_data": {"image": "x"}}, "multi_modal_data"),
        ({"prompt": "Hi", "cache_salt": 5}, "cache_salt"),
        ({"prompt": "Hi", "cache_salt": ""}, "cache_salt"),
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_refused(llm, prompts, param):
    steps = llm.engine.snapshot().steps
    with pytest.raises(RequestError) as raised:
        llm.generate(prompts, greedy())
    assert raised.value.param == param
    for params in ("x", [{"max_tokens": 3}], {"max_tokens": 3}):
        with pytest.raises(RequestError):
            llm.generate(["Hello"], params)
    with pytest.raises(RequestError, match="scheduling-policy priority"):
        llm.generate(["Hello"], greedy(), priority=[1])
    assert llm.engine.snapshot().steps == steps


def test_prefixes_are_reused_under_one_salt_only(llm):
    def cached(salt) -> int:
        prompt = {"prompt_token_ids": list(range(20, 84)), "cache_salt": salt}
        return llm.generate(prompt, greedy(max_tokens=1))[0].num_cached_tokens

    assert [cached(salt) for salt in ("one", "two", None, "one", "two", None)] == [0, 0, 0, 48, 48, 48]


def test_outputs_have_times(llm):
    began = llm.engine.clock.now()
    (output,) = llm.generate("Hello", greedy(max_tokens=4, ignore_eos=True))
    times = output.metrics
    stamps = [began, times.arrival_time, times.queued_ts, times.scheduled_ts, times.first_token_ts, times.last_token_ts]
    assert stamps == sorted(stamps)
    assert times.first_token_latency == times.first_token_ts - times.arrival_time
    assert times.num_generation_tokens == 4
    assert output.outputs[0].finished()


def test_params_one_or_each(llm):
    outputs = llm.generate(["a", "b"], [greedy(max_tokens=2), greedy(max_tokens=5, ignore_eos=True)])
    assert [o.usage[0].completion_tokens for o in outputs] == [2, 5]
    with pytest.raises(RequestError, match="2 prompts, but 1"):
        llm.generate(["a", "b"], [greedy()])
    assert llm.get_default_sampling_params() == SamplingParams()


def test_a_wrong_request_stops_before_any_runs(llm):
    steps = llm.engine.snapshot().steps
    with pytest.raises(RequestError) as raised:
        llm.generate(["fine", "x" * 300], greedy())
    assert raised.value.param == "prompt"
    assert llm.engine.snapshot().steps == steps


def test_chat_is_generate_on_the_template(llm):
    messages = [{"role": "user", "content": "Hi"}]
    (one,) = llm.chat(messages, greedy())
    two = llm.chat([messages, messages], greedy())
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    (plain,) = llm.generate(text, greedy())
    for output in (one, *two):
        assert output.prompt_token_ids == plain.prompt_token_ids
        assert output.outputs[0].token_ids == plain.outputs[0].token_ids


def test_logprobs_and_choices(llm):
    params = SamplingParams(n=3, seed=5, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,) = llm.generate("Hello", params)
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in output.outputs}) > 1
    for choice in output.outputs:
        assert [next(iter(table)) for table in choice.logprobs] == choice.token_ids, "the chosen one comes first"
        chosen = [table[id] for table, id in zip(choice.logprobs, choice.token_ids, strict=True)]
        assert choice.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in chosen))
        for table in choice.logprobs:
            assert sorted(entry.rank for entry in table.values())[:2] == [1, 2]
            assert len(table) in (2, 3)
    assert output.prompt_logprobs[0] is None
    assert [next(iter(table)) for table in output.prompt_logprobs[1:]] == output.prompt_token_ids[1:]
    (alone,) = llm.generate("Hello", params.with_(n=1, seed=6))
    assert alone.outputs[0].token_ids == output.outputs[1].token_ids, "choice i is the seed plus i"


def test_streamed_equals_offline(llm, tiny):
    prompts = ["Hello", "你好 🙂", "def f(x):"]
    offline = llm.generate(prompts, greedy(max_tokens=40, stop=["a"]))
    engine = build(Config(model=str(tiny("llama")), **SMALL))

    async def one(i: int) -> tuple[str, list[int]]:
        deltas = [d async for d in engine.generate(prompts[i], greedy(max_tokens=40, stop=["a"]), request_id=f"r{i}")]
        return "".join(d.text for d in deltas), [t for d in deltas for t in d.token_ids]

    async def main():
        return await asyncio.gather(*map(one, range(len(prompts))))

    try:
        for output, (text, ids) in zip(offline, asyncio.run(main()), strict=True):
            assert (output.outputs[0].text, output.outputs[0].token_ids) == (text, ids)
    finally:
        engine.close()


def test_the_resolved_config_reproduces_the_run(tiny, tmp_path):
    """Law 12, with sampling whose seeds nobody gave."""

    def run(config: Config) -> tuple[list[list[int]], Config]:
        options = {k: v for k, v in vars(config).items() if v is not None and k != "model"}
        with LLM(config.model, **options) as llm:
            outputs = llm.generate(["a", "b", "a"], SamplingParams(max_tokens=12, ignore_eos=True))
            return [o.outputs[0].token_ids for o in outputs], llm.engine.config

    first, resolved = run(Config(model=str(tiny("llama")), seed=11, **SMALL))
    path = tmp_path / "run.toml"
    path.write_text(dump(resolved))
    again, config = run(load(path, {}))
    assert again == first
    assert config == resolved
    assert first[0] != first[2], "requests without a seed differ"
    other, _ = run(Config(model=str(tiny("llama")), seed=12, **SMALL))
    assert other != first


def test_the_queue_limit_only_slows_offline_work_down(tiny):
    with LLM(str(tiny("llama")), **SMALL, max_num_queued_reqs=2) as llm:
        assert len(llm.generate(["a"] * 20, greedy(max_tokens=3))) == 20


def test_a_failing_request_is_named(llm, monkeypatch):
    executor = llm.engine.client.engine.executor
    execute = executor.execute

    def failing(plan):
        failed = Future()
        failed.set_result(replace(execute(plan).result(), tokens={}, failed={c.id: "no luck" for c in plan.chunks}))
        return failed

    monkeypatch.setattr(executor, "execute", failing)
    with pytest.raises(RequestFailed, match="no luck"):
        llm.generate(["a", "b"], greedy())
    monkeypatch.undo()
    assert llm.engine.snapshot().kv_blocks_used == 0


def test_what_cannot_be_built(tiny, tmp_path):
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(str(tiny("llama")), max_model_length=3)
    with pytest.raises(ConfigError, match="256"):
        LLM(str(tiny("llama")), max_model_len=1000)
    with pytest.raises(ModelError):
        LLM(str(tmp_path))
    with pytest.raises(ConfigError, match="no readable file"):
        LLM(str(tiny("llama")), chat_template="nowhere.jinja")


def test_vllms_quickstart_runs_with_only_the_import_changed(tiny, one_core, capsys):
    """The loop of https://docs.vllm.ai/en/latest/getting_started/quickstart.html."""
    prompts = ["Hello, my name is", "The president of the United States is", "The capital of France is"]
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
    llm = LLM(model=str(tiny("llama")))
    outputs = llm.generate(prompts, sampling_params)
    for output in outputs:
        print(f"Prompt: {output.prompt!r}, Generated text: {output.outputs[0].text!r}")
    llm.close()
    assert capsys.readouterr().out.count("Generated text") == 3
    assert SamplingParams is Params


def test_examples_agree_token_for_token(tiny, one_core, monkeypatch, capsys):
    """INVENTORY row 34: single, batch and streaming at temperature 0."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    results = {name: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](str(tiny("llama"))) for name in NAMES}
    assert results["single"] == results["batch"] == results["streaming"]
    assert len(results["single"]) == 3
    assert all(results["single"])
    assert capsys.readouterr().out


NAMES = ("single", "batch", "streaming")
