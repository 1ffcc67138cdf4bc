"""An int8 KV cache costs next to nothing on a model that was trained (a random one's logits are too flat to tell)."""

from __future__ import annotations

from tuili.base.config import Config
from tuili.bench.accuracy import JudgedText, measure

STORY = (
    "Once upon a time there was a small fox who lived at the edge of a green forest. One day the fox found a shiny key "
    "under a stone. She wanted to know which door it could open, so she asked the owl, and the owl said: look for the "
    "oldest tree. The fox walked all day. When the sun went down she saw a little door between the roots, and the key "
    "turned in it without a sound."
)


def test_it_costs_less_than_a_thousandth_of_a_nat() -> None:
    """Bfloat16 weights and activations cost about as much (KL about 1e-4); half a step of 127 is 8 bits, as theirs."""
    documents = [JudgedText(STORY), JudgedText("The fox opened the door.", "Tell me how the story of the fox ends.")]
    widths = {"int8 KV": {"dtype": "float32", "kv_cache_dtype": "int8"}}
    whole, rounded = measure(Config(model="embedded", max_model_len=256), documents, widths)["arms"]
    assert rounded["kv_cache_dtype"] == "int8"
    assert 0 < rounded["kl_mean"] < 1e-3
    assert abs(rounded["perplexity_ratio"] - 1) < 0.01
    assert whole["kl_mean"] == 0
