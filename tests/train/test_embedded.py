"""The models that ship: they load everywhere, are as small as promised, and predict stories that they never saw."""

from __future__ import annotations

import json
import math
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import tuili
from tuili import LLM, SamplingParams
from tuili.layers.decoder import Decoder
from tuili.models.checkpoint import open_checkpoint
from tuili.models.weights import load_model
from tuili.train import data, loss
from tuili.train.corpus import Document
from tuili.train.sample import generate
from tuili.train.tokenizer import END, END_OF_TEXT, START

EMBEDDED = Path(tuili.__file__).parent / "embedded"
MODELS = ("target", "draft")
#: Ten of the held-out documents (data/SOURCES: erikhyrkas/snakes, MIT).
HELD_OUT = [Document(**d) for d in json.loads((Path(__file__).parent / "held_out.json").read_text())]
OWN_PROMPTS = [d.prompt for d in HELD_OUT]
#: What a newcomer may type, none of it chosen for what comes out.
OPENINGS = (
    *("Once upon a time", "Once upon a time, there was a little girl named", "The old lighthouse keeper"),
    *("In a small village by the sea,", "It was a dark and stormy night, and", "One day, a fox", "Deep in the forest"),
    *('"Who are you?" asked the', "Tom and his sister Lily", "My name is Anna and I", "The dragon", "The wind"),
    *("When the sun went down,", "There once was a king who", "A brave little mouse", "She opened the door and"),
    *("Long ago, before", "He had never seen", "Every morning, Grandma", "On the last day of summer"),
)


def load(name: str) -> tuple[Decoder, Tokenizer]:
    model = load_model(open_checkpoint(EMBEDDED / name), "float32", 1536)
    return model, Tokenizer.from_file(str(EMBEDDED / name / "tokenizer.json"))


@torch.no_grad()
def nats_per_token(name: str, prompts: list[str] | None) -> float:
    """Loss of the held-out stories as answers to ``prompts``; None: as raw text."""
    model, tokenizer = load(name)
    total, count = 0.0, 0
    for i, document in enumerate(HELD_OUT):
        row = tokenizer.encode(document.text + END_OF_TEXT).ids, 1
        if prompts is not None:
            prompt = tokenizer.encode(f"{START}user\n{prompts[i]}{END}\n{START}assistant\n").ids
            row = prompt + tokenizer.encode(document.text + END).ids, len(prompt)
        batch = data.join([row])
        hidden = model(model.embed(batch.ids), batch, None)
        total += loss.cross_entropy(hidden, model.embedding.weight, batch.targets).item()
        count += batch.learned
    return total / count


def results_of(name: str) -> dict[str, Any]:
    return json.loads((EMBEDDED / name / "results.json").read_text())


@torch.no_grad()
def likelihood_of(made: list[int], model: Decoder, ids: list[int]) -> float:
    """Mean log-probability of ``made`` after ``ids``."""
    batch = data.join([(ids + made, len(ids))])
    hidden = model(model.embed(batch.ids), batch, None)
    return -loss.cross_entropy(hidden, model.embedding.weight, batch.targets).item() / len(made)


def test_the_documents_are_held_out() -> None:
    assert len(HELD_OUT) == 10
    assert all(d.held_out for d in HELD_OUT)


@pytest.mark.parametrize("name", MODELS)
def test_the_card_and_results_are_of_these_weights(name: str) -> None:
    model, tokenizer = load(name)
    results = results_of(name)
    assert results["parameters"] == sum(p.numel() for p in model.parameters())
    card = (EMBEDDED / name / "MODEL_CARD.md").read_text()
    assert all(f"{figure:.4f}" in card for figure in (results["loss_per_token"], results["raw"]["bits_per_byte"]))
    assert (EMBEDDED / name / "model.safetensors").stat().st_size <= 25 * 2**20
    assert tokenizer.get_vocab_size() == model.spec.vocab_size
    # The ten documents are a sample of the 118 that the results speak of.
    assert nats_per_token(name, OWN_PROMPTS) == pytest.approx(results["loss_per_token"], abs=0.3)
    assert nats_per_token(name, None) == pytest.approx(results["raw"]["loss_per_token"], abs=0.3)


def test_the_target_reached_what_it_was_trained_for() -> None:
    """Of all held-out documents, in bits per byte: chats no worse than the model that knew nothing else, raw text close
    to them; and topics are followed."""
    results = results_of("target")
    assert results["bits_per_byte"] <= 0.8152
    assert results["raw"]["bits_per_byte"] <= 1.03 * results["bits_per_byte"]
    assert sum(results["topics"].values()) >= 50
    assert len(results["topics"]) * results["recipe"]["report"]["topic_draws"] == 60


@pytest.mark.parametrize("name", MODELS)
def test_raw_text_is_as_likely_as_answers(name: str) -> None:
    assert nats_per_token(name, None) <= 1.05 * nats_per_token(name, OWN_PROMPTS)


