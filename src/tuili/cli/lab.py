"""The rest of ``tuili bench``: the machine's limits, the roofline of the kernels, and the monitor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tuili.base import limits, log
from tuili.base.errors import ConfigError
from tuili.cli.bench import JsonOption, app, deliver, numbers
from tuili.cli.progress import counting


@app.command("machine")
def machine(
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads.", show_default="1, 2, 4 ... all cores")
    ] = None,
    seconds: Annotated[float, typer.Option(help="For each figure.", min=0.001)] = 0.2,
    save_result: Annotated[
        Path, typer.Option("--save-result", help="Where plan and doctor look for this machine's limits.")
    ] = limits.PATH,
    json_output: JsonOption = False,
) -> None:
    """Measure this machine: read bandwidth by threads and working set, write and copy, peak rates by kind."""
    log.setup(default="ERROR")
    from tuili.bench import machine as probe

    counts = numbers(threads) if threads else probe.thread_counts()
    with counting("figures", probe.steps(counts)) as tick:
        result = probe.measure(counts, seconds=seconds, tick=tick)
    deliver(result, save_result, json_output, machine_table)


@app.command("monitor", context_settings={"ignore_unknown_options": True})
def monitor(
    command: Annotated[list[str], typer.Argument(help="What to run, behind --", metavar="-- COMMAND ...")],
    output: Annotated[Path, typer.Option(help="JSON lines go here.")] = Path("monitor.jsonl"),
    interval: Annotated[float, typer.Option(help="Seconds between samples.", min=0.01)] = 0.5,
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
