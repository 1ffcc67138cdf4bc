"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections on disk, longrope, partly rotated heads. arXiv:2404.14219."""

from __future__ import annotations

from typing import Any

from tuili.layers.spec import ModelSpec
from tuili.models import Family, families
from tuili.models.fields import Fields
from tuili.models.names import ENDS, FUSED, PRE_NORMS
from tuili.models.parse import SLIDING, decoder, head_size, layer_rope, rope_spec, windows

#: Early files call longrope "su" or, wrongly, "yarn".
ALIASES = (("yarn", "longrope"),)


@families.register("Phi3ForCausalLM")
class Phi3(Family):
    names = ENDS | FUSED | PRE_NORMS

    @staticmethod
    def parse(config: dict[str, Any]) -> ModelSpec:
        fields = Fields(config, defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5})
        kinds = [SLIDING] * fields.integer("num_hidden_layers")
        return decoder(
            fields,
            "Phi3ForCausalLM",
            rope=rope_spec(fields, layer_rope(fields), head_size(fields), ALIASES),
            windows=windows(fields, fields.maybe_integer("sliding_window"), kinds),
        )
