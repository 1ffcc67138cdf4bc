"""Every option of Tuili: type, default, unit, one sentence. CLI, TOML files and the reference page come from this.

Order: defaults < TOML file < command line. ``None`` is "auto"; ``engine.resolve`` turns every auto into a value, once.
Names that vLLM users know are vLLM's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuili.base.errors import ConfigError, nearest


def option(
    default: Any,
    help: str,
    *,
    group: str,
    unit: str = "",
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    metadata = {
        "help": help,
        "group": group,
        "unit": unit,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options, flat. Raises ConfigError for a value of the wrong type or out of range."""

    model: str = option(
        "embedded", "Directory, hub id, or 'embedded' for the model that ships with Tuili.", group="model"
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub id.", group="model")
    served_model_name: str | None = option(None, "Name that clients use; default: the model as given.", group="model")
    dtype: str = option(
        "auto",
        "What weights are stored in: those of 16 bits stay so; auto: the checkpoint's.",
        group="model",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    activation_dtype: str = option(
        "auto",
        "What is computed in; auto: the weights' type where the machine multiplies it fast, else float32, to which "
        "weights of 16 bits are widened while they are multiplied.",
        group="model",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    max_model_len: int | None = option(
        None, "Longest prompt + output; default: the model's.", group="model", unit="tokens", minimum=2
    )
    seed: int = option(0, "Seed of the engine; requests without a seed derive theirs from it.", group="model")
    generation_config: str = option(
        "auto",
        "Defaults of sampling: 'auto' reads the model's generation_config.json, 'vllm' is neutral, else a directory.",
        group="model",
    )
    override_generation_config: str | None = option(
        None, "JSON object that overrides keys of the generation config.", group="model"
    )
    chat_template: str | None = option(None, "File with, or text of, a Jinja chat template.", group="model")
    device: str = option("auto", "Where the model runs.", group="model", choices=("auto", "cpu", "cuda"))
    kernels: str = option(
        "auto",
        "What computes: the device's kernels where they run (C++ on a CPU, Triton on CUDA), torch's reference ops (to "
        "hunt bugs), or triton, which on a CPU is interpreted (to test; needs TRITON_INTERPRET=1).",
        group="model",
        choices=("auto", "reference", "triton"),
    )
    deterministic: bool = option(
        False,
        "Kernels whose results do not depend on the batch, bit for bit: on CUDA slower ones, on a CPU all are so.",
        group="model",
    )
    enforce_eager: bool = option(
        False, "Never replay captured decode steps: every op is called anew (to compare, to hunt bugs).", group="model"
    )
    max_cudagraph_capture_size: int | None = option(
        None,
        "Most rows of a captured decode step on CUDA; default: --max-num-seqs, up to 512.",
        group="model",
        unit="requests",
        minimum=1,
    )
    compile: bool = option(
        False,
        "Let torch.compile fuse what lies between attention and quantized products; `tuili bench compile` says when it "
        "pays.",
        group="model",
    )
    quantization: str = option(
        "none",
        "Round the weights while they load, and activations too unless weights only; none: as the checkpoint has them.",
        group="model",
        choices=("none", "int8", "int8_weight_only", "int4", "int4_weight_only", "fp8", "fp8_weight_only"),
    )
    quantization_group_size: int | None = option(
        None, "Inputs that share a scale of int4 weights: 32, 64 or 128; default: 32.", group="model", minimum=1
    )
    threads: int | None = option(None, "CPU threads of the model; default: the cores.", group="model", minimum=1)

    block_size: int = option(16, "Positions per KV block.", group="cache", unit="tokens", minimum=1, maximum=1024)
    kv_cache_dtype: str = option(
        "auto",
        "Type of the KV cache; auto: the activations', or bfloat16 beside such weights; int8, fp8 (E4M3): half of "
        "bfloat16's memory, a scale per token and head.",
        group="cache",
        choices=("auto", "float32", "bfloat16", "float16", "int8", "fp8"),
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "Memory of the KV cache; default: what the rows can need, within the memory share.",
        group="cache",
        unit="bytes",
        minimum=1,
    )
    gpu_memory_utilization: float = option(
        0.9,
        "Share of the card's memory that all of Tuili may take; on a CPU, of the free RAM.",
        group="cache",
        minimum=0.01,
        maximum=1.0,
    )
    num_gpu_blocks_override: int | None = option(None, "Exact number of KV blocks.", group="cache", minimum=1)
    kv_cache_allocation: str = option(
        "dynamic",
        "When a request gets its KV blocks: dynamic, as it grows; reserved, at its admission all that prompt + "
        "max_tokens may take: never preempted, fewer at once.",
        group="cache",
        choices=("dynamic", "reserved"),
    )
    enable_prefix_caching: bool = option(True, "Reuse the KV of equal prompt prefixes.", group="cache")

    scheduling_policy: str = option(
        "fcfs",
        "Who is admitted first: fcfs, priority, or static (no continuous batching, to compare).",
        group="scheduler",
    )
    max_num_batched_tokens: int | None = option(
        None, "Token budget of a step.", group="scheduler", unit="tokens", minimum=1
    )
    max_num_seqs: int | None = option(None, "Most requests in a step.", group="scheduler", unit="requests", minimum=1)
    enable_chunked_prefill: bool = option(
        True, "Split long prompts over steps so that they do not stall the others.", group="scheduler"
    )
    max_num_queued_reqs: int | None = option(
        None,
        "Requests that may wait beyond the max_num_seqs that run; more are refused (HTTP 503).",
        group="scheduler",
        minimum=1,
    )

    host: str = option("127.0.0.1", "Address to listen on.", group="server")
    port: int = option(8000, "Port to listen on.", group="server", minimum=0, maximum=65535)
    max_logprobs: int = option(20, "Most top logprobs that a request may ask for.", group="server", minimum=-1)
    max_body_bytes: int = option(8 << 20, "Largest request body.", group="server", unit="bytes", minimum=1024)
    h11_max_incomplete_event_size: int = option(
        65536, "Largest head of a request, whatever parses it.", group="server", unit="bytes", minimum=1024
    )
    h11_max_header_count: int = option(
        256, "Most headers of a request, whatever parses it.", group="server", minimum=8, maximum=10_000
    )
    limit_concurrency: int = option(
        2048,
        "Most connections at once; at the limit the longest idle one makes room, else new ones get HTTP 503.",
        group="server",
        unit="connections",
        minimum=1,
    )
    timeout_keep_alive: float = option(
        120.0,
        "Time for which a connection may be idle between two requests; longer than what clients and proxies keep.",
        group="server",
        unit="s",
        minimum=0.1,
        maximum=86_400,
    )
    timeout_header: float = option(
        30.0, "Time in which a request's head must have arrived.", group="server", unit="s", minimum=0.1, maximum=86_400
    )
    timeout_body: float = option(
        60.0, "Time in which a request's body must have arrived.", group="server", unit="s", minimum=0.1, maximum=86_400
    )
    timeout_write: float = option(
        60.0,
        "Time after which a client that takes nothing of its answer is dropped, and its request aborted.",
        group="server",
        unit="s",
        minimum=0.1,
        maximum=86_400,
    )
    allowed_origins: str = option(
        "*", "Origins whose pages may use the API (CORS): *, one, or a JSON list; '' allows none.", group="server"
    )
    allow_credentials: bool = option(
        False, "Let pages of allowed origins send cookies and authorization along (CORS).", group="server"
    )
    shutdown_seconds: float = option(
        20.0, "Time that running requests get to end after SIGTERM.", group="server", unit="s", minimum=0
    )
    trust_request_chat_template: bool = option(
        False, "Let requests bring their own chat_template: it runs in the server.", group="server"
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check(item, getattr(self, item.name))

    def with_(self, **changes: Any) -> Config:
        return dataclasses.replace(self, **changes)


def options(group: str | None = None) -> Iterator[dataclasses.Field[Any]]:
    """The fields of Config, of one group if given, in the order of the file."""
    return (item for item in dataclasses.fields(Config) if group in (None, item.metadata["group"]))


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Config)


def option_type(name: str) -> tuple[type, bool]:
    """The plain type of an option, and whether None (auto) is allowed."""
    hint = _hints()[name]
    if isinstance(hint, types.UnionType):
        inner = [t for t in typing.get_args(hint) if t is not type(None)]
        return inner[0], True
    return hint, False


def _check(item: dataclasses.Field[Any], value: Any) -> None:
    kind, optional = option_type(item.name)
    if value is None and optional:
        return
    flag = "--" + item.name.replace("_", "-")
    right = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not right:
        raise ConfigError(f"{flag} must be of type {kind.__name__}, got {value!r}")
    _check_storable(flag, value)
    meta = item.metadata
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(f"{flag} cannot be {value!r}.{nearest(value, meta['choices'])}")
    if meta["minimum"] is not None and value < meta["minimum"]:
        raise ConfigError(f"{flag} must be at least {meta['minimum']:g}, got {value}")
    if meta["maximum"] is not None and value > meta["maximum"]:
        raise ConfigError(f"{flag} must be at most {meta['maximum']:g}, got {value}")


def _check_storable(flag: str, value: Any) -> None:
    """Refuse what no file or answer can carry, or no arithmetic: nan, 10**400, half a surrogate pair."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{flag} must be a finite number, got {value}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{flag} must fit into 64 bits, got {value.bit_length()}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{flag} is not UTF-8: {value!r}") from error


def load(path: str | Path | None, overrides: Mapping[str, Any]) -> Config:
    """Config from a TOML file (flat, or one table per group) and overrides; None in overrides means "not given"."""
    values: dict[str, Any] = {}
    if path is not None:
        values.update(read_file(Path(path)))
    values.update({key: value for key, value in overrides.items() if value is not None})
    known = {item.name for item in options()}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown option {key!r}.{nearest(key, known)}")
    return Config(**values)


def read_file(path: Path) -> dict[str, Any]:
    """The options that a TOML file sets, flat; ConfigError when it cannot be read."""
    groups = {item.metadata["group"] for item in options()}
    flat: dict[str, Any] = {}
    for key, value in read_toml(path).items():
        inner = value if key in groups and isinstance(value, dict) else {key: value}
        for name, setting in inner.items():
            name = name.replace("-", "_")
            if name in flat:
                raise ConfigError(f"{path} sets {name} twice; leave one")
            flat[name] = setting
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """The document in a TOML file; ConfigError when it cannot be read."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def dump(config: Config) -> str:
    """The config as TOML, a table per group, readable by ``load``; options that are None are left out."""
    lines: list[str] = []
    for group in dict.fromkeys(item.metadata["group"] for item in options()):
        lines.append(f"[{group}]")
        for item in options(group):
            value = getattr(config, item.name)
            if value is not None:
                lines.append(f"{item.name} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's; of the characters that TOML wants escaped, JSON leaves one.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
