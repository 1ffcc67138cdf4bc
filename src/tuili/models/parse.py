"""The parts of config.json that families share, turned into a ``ModelSpec``. No torch: the planner reads specs too."""

from __future__ import annotations

from typing import Any

from tuili.base.errors import ModelError
from tuili.layers.spec import ModelSpec, RopeSpec
from tuili.models.fields import MOST_INTEGER, Fields

FULL, SLIDING = "full_attention", "sliding_attention"


def decoder(fields: Fields, family: str, **changes: Any) -> ModelSpec:
    """The spec of a Llama-like decoder; ``changes`` are the fields in which the family differs."""
    heads = fields.integer("num_attention_heads")
    head_dim = head_size(fields)
    rope = changes.pop("rope", None) or rope_spec(fields, _one_rope(fields), head_dim)
    common: dict[str, Any] = {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "intermediate_size": fields.integer("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads(fields, heads),
        "head_dim": head_dim,
        "max_model_len": reach(fields, rope),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tied": fields.flag("tie_word_embeddings"),
        "dtype": fields.dtype(),
        "eos_token_ids": fields.token_ids("eos_token_id"),
    }
    if "activation" not in changes:
        common["activation"] = fields.activation("hidden_act")
    return ModelSpec(family=family, rope=rope, **(common | changes))


def head_size(fields: Fields) -> int:
    """``head_dim``, or hidden size over heads where the file does not give it."""
    if fields.config.get("head_dim") is not None:
        return fields.integer("head_dim")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden % heads:
        raise fields.wrong("num_attention_heads", f"a divisor of hidden_size={hidden} (or a head_dim)")
    return hidden // heads


def kv_heads(fields: Fields, heads: int) -> int:
    count = fields.integer("num_key_value_heads", heads)
    if heads % count:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads={heads}")
    return count


def windows(fields: Fields, window: int | None, default: list[str]) -> tuple[int | None, ...]:
    """One window per layer by ``layer_types`` (``default`` where absent); empty when no layer has one."""
    types = fields.strings("layer_types") or default
    layers = fields.integer("num_hidden_layers")
    if len(types) != layers or not set(types) <= {FULL, SLIDING}:
        raise fields.wrong("layer_types", f"{layers} entries, each {FULL!r} or {SLIDING!r}")
    each = tuple(window if kind == SLIDING else None for kind in types)
    return each if any(each) else ()


def upper_windows(fields: Fields) -> tuple[int | None, ...]:
    """Qwen's windows: with ``use_sliding_window``, layers from ``max_window_layers`` on have one."""
    window = fields.maybe_integer("sliding_window", 4096) if fields.flag("use_sliding_window") else None
    first = fields.integer("max_window_layers", 28, least=0)
    layers = range(fields.integer("num_hidden_layers"))
    return windows(fields, window, [SLIDING if i >= first else FULL for i in layers])


# Rotary embedding ----------------------------------------------------------------------------------------------------


def layer_rope(fields: Fields, kind: str = FULL, theta: float = 10_000.0, base: str = "rope_theta") -> dict[str, Any]:
    """The rope settings of the layers of ``kind``, whichever generation of config.json holds them.

    Since transformers 5: ``rope_parameters``, flat or per layer type. Before: ``base`` (else ``theta``) and
    ``rope_scaling``. A file with both was changed by hand: ``rope_scaling`` counts, as in transformers.
    """
    new, old, where = fields.table("rope_parameters"), _given(fields.table("rope_scaling")), "rope_parameters"
    if FULL in old or SLIDING in old:
        new, old, where = old, {}, "rope_scaling"
    loose = {"rope_theta": fields.number(base, theta)}
    if fields.config.get("partial_rotary_factor") is not None:
        loose["partial_rotary_factor"] = fields.number("partial_rotary_factor")
    if FULL in new or SLIDING in new:
        own = _given(fields.inside(where).table(kind))
        return loose | own | (old if kind == FULL else {})
    if not old:
        return loose | _given(new)
    settings = loose | old
    for key in ("rope_theta", "partial_rotary_factor"):
        if new.get(key) not in (None, settings.get(key)):
            raise ModelError(
                f"{fields.where}: {key} is {new[key]!r} in rope_parameters, and rope_scaling, which counts where both "
                "are given, says otherwise or nothing; write all of it into rope_parameters, and leave rope_scaling out"
            )
    return settings


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _one_rope(fields: Fields) -> dict[str, Any]:
    """The settings that all layers share. ModelError where the file has several, which no family but Gemma 3 takes."""
    settings = layer_rope(fields)
    if SLIDING in fields.table("rope_parameters") and layer_rope(fields, SLIDING) != settings:
        raise fields.wrong("rope_parameters", "the same for all layers")
    return settings


def rope_spec(
    fields: Fields, settings: dict[str, Any], head_dim: int, aliases: tuple[tuple[str, str], ...] = ()
) -> RopeSpec:
    """``settings`` (as of ``layer_rope``) checked and completed; ``aliases`` are old names of kinds."""
    rope = Fields(settings, f"{fields.where}: rope")
    named = "rope_type" if settings.get("rope_type") else "type"
    kind = dict((("su", "longrope"), *aliases)).get(rope.text(named, "default"), rope.text(named, "default"))
    dim = int(head_dim * rope.number("partial_rotary_factor", 1.0))
    if dim % 2 or not 0 < dim <= head_dim:
        raise rope.wrong("partial_rotary_factor", f"one that rotates an even number of head_dim={head_dim} dimensions")
    longest = fields.integer("max_position_embeddings", 2048)
    original = longest
    if kind in ("llama3", "yarn", "longrope"):
        original = fields.integer(
            "original_max_position_embeddings", rope.integer("original_max_position_embeddings", longest)
        )
    scaling = _scaling(rope, kind, dim, longest / original)
    theta = rope.number("rope_theta")
    if theta < 1 or (kind == "yarn" and theta == 1):
        raise rope.wrong("rope_theta", "more than 1")
    if kind == "longrope" and original == 1:
        raise ModelError(f"{rope.where}: original_max_position_embeddings=1 is not supported with {kind}")
    return RopeSpec(dim, theta, kind, tuple(scaling.items()), original)


def _scaling(rope: Fields, kind: str, dim: int, stretch: float) -> dict[str, Any]:
    """The numbers that ``kind`` needs, checked. ``stretch`` stands in for a factor that the file leaves out."""
    if kind == "default":
        return {}
    if kind in ("linear", "dynamic"):
        if kind == "dynamic" and dim < 4:
            raise rope.wrong("partial_rotary_factor", "one that rotates at least 4 dimensions with dynamic")
        return {"factor": rope.number("factor")}
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.wrong("high_freq_factor", f"more than low_freq_factor={low}")
        return {"factor": rope.number("factor"), "low_freq_factor": low, "high_freq_factor": high}
    amplitude = rope.maybe("attention_factor")
    found: dict[str, Any] = {"factor": rope.number("factor", stretch)}
    found |= {} if amplitude is None else {"attention_factor": amplitude}
    if kind == "longrope":
        return found | {key: rope.numbers(key, dim // 2) for key in ("short_factor", "long_factor")}
    if kind == "yarn":
        found |= {key: rope.number(key) for key in ("mscale", "mscale_all_dim") if rope.config.get(key)}
        found |= {"beta_fast": rope.number("beta_fast", 32.0), "beta_slow": rope.number("beta_slow", 1.0)}
        return found | {"truncate": rope.flag("truncate", True)}
    key = "rope_type" if rope.config.get("rope_type") else "type"
    raise rope.wrong(key, "default, linear, dynamic, llama3, yarn or longrope")


def reach(fields: Fields, rope: RopeSpec) -> int:
    """The longest sequence, in tokens, that the checkpoint claims to handle.

    Linear and dynamic scaling stretch ``max_position_embeddings`` by their factor, yarn the original length; llama3 and
    longrope checkpoints already write the stretched length.
    """
    longest = fields.integer("max_position_embeddings", 2048)
    factor = dict(rope.scaling).get("factor", 1.0)
    assert isinstance(factor, float)
    if rope.kind in ("linear", "dynamic"):
        longest = int(longest * factor)
    if rope.kind == "yarn":
        longest = max(longest, int(rope.original_len * factor))
    return min(longest, MOST_INTEGER)
