"""Which configs run on a ``Device``, and how many rows their captured decode steps have. No torch."""

from __future__ import annotations

from tuili.base.config import Config
from tuili.base.errors import ConfigError

#: Most rows of a captured decode step, unless --max-cudagraph-capture-size says otherwise.
CAPTURED_ROWS = 512


def on_device(config: Config) -> bool:
    """Whether a resolved config runs on a ``Device``: on CUDA, and on a CPU where that path is tested."""
    return config.device == "cuda" or config.kernels == "triton"


def captures(config: Config) -> bool:
    """Whether decode steps are captured in some sizes, and padded to them."""
    return on_device(config) and config.kernels != "reference" and not config.enforce_eager


def with_captures(config: Config) -> Config:
    """``config``, whose device and step sizes are resolved, with the rows of its largest captured step; None where
    nothing is padded to captured sizes. ConfigError for a size that would have no effect."""
    largest = config.max_cudagraph_capture_size
    if captures(config):
        return config.with_(max_cudagraph_capture_size=largest or min(config.max_num_seqs or 0, CAPTURED_ROWS))
    if largest is not None:
        reference = "the reference ops are not captured" if config.kernels == "reference" else ""
        why = "--enforce-eager captures nothing" if config.enforce_eager else reference or "a CPU captures any number"
        raise ConfigError(f"--max-cudagraph-capture-size {largest} has no effect: {why}; leave it out")
    return config


def capture_sizes(config: Config) -> tuple[int, ...]:
    """Rows of the captured steps of a resolved config, as vLLM chooses them: 1, 2, 4, every 8th up to 256, every 16th
    above; and the most rows that there are, so that every step up to them is captured."""
    most = min(config.max_cudagraph_capture_size or 0, config.max_num_seqs or 0)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)]
    return tuple(size for size in sizes if size < most) + ((most,) if most else ())
