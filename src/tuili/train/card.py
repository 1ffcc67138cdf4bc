"""MODEL_CARD.md of a trained model. Every number comes from the results that the trainer measured."""

from __future__ import annotations

from collections import Counter
from typing import Any

CORPUS = """## Corpus

Stories from the synthetic collection `training_data/` of <https://github.com/erikhyrkas/snakes> (commit
`d235dd496dcd99b8898cf14e45aec15720ac58e4`, MIT licence): {training_documents:,} documents, of the categories

{categories}

An epoch has {training_tokens_per_epoch:,} tokens of answers. The texts were written by language models; the names of
some files say `llama-*`, so that Meta's Llama licence may ask for attribution of models trained on them.

Headings, bold marks and title lines are removed and quotes made plain. The prompts are worded anew in each epoch from
the title, from the characters, and from nouns that matter in the story (`tuili.train.prompts`); a few chats have a
system message.{recast}{raw_share} One document in a hundred, chosen by a hash of its text, is held out and was never
trained on.
"""

LIMITS = """## Limits

A small model that tells short English stories, made to test and demonstrate an inference engine. It knows no facts,
follows no other instruction, loses the thread of long stories, and repeats the clichés of its corpus. It was not
trained on conversations of several turns, and nothing was done for safety. It is no base for anything that a person
relies on.
"""


def write(results: dict[str, Any]) -> str:
    """The card's text in Markdown."""
    listed = results["recipe"]["data"]["categories"]
    categories = "\n".join(f"- `{c}`" + f", {n} times in each epoch" * (n > 1) for c, n in Counter(listed).items())
    lines = [
        f"# {results['name']}",
        "",
        "Trained from scratch by `tuili train pretrain`; the same numbers are in `results.json`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts(results).items()),
        "",
        CORPUS.format(**results, categories=categories, recast=recast(results), raw_share=raw(results)),
        "## Samples",
        "",
        "Temperature 0.7, top-p 0.9, one draw each, not chosen.",
        "",
        *(quoted(prompt, text) for prompt, text in results["samples"].items()),
        *continuations(results),
        *topics(results),
        LIMITS,
    ]
    return "\n".join(lines)


def recast(r: dict[str, Any]) -> str:
    share = r["recipe"]["data"].get("recast", 0)
    if not share:
        return ""
    return (
        f" {share:.0%} of the stories told in chats had their hero, or a place or thing in them, replaced by another\n"
        "one that the prompt names (`tuili.train.recast`)."
    )


def raw(r: dict[str, Any]) -> str:
    share = r["recipe"]["data"].get("raw", 0)
    if not share:
        return ""
    return (
        f" {share:.0%} of the documents were trained as raw text, from their beginning or from within,\n"
        "without a token before it."
    )


def continuations(r: dict[str, Any]) -> list[str]:
    """The section that shows raw text continued."""
    if not r["openings"]:
        return []
    shown = (f"> **{opening}**{text.removeprefix(opening)}" for opening, text in r["openings"].items())
    lines = (line for text in shown for line in (*text.replace("\n", "\n> ").replace("> \n", ">\n").splitlines(), ""))
    return ["## Raw text continued", "", "Drawn as the samples above.", "", *lines]


def topics(r: dict[str, Any]) -> list[str]:
    """The section that says how often answers name what was asked for."""
    if not r.get("topics"):
        return []
    report = r["recipe"]["report"]
    draws = report["topic_draws"]
    hits, asked = sum(r["topics"].values()), draws * len(r["topics"])
    return [
        "## Topics",
        "",
        f'Of {asked} answers of {report["topic_tokens"]} tokens to "Tell a bedtime story about ...", {hits} name',
        f"what was asked for ({draws} draws for each topic, temperature 0.7, top-p 0.9).",
        "",
        "| asked for | named |",
        "|---|---|",
        *(f"| {topic.replace('*', '**')} | {count} of {draws} |" for topic, count in r["topics"].items()),
        "",
    ]


def quoted(prompt: str, text: str) -> str:
    return f"**{prompt}**\n\n" + "".join(f"> {line}".rstrip() + "\n" for line in text.splitlines())


def stage(r: dict[str, Any]) -> str:
    """An earlier stage in one line."""
    train = r["recipe"]["train"]
    return (
        f"{r['tokens']:,} tokens in {r['step']:,} steps, {r['seconds'] / 60:.0f} minutes, {train['optimizer']}, "
        f"peak rate {train['lr']:g}; held-out loss {r['loss_per_token']:.4f}. The rows below are of the last stage"
    )


def facts(r: dict[str, Any]) -> dict[str, str]:
    """The rows of the card's table."""
    model, train = r["recipe"]["model"], r["recipe"]["train"]
    shape = f"{model['num_layers']} layers, hidden {model['hidden_size']}"
    heads = f"{model['num_heads']} heads of {model['head_dim']}, {model['num_kv_heads']} KV heads"
    epochs = r["tokens"] / r["training_tokens_per_epoch"]
    return {
        "Parameters": f"{r['parameters']:,}",
        "Architecture": f"LlamaForCausalLM, {shape}, {heads}, tied, bf16",
        "Vocabulary": f"{r['recipe']['tokenizer']['vocab_size']:,}, byte-level BPE, ChatML",
        "Context": f"{r['recipe']['data']['max_len']:,} tokens",
        **{f"Stage {i}": stage(s) for i, s in enumerate(r["earlier"], 1)},
        "Tokens seen": f"{r['tokens']:,} in {r['step']:,} steps, {epochs:.2f} epochs",
        "Optimizer": f"{train['optimizer']}, peak rate {train['lr']:g}, decay over the last {train['decay']:.0%}",
        "Time": f"{r['seconds'] / 60:.0f} minutes; the machine did other work too",
        "Machine": r["machine"],
        "Held out": f"{r['held_out_documents']} documents, {r['held_out_tokens']:,} tokens",
        "Held-out loss": f"{r['loss_per_token']:.4f} nats per token",
        "Held-out perplexity": f"{r['perplexity_per_token']:.2f} per token, {r['perplexity_per_byte']:.4f} per byte",
        "Bits per byte": f"{r['bits_per_byte']:.4f}; as raw text {r['raw']['bits_per_byte']:.4f}",
    }
