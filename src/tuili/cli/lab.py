"""The rest of ``tuili bench``: the machine's limits, the roofline of the kernels, and the monitor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tuili.base import limits, log
from tuili.base.errors import ConfigError
from tuili.cli.bench import JsonOption, SaveOption, app, deliver, is_count, numbers
from tuili.cli.options import ENGINE_GROUPS, Settings, finite, takes_config
from tuili.cli.progress import counting


@app.command("machine")
def machine(
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads.", show_default="1, 2, 4 ... all cores")
    ] = None,
    seconds: Annotated[float, typer.Option(help="For each figure.", min=0.001, callback=finite)] = 0.2,
    largest_mib: Annotated[int, typer.Option(help="Largest working set; several times the caches.", min=1)] = 256,
    save_result: Annotated[
        Path, typer.Option("--save-result", help="Where plan and doctor look for this machine's limits.")
    ] = limits.PATH,
    json_output: JsonOption = False,
) -> None:
    """Measure this machine: read bandwidth by threads and working set, write and copy, peak rates by kind."""
    log.setup(default="ERROR")
    from tuili.bench import machine as probe

    counts = numbers(threads) if threads else probe.thread_counts()
    sizes = probe.working_sets(largest_mib << 20)
    with counting("figures", probe.steps(counts, sizes)) as tick:
        result = probe.measure(counts, sizes, seconds, tick)
    deliver(result, save_result, json_output, machine_table)


@app.command("compile")
@takes_config(*ENGINE_GROUPS, model_argument=False)
def compile_(
    settings: Settings,
    input_len: Annotated[int, typer.Option(help="Prompt tokens, computed in one step.", min=2)] = 256,
    output_len: Annotated[int, typer.Option(help="Generated tokens of a request.", min=1)] = 128,
    repeats: Annotated[int, typer.Option(help="Measured steps of each kind, each way.", min=1)] = 20,
    save_result: SaveOption = None,
    json_output: JsonOption = False,
) -> None:
    """What --compile costs at the start, what it brings per step, and after how many requests it pays."""
    log.setup(default="ERROR")
    from tuili.bench.compile import compile_gain

    with counting("rounds", repeats + 1) as tick:
        result = compile_gain(settings.config, input_len, output_len, repeats, tick)
    deliver(result, save_result, json_output, compile_table)


def compile_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("step", "tokens", "default ms", "eager ms", "compiled ms", "x default", box=None, header_style="bold")
    for step in result["steps"]:
        times = (f"{step[f'{way}_ms']:.3f}" for way in ("default", "eager", "compiled"))
        table.add_row(step["kind"], str(step["tokens"]), *times, f"{step['default_ms'] / step['compiled_ms']:.2f}")
    console.print(table)
    start, request, paid = result["startup"], result["request"], result["break_even"]
    console.print(
        f"start-up {start['empty_cache_s']:.1f} s, with torch's cache filled {start['filled_cache_s']:.1f} s",
        highlight=False,
    )
    about = f"a request of {request['prompt']} + {request['output']} tokens"
    if paid["requests"] is None:
        console.print(f"--compile does not pay here: {about} takes {-paid['request_gain_ms']:.1f} ms more")
        return
    tokens = "" if paid["decode_tokens"] is None else f", or {paid['decode_tokens']:,.0f} decoded tokens"
    gain = f"{about} gains {paid['request_gain_ms']:.1f} ms"
    console.print(f"{gain}: --compile pays after {paid['requests']:,.0f} of them{tokens}", highlight=False)


@app.command("allocation")
def allocation(
    preset: Annotated[str, typer.Option(help="Workload: chat, batch or mixed.")] = "mixed",
    requests: Annotated[int, typer.Option(help="Requests, all there at the start.", min=1)] = 64,
    max_model_len: Annotated[int, typer.Option(help="Longest prompt + output.", min=48)] = 512,
    positions: Annotated[int, typer.Option(help="Positions of the KV cache.", min=1)] = 8192,
    block_size: Annotated[int, typer.Option(help="Positions per block.", min=1)] = 16,
    slack: Annotated[
        float, typer.Option(help="Tokens that requests ask for over those they need.", callback=finite)
    ] = 4.0,
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 0,
    save_result: SaveOption = None,
    json_output: JsonOption = False,
) -> None:
    """How much of the KV cache is wasted by slots, by blocks that are reserved, and by blocks given out as requests
    grow; simulated."""
    log.setup(default="ERROR")
    from tuili.bench import workload
    from tuili.bench.allocation import compare

    work = workload.preset(preset, requests, seed=seed, max_len=max_model_len)
    deliver(compare(work, positions, max_model_len, block_size, slack), save_result, json_output, allocation_table)


def allocation_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(
        *("KV cache", "requests at once", "waste", "steps", "preemptions", "tokens computed twice"),
        box=None,
        header_style="bold",
        title="simulated",
    )
    for arm in result["arms"]:
        counts = (f"{arm[name]:,}" for name in ("num_steps", "preemptions", "recomputed_tokens"))
        table.add_row(arm["arm"], f"{arm['running']:.1f}", f"{arm['waste']:.1%}", *counts)
    console.print(table)


@app.command("monitor", context_settings={"ignore_unknown_options": True})
def monitor(
    command: Annotated[list[str], typer.Argument(help="What to run, behind --", metavar="-- COMMAND ...")],
    output: Annotated[Path, typer.Option(help="JSON lines go here.")] = Path("monitor.jsonl"),
    interval: Annotated[float, typer.Option(help="Seconds between samples.", min=0.01, callback=finite)] = 0.5,
) -> None:
    """Run a command and record the load of every core and the command's CPU time, memory and page faults. Ends with the
    command's exit code."""
    log.setup(default="ERROR")
    import subprocess
    import sys

    from tuili.bench.monitor import recording, totals

    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise ConfigError(f"cannot run {command[0]!r}: {error.strerror}") from error
    with recording(output, interval, process.pid):
        code = process.wait()
    seen = totals(output)
    print(
        f"{seen['seconds']:.2f} s, CPU {seen['cpu_seconds']:.2f} s, load of the cores {seen['load']:.0%}, peak memory "
        f"{seen['peak_rss'] / 2**20:.1f} MiB, page faults {seen['minor_faults']} minor, {seen['major_faults']} major; "
        f"every {interval:g} s in {output}",
        file=sys.stderr,
    )
    raise typer.Exit(code if code >= 0 else 128 - code)


