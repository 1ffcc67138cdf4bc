"""``tuili plan``: what fits and how fast it will be, from config.json alone; computed, nothing is loaded or run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuili.base import limits, log
from tuili.base.errors import ConfigError
from tuili.cli.bench import deliver, numbers
from tuili.cli.options import finite

if TYPE_CHECKING:
    from tuili.plan.memory import MemoryPlan

app = typer.Typer(
    help="Compute what fits and how fast it will be, before anything runs.", no_args_is_help=True, add_completion=False
)

ModelArgument = Annotated[str, typer.Argument(help="Directory, config.json, hub id (only that file), or 'embedded'.")]
WidthOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Weights, one or several: float32, bfloat16, float16, or what --quantization takes.",
        show_default="some of them; of a quantized checkpoint, as it is",
    ),
]
KVOption = Annotated[
    str, typer.Option("--kv-cache-dtype", help="auto (what this machine keeps), float32, bfloat16, float16, int8, fp8.")
]
GroupOption = Annotated[int, typer.Option("--group", help="Inputs that share a scale in int4.")]
SymmetricOption = Annotated[bool, typer.Option("--symmetric/--zero-points", help="int4 without or with zero points.")]
JsonOption = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, and nothing else there.")]


@app.command("memory")
def memory(
    model: ModelArgument,
    dtype: WidthOption = None,
    kv_cache_dtype: KVOption = "auto",
    context: Annotated[
        int | None, typer.Option(help="Tokens per request.", show_default="the model's longest", min=1)
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 1,
    block_size: Annotated[int, typer.Option(help="Positions per KV block.", min=1)] = 16,
    group: GroupOption = 32,
    symmetric: SymmetricOption = True,
    json_output: JsonOption = False,
) -> None:
    """Bytes of weights, KV cache and activations, and whether they fit what is free here: on the card, if there is
    one."""
    log.setup(default="ERROR")
    from tuili.base.hardware import probe
    from tuili.plan.memory import plan_memory, ways_to_keep
    from tuili.plan.model import open_spec

    spec, here = open_spec(model), probe()
    plans = [
        plan_memory(
            spec,
            name,
            kept,
            here,
            kv_dtype=kv_cache_dtype,
            context=context,
            concurrency=concurrency,
            block_size=block_size,
        )
        for name, kept in ways_to_keep(spec, dtype, "float32,bfloat16,int8,int4", group, symmetric).items()
    ]
    if json_output:
        head = {"kind": "computed", "model": model, "family": spec.family}
        print(json.dumps(head | {"plans": [_plain(p) for p in plans]}))
    else:
        _memory_table(model, plans, bool(spec.windows))


def _plain(plan: MemoryPlan) -> dict[str, Any]:
    derived = {"total": plan.total, "fits": plan.fits, "max_concurrency": plan.max_concurrency}
    return dataclasses.asdict(plan) | derived


def _memory_table(model: str, plans: list[MemoryPlan], windows: bool) -> None:
    """A column per width; sizes in MiB."""
    from rich.console import Console
    from rich.table import Table

    first = plans[0]
    title = f"{model}: {first.parameters / 1e6:,.1f} M parameters, {first.concurrency} x {first.context} tokens (MiB)"
    table = Table("", *(p.width for p in plans), box=None, header_style="bold", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, *values: int) -> None:
        table.add_row(name, *(f"{value / 2**20:,.1f}" for value in values))

    row("weights", *(p.weights for p in plans))
    row("activations", *(p.activations for p in plans))
    if first.cuda:
        row("captured steps", *(p.graphs for p in plans))
        row("CUDA context", *(p.cuda for p in plans))
    table.add_row("KV dtype", *(p.kv_dtype for p in plans))
    table.add_row("KV per token (KiB)", *(f"{p.kv_token / 1024:,.2f}" for p in plans))
    row("KV of a request", *(p.kv_request for p in plans))
    if windows:
        row("  within its windows", *(p.kv_window for p in plans))
    row("KV cache", *(p.kv for p in plans))
    row("total", *(p.total for p in plans))
    row("free here", *(p.available for p in plans))
    table.add_row("fits", *("yes" if p.fits else "no" for p in plans))
    table.add_row("most requests", *(f"{p.max_concurrency:,}" for p in plans))
    Console().print(table)


@app.command("decode")
def decode(
    model: ModelArgument,
    dtype: WidthOption = None,
    kv_cache_dtype: KVOption = "auto",
    context: Annotated[int, typer.Option(help="Tokens of each request so far.", min=1)] = 512,
    concurrency: Annotated[str, typer.Option(help="Requests at a time.")] = "1,8,32",
    bandwidth: Annotated[
        float | None,
        typer.Option(help="Bytes read, GB/s.", show_default="as measured", min=0.001, callback=finite),
    ] = None,
    peak: Annotated[
        float | None,
        typer.Option(
            help="10^9 operations/s.",
            show_default="as measured, of the kind of the weights",
            min=0.001,
            callback=finite,
        ),
    ] = None,
    machine: Annotated[
        Path | None,
        typer.Option(
            help="Measured limits, of this machine or another.",
            show_default=f"{limits.PATH}; else they are measured now, for a second",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of the measured limits.", show_default="the most", min=1)] = None,
    group: GroupOption = 32,
    symmetric: SymmetricOption = True,
    json_output: JsonOption = False,
) -> None:
    """Predicted decode tokens per second: bandwidth over the bytes that a step reads, or peak over its products."""
    log.setup(default="ERROR")
    from tuili.plan.memory import ways_to_keep
    from tuili.plan.model import open_spec
    from tuili.plan.roofline import decode_step, peak_kind

    spec, found = open_spec(model), []
    measured = _limits(machine, threads) if bandwidth is None or peak is None else None
    for name, kept in ways_to_keep(spec, dtype, "bfloat16,int8,int4", group, symmetric).items():
        for count in numbers(concurrency):
            step = decode_step(spec, kept, [context] * count, kv_cache_dtype)
            speed = 1e9 * bandwidth if bandwidth else _measured(measured).bandwidth(step.bytes)
            top = 1e9 * peak if peak else _measured(measured).peak(peak_kind(kept))
            arm = {"width": name, "concurrency": count, "context": context, "bandwidth": speed, "peak": top}
            bound = limits.bound(step.operations / step.bytes, speed, top)
            figures = {"bound": bound, "tokens_per_second": step.rate(speed, top)}
            found.append(arm | {"weights": step.weights, "kv": step.kv, "operations": step.operations} | figures)
    origin = {"limits": dataclasses.asdict(measured)} if measured else {}
    result = {"kind": "predicted", "model": model, "family": spec.family, "arms": found, **origin}
    deliver(result, None, json_output, _decode_table)


def _limits(machine: Path | None, threads: int | None) -> limits.Limits:
    """Those kept in ``machine``; where none is named those of this machine, kept or measured now."""
    from tuili.base.hardware import probe

    if machine is not None:
        return limits.load(machine, threads)
    if limits.PATH.exists() and (kept := limits.load(None, threads)).cpu == probe().cpu:
        return kept
    try:
        from tuili.bench.machine import limits as measure

        return measure(threads)
    except ImportError as error:
        raise ConfigError(
            f"no measured limits in {limits.PATH}, and without torch ({error}) none are measured: give --bandwidth and "
            "--peak, or a file of `tuili bench machine` as --machine"
        ) from error


def _measured(found: limits.Limits | None) -> limits.Limits:
    assert found is not None
    return found


def _decode_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    columns = ("weights", "at once", "weights MB", "KV MB", "GB/s", "bound by", "tok/s predicted")
    table = Table(*columns, box=None, header_style="bold", title=result["model"], title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for arm in result["arms"]:
        sizes = (f"{arm[key] / 1e6:,.1f}" for key in ("weights", "kv"))
        rate = f"{arm['tokens_per_second']:,.1f}"
        table.add_row(
            arm["width"], str(arm["concurrency"]), *sizes, f"{arm['bandwidth'] / 1e9:.1f}", arm["bound"], rate
        )
    console.print(table)
    if (origin := result.get("limits")) is not None:
        about = f"limits of {origin['cpu']}, {origin['threads']} threads, measured {origin['date']}"
        console.print(f"{about}; `tuili bench machine` measures for longer, and keeps them", highlight=False)