def test_any_opening_is_continued_fluently() -> None:
    """No stutter, and no words that the model itself finds unlikely, as in "but, there, there a little boy very"."""
    model, tokenizer = load("target")
    prompts = [tokenizer.encode(opening).ids for opening in OPENINGS]
    with LLM(str(EMBEDDED / "target"), dtype="float32", device="cpu") as llm:
        outs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=64), use_tqdm=False)
    texts = [[id for id in out.outputs[0].token_ids if id not in model.spec.eos_token_ids] for out in outs]
    assert texts[0] == generate(model, prompts[0], 64, 0.0, 1.0, torch.Generator()), "the loop apart from the engine"
    found = [(made, likelihood_of(made, model, ids)) for made, ids in zip(texts, prompts, strict=True)]
    for opening, (made, likelihood) in zip(OPENINGS, found, strict=True):
        text = f"{opening} ... {tokenizer.decode(made)}"
        assert max(len(list(same)) for _, same in groupby(made)) <= 4, text
        assert likelihood > -1.4, text
    # Answers, whose first sentences are all alike, reach -0.4, and this model before it knew raw text -1.23.
    assert sum(likelihood for _, likelihood in found) / len(found) > -1.0


def test_the_target_predicts_better_than_the_draft_and_both_better_than_chance() -> None:
    target, draft = (nats_per_token(name, OWN_PROMPTS) for name in MODELS)
    assert target < draft - 0.2
    assert draft < math.log(4096) / 2


def test_the_draft_is_a_tenth_at_most_and_shares_the_tokenizer() -> None:
    sizes = [sum(p.numel() for p in load(name)[0].parameters()) for name in MODELS]
    assert 5e6 <= sizes[0] <= 15e6
    assert sizes[1] <= sizes[0] / 10
    first, second = ((EMBEDDED / name / "tokenizer.json").read_bytes() for name in MODELS)
    assert first == second


@pytest.mark.parametrize("name", MODELS)
def test_transformers_agrees_token_for_token(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model, own = load(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED / name)
    chat = [{"role": "user", "content": "Tell a bedtime story about a dragon who is afraid of the dark."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    raw = tokenizer("Once upon a time")["input_ids"]
    assert raw == own.encode("Once upon a time").ids  # no token before it: so raw texts were trained
    for given in (ids, raw):
        got = generate(model, given, 48, 0.0, 1.0, torch.Generator())
        want = theirs.generate(torch.tensor([given]), max_new_tokens=48, do_sample=False)[0, len(given) :].tolist()
        assert got == want


def test_the_target_tells_what_was_asked() -> None:
    """A held-out story is likelier after its own prompt than after another's of its kind; a name asked for is told."""
    swapped = [OWN_PROMPTS[i ^ 1] for i in range(len(OWN_PROMPTS))]
    assert nats_per_token("target", OWN_PROMPTS) < nats_per_token("target", swapped) - 0.02
    model, tokenizer = load("target")
    for name in ("Hilda", "Otto"):
        ids = tokenizer.encode(f"{START}user\nTell me a story about a child named {name}.{END}\n{START}assistant\n").ids
        assert name in tokenizer.decode(generate(model, ids, 40, 0.0, 1.0, torch.Generator()))


def test_documents_of_a_batch_do_not_see_each_other() -> None:
    """Documents of one batch do not see each other: the loss of a batch is that of its documents."""
    model, tokenizer = load("draft")
    rows = [(tokenizer.encode(d.text[:200]).ids, 1) for d in HELD_OUT[:3]]
    batch = data.join(rows)
    with torch.no_grad():
        together = model(model.embed(batch.ids), batch, None)
        for row, (a, b) in zip(rows, pairwise(batch.starts), strict=True):
            alone = data.join([row])
            torch.testing.assert_close(together[a:b], model(model.embed(alone.ids), alone, None), rtol=1e-4, atol=1e-4)


def test_stories_tell_of_what_was_asked_for() -> None:
    """At least two in three answers name the thing; the first model that shipped named it in one of four."""
    things = ("dragon", "fox", "robot", "rabbit", "squirrel", "cat", "mouse", "bear")
    llm = LLM("embedded", threads=1)
    asked = [(thing, seed) for thing in things for seed in range(3)]
    chats = [[{"role": "user", "content": f"Tell a bedtime story about a {thing}."}] for thing, _ in asked]
    params = [SamplingParams(max_tokens=160, temperature=0.7, top_p=0.9, seed=seed) for _, seed in asked]
    answers = llm.chat(chats, params, use_tqdm=False)
    llm.close()
    told = [thing in a.outputs[0].text.lower() for (thing, _), a in zip(asked, answers, strict=True)]
    assert sum(told) >= 16