def machine_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    origin = result["provenance"]["machine"]
    console.print(f"{origin['cpu']}, {origin['cores']} cores, load average {origin['load_average']}", highlight=False)
    counts = sorted({entry["threads"] for entry in result["reads"]})
    table = Table("GB/s", *(f"{n} threads" if n > 1 else "1 thread" for n in counts), box=None, header_style="bold")
    for size in sorted({entry["bytes"] for entry in result["reads"]}):
        row = {entry["threads"]: entry for entry in result["reads"] if entry["bytes"] == size}
        cells = (f"{row[n]['per_second'] / 1e9:.1f} {row[n]['level']}" for n in counts)
        table.add_row(f"read {size / 2**20:g} MiB ({row[counts[0]]['how']})", *cells)
    for name, key in (("write", "writes"), ("copy, read + written", "copies")):
        rates = {entry["threads"]: entry["per_second"] for entry in result[key]}
        table.add_row(f"{name} (torch)", *(f"{rates[n] / 1e9:.1f} memory" for n in counts))
    console.print(table)
    table = Table("G operations/s", *(str(n) for n in counts), box=None, header_style="bold")
    for kind, how in dict.fromkeys((entry["kind"], entry["how"]) for entry in result["peaks"]):
        found = {e["threads"]: e["per_second"] for e in result["peaks"] if (e["kind"], e["how"]) == (kind, how)}
        table.add_row(f"{kind} ({how})", *(f"{found[n] / 1e9:,.0f}" for n in counts))
    console.print(table)


@app.command("kernels")
def kernels(
    size: Annotated[str, typer.Option(help="INPUTSxOUTPUTS of the matrix.")] = "2048x8192",
    rows: Annotated[str, typer.Option(help="Rows to multiply.")] = "1,2,4,8,16,32,64,128,256,512,1024,2048",
    threads: Annotated[int | None, typer.Option(help="Threads.", show_default="all cores", min=1)] = None,
    seconds: Annotated[float, typer.Option(help="For each figure.", min=0.001, callback=finite)] = 0.2,
    cold_mib: Annotated[
        int, typer.Option(help="Memory that copies of the matrix fill; beyond the caches.", min=1)
    ] = 256,
    plot: Annotated[Path | None, typer.Option(help="Draw the roofline as PNG here.", show_default=False)] = None,
    save_result: SaveOption = None,
    json_output: JsonOption = False,
) -> None:
    """One matrix times 1 to 2,048 rows in every weight format, under the machine's roofline: bandwidth binds decoding,
    products bind prefill."""
    log.setup(default="ERROR")
    from tuili.bench import roofline

    inputs, _, outputs = size.partition("x")
    if not (is_count(inputs) and is_count(outputs) and int(inputs) and int(outputs)):
        raise ConfigError(f"--size is written like 2048x8192 (inputs x outputs), got {size!r}")
    counts = numbers(rows)
    with counting("products", len(counts) * len(roofline.ARMS)) as tick:
        result = roofline.sweep(
            int(inputs), int(outputs), counts, threads=threads, seconds=seconds, cold_bytes=cold_mib << 20, tick=tick
        )
    if plot is not None and not roofline.plot(result, plot):
        raise ConfigError("--plot needs matplotlib: pip install 'tuili[bench]'")
    deliver(result, save_result, json_output, roofline_table)


