"""``ModelSpec``: what the shared parts need to know to build a decoder. Plain data, no torch: planners read it too."""

from __future__ import annotations

from dataclasses import dataclass, field

from tuili.base.errors import ConfigError
from tuili.quant.scheme import Scheme


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: ``dim`` rotated dimensions, base ``theta``, and the scaling of config.json's ``rope_scaling``.

    ``kind`` is one of default, linear, dynamic, llama3, yarn, longrope; ``scaling`` holds that kind's numbers as named
    in config.json; ``original_len`` is the length that the model was first trained for, in tokens.
    """

    dim: int
    theta: float = 10_000.0
    kind: str = "default"
    scaling: tuple[tuple[str, object], ...] = ()
    original_len: int = 0


@dataclass(frozen=True)
class Rounded:
    """Matrices that the checkpoint holds rounded: ``method`` did it, ``schemes`` are what they are, by module."""

    method: str
    schemes: tuple[tuple[str, Scheme], ...]


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and choices of a decoder. Lengths in tokens; ``windows``: one entry per layer (None: full attention)."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    rope: RopeSpec
    norm_eps: float = 1e-6
    activation: str = "silu"
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    #: Gemma 2 and 3 also normalize what attention and the MLP return, before the residual add.
    post_norms: bool = False
    embed_scale: float | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    #: Rope of the layers with a window, where it differs from the others' (Gemma 3).
    window_rope: RopeSpec | None = None
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = field(default=())
    #: None: all matrices are floats.
    rounded: Rounded | None = None

    @property
    def scale(self) -> float:
        return self.attention_scale if self.attention_scale is not None else self.head_dim**-0.5

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def scheme_of(self, module: str, scheme: Scheme | None) -> Scheme | None:
        """How the matrix ``module`` is stored in a model that is stored by ``scheme``: one that the checkpoint holds
        rounded as it is."""
        own = dict(self.rounded.schemes).get(module) if self.rounded else None
        return own or (scheme and scheme.of(module))


def refuse_rounding_twice(quantization: str, spec: ModelSpec) -> None:
    """ConfigError where ``quantization`` (of the option, or a scheme's format) would round what is rounded."""
    if spec.rounded and quantization not in ("none", "dense"):
        raise ConfigError(
            f"--quantization {quantization}, but the checkpoint is quantized already ({spec.rounded.method}), and its "
            "codes are used as they are: leave --quantization out, or give the checkpoint that it was made from"
        )