def roofline_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    peaks = ", ".join(f"{kind} {rate / 1e9:,.0f}" for kind, rate in result["peaks"].items())
    console.print(
        f"{result['inputs']} x {result['outputs']}, {result['threads']} threads; limits probed in this run: "
        f"{result['bandwidth'] / 1e9:.1f} GB/s, G operations/s: {peaks}",
        highlight=False,
    )
    columns = ("weights", "rows", "us", "op/byte", "GB/s", "G op/s", "roof", "share", "bound by")
    table = Table(*columns, box=None, header_style="bold")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for p in result["points"]:
        rates = (p["bytes_per_second"] / 1e9, p["per_second"] / 1e9, p["roof"] / 1e9)
        figures = (f"{1e6 * p['seconds']:,.0f}", f"{p['intensity']:.1f}", *(f"{rate:,.1f}" for rate in rates))
        table.add_row(p["arm"], str(p["rows"]), *figures, f"{p['share']:.0%}", p["bound"])
    console.print(table)
    explain_shares(console, [p["share"] for p in result["points"]])


def explain_shares(console: Any, shares: list[float]) -> None:
    """More than all of a limit is no speed: the limit was probed too low."""
    if max(shares) > 1:
        console.print(
            "Shares over 100 %: others used the machine while its limits were probed, more than while this was "
            "measured. Measure again when it is idle, with a larger --seconds or more --repeats."
        )


@app.command("decode")
def decode(
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id.", show_default="155 M random parameters, made here")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    quantization: Annotated[str, typer.Option(help="none, int8 or int4.")] = "none",
    concurrency: Annotated[str, typer.Option(help="Requests at a time: an arm each.")] = "1,8",
    prompt: Annotated[int, typer.Option(help="Prompt tokens.", min=1)] = 32,
    output: Annotated[int, typer.Option(help="Generated tokens.", min=2)] = 64,
    repeats: Annotated[int, typer.Option(help="Measured runs of each arm.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads.", show_default="all cores", min=1)] = None,
    save_result: SaveOption = None,
    json_output: JsonOption = False,
) -> None:
    """Decode speed of the engine beside what bytes per step and the bandwidth, probed between the runs, predict."""
    log.setup(default="ERROR")
    import tempfile

    from tuili.base.config import Config
    from tuili.bench.checkpoint import SCALED, write_random

    widths = numbers(concurrency)
    with tempfile.TemporaryDirectory() as folder:
        name = model or str(write_random(Path(folder), SCALED))
        config = Config(
            model=name, dtype=dtype, quantization=quantization, threads=threads, max_model_len=prompt + output
        )
        with counting("runs", len(widths) * (repeats + 1)) as tick:
            result = _decode(config, widths, prompt, output, repeats, tick)
    deliver(result | {"model": model or "random, 155 M"}, save_result, json_output, decode_table)


def _decode(config: Any, widths: list[int], prompt: int, output: int, repeats: int, tick: Any) -> dict[str, Any]:
    from tuili.bench import arms, decode
    from tuili.bench.provenance import provenance
    from tuili.plan.model import open_spec
    from tuili.plan.roofline import decode_step, peak_kind
    from tuili.quant.scheme import scheme_of

    spec, found = open_spec(config.model), []
    engine = arms.open_engine(config, max(widths))
    kept = engine.config.activation_dtype, scheme_of(config.quantization, dtype=engine.config.dtype)
    try:
        for count in widths:
            step = decode_step(spec, kept, [prompt + output // 2] * count)
            seen = decode.decode_speed(engine, count, prompt, output, repeats, step.bytes, peak_kind(kept), tick)
            predicted = step.rate(seen["bandwidth"], seen["peak"])
            figures = {
                "step_bytes": step.bytes,
                "operations": step.operations,
                "predicted": predicted,
                "ratio": seen["tokens_per_second"] / predicted,
            }
            found.append(seen | figures)
    finally:
        engine.close()
    return {"benchmark": "decode", "arms": found, "provenance": provenance(config=engine.config)}


def decode_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    columns = ("at once", "MB per step", "GB/s probed", "tok/s predicted", "tok/s measured", "measured / predicted")
    table = Table(*columns, box=None, header_style="bold", title=result["model"], title_justify="left")
    for arm in result["arms"]:
        figures = (arm["step_bytes"] / 1e6, arm["bandwidth"] / 1e9, arm["predicted"], arm["tokens_per_second"])
        table.add_row(str(arm["concurrency"]), *(f"{figure:.1f}" for figure in figures), f"{arm['ratio']:.2f}")
    console.print(table)
    explain_shares(console, [arm["ratio"] for arm in result["arms"]])
