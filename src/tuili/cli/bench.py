"""``tuili bench``: ``serve`` against any OpenAI endpoint, ``throughput`` and ``latency`` of the engine in this
process."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tuili.base import log
from tuili.base.errors import ConfigError, TuiliError
from tuili.cli.options import ENGINE_GROUPS, Settings, finite, takes_config
from tuili.cli.progress import counting, loading

app = typer.Typer(
    help="Measure: a server from outside, or the engine in this process.", no_args_is_help=True, add_completion=False
)


class Dataset(StrEnum):
    RANDOM, PRESET, MOONCAKE, AZURE = "random", "preset", "mooncake", "azure"


class Preset(StrEnum):
    CHAT, BATCH, MIXED = "chat", "batch", "mixed"


class Endpoint(StrEnum):
    COMPLETIONS, CHAT = "completions", "chat"


# The options that several commands share.
DatasetOption = Annotated[Dataset, typer.Option("--dataset", help="azure reads BurstGPT files too.")]
PresetOption = Annotated[Preset, typer.Option("--preset", help="With --dataset preset.")]
TraceOption = Annotated[
    Path | None, typer.Option("--trace", help="File of --dataset mooncake (JSONL) or azure (CSV).", show_default=False)
]
ShrinkOption = Annotated[int, typer.Option("--trace-shrink", help="Divide the trace's lengths by this.", min=1)]
SpeedOption = Annotated[float, typer.Option("--trace-speed", help="Divide the trace's arrival times by this.")]
MaxLenOption = Annotated[
    int | None,
    typer.Option("--max-len", help="Longest prompt + output of presets and traces.", show_default="512 for presets"),
]
InputOption = Annotated[str, typer.Option("--random-input-len", help="Tokens: a number, or a range like 64-256.")]
OutputOption = Annotated[str, typer.Option("--random-output-len", help="Tokens: a number, or a range like 16-64.")]
PrefixOption = Annotated[
    float,
    typer.Option("--shared-prefix", help="Share of a random prompt that all have.", min=0, max=1, callback=finite),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the workload: same seed, same requests.")]
CountOption = Annotated[int, typer.Option("--num-prompts", help="Requests per run.", min=1)]
RepeatsOption = Annotated[int, typer.Option("--repeats", help="Runs; two or more give confidence intervals.", min=1)]
SaveOption = Annotated[
    Path | None, typer.Option("--save-result", help="Write the result as JSON here.", show_default=False)
]
MonitorOption = Annotated[
    Path | None,
    typer.Option("--monitor", help="Write load, memory and faults, twice a second, as JSONL here.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, and nothing else there.")]


@dataclass(frozen=True, slots=True)
class PromptSource:
    """What the workload options said; ``make(seed)`` gives the workload."""

    dataset: Dataset
    preset: Preset
    trace: Path | None
    shrink: int
    speed: float
    max_len: int | None
    input_len: str
    output_len: str
    shared_prefix: float
    count: int
    vocab: tuple[int, int]

    def make(self, seed: int) -> Any:
        from tuili.bench import traces, workload

        if self.dataset is Dataset.RANDOM:
            spans = workload.Span.parse(self.input_len), workload.Span.parse(self.output_len)
            return workload.fixed_random(
                self.count, *spans, seed=seed, shared_prefix=self.shared_prefix, vocab=self.vocab
            )
        if self.dataset is Dataset.PRESET:
            return workload.preset(
                self.preset.value, self.count, seed=seed, max_len=self.max_len or 512, vocab=self.vocab
            )
        if self.trace is None:
            raise ConfigError(f"--dataset {self.dataset} needs the file: --trace FILE")
        return traces.from_rows(
            (traces.mooncake if self.dataset is Dataset.MOONCAKE else traces.azure)(self.trace),
            name=self.trace.stem,
            count=self.count,
            max_len=self.max_len,
            shrink=self.shrink,
            speed=self.speed,
            seed=seed,
            vocab=self.vocab,
        )


def parse_vocab(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not (is_count(low) and is_count(high) and int(low) < int(high)):
        raise ConfigError(f"the vocabulary is a range of token ids such as 300-2000, got {text!r}")
    return int(low), int(high)


@app.command("serve")
def serve(
    more_goodput: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    base_url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Name at the server.", show_default="the first it lists")] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="What to send: ids or words.")] = Endpoint.COMPLETIONS,
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.", show_default=False)] = None,
    dataset: DatasetOption = Dataset.RANDOM,
    preset: PresetOption = Preset.CHAT,
    trace: TraceOption = None,
    trace_shrink: ShrinkOption = 1,
    trace_speed: SpeedOption = 1.0,
    max_len: MaxLenOption = None,
    random_input_len: InputOption = "128",
    random_output_len: OutputOption = "64",
    shared_prefix: PrefixOption = 0.0,
    vocab: Annotated[str, typer.Option(help="Range of token ids of random prompts.")] = "300-2000",
    num_prompts: CountOption = 100,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests at a time: a closed loop.", show_default="no limit", min=1)
    ] = None,
    request_rate: Annotated[
        float, typer.Option(help="Requests per second: an open loop. inf: all at once, or as the trace says.")
    ] = math.inf,
    burstiness: Annotated[float, typer.Option(help="1 is Poisson; below 1 comes in bursts.", callback=finite)] = 1.0,
    ignore_eos: Annotated[bool, typer.Option(help="Generate all tokens that were asked for.")] = True,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="Limits in ms: --goodput ttft:200 tpot:50 e2el:3000.", show_default=False),
    ] = None,
    num_warmups: Annotated[int, typer.Option(help="Requests before the measurement.", min=0)] = 1,
    repeats: RepeatsOption = 1,
    timeout: Annotated[
        float, typer.Option(help="Seconds after which a request has failed.", min=0.001, callback=finite)
    ] = 600.0,
    seed: SeedOption = 0,
    save_result: SaveOption = None,
    save_detailed: Annotated[bool, typer.Option(help="Keep the times of every request in the result.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Load an OpenAI endpoint and report TTFT, TPOT, ITL, E2E latency, throughput and goodput."""
    log.setup(default="ERROR")
    import asyncio

    from tuili.bench import serving
    from tuili.bench.report import parse_goodput

    if more_goodput and not goodput:  # the hidden argument is for the rest of "--goodput ttft:200 tpot:50"
        raise typer.BadParameter(f"unexpected argument {more_goodput[0]!r}")
    limits = parse_goodput(word for term in [*(goodput or ()), *(more_goodput or ())] for word in term.split())
    source = PromptSource(
        dataset, preset, trace, trace_shrink, trace_speed, max_len, random_input_len, random_output_len,
        shared_prefix, num_prompts, parse_vocab(vocab),
    )  # fmt: skip
    plan = serving.Plan(
        base_url=base_url,
        model=model,
        chat=endpoint is Endpoint.CHAT,
        api_key=api_key,
        rate=request_rate,
        burstiness=burstiness,
        concurrency=max_concurrency,
        ignore_eos=ignore_eos,
        warmups=num_warmups,
        timeout=timeout,
        goodput=limits,
        detailed=save_detailed,
    )
    workloads = [source.make(seed + repeat) for repeat in range(repeats)]
    with counting("requests", sum(len(workload.items) for workload in workloads)) as tick:
        result = asyncio.run(serving.measure(plan, workloads, lambda record: tick()))
    deliver(result, save_result, json_output, serving_table)
    if not result["completed"]:
        raise TuiliError(f"all {result['failed']} requests failed: {next(iter(result['failures']))}")


@app.command("throughput")
@takes_config(*ENGINE_GROUPS, model_argument=False)
def throughput(
    settings: Settings,
    concurrency: Annotated[str, typer.Option(help="Requests that run together: an arm each.")] = "1,8,32",
    dataset: DatasetOption = Dataset.PRESET,
    preset: PresetOption = Preset.MIXED,
    trace: TraceOption = None,
    trace_shrink: ShrinkOption = 1,
    max_len: MaxLenOption = None,
    random_input_len: InputOption = "128",
    random_output_len: OutputOption = "64",
    shared_prefix: PrefixOption = 0.0,
    num_prompts: CountOption = 64,
    repeats: RepeatsOption = 3,
    seed: SeedOption = 0,
    monitor: MonitorOption = None,
    save_result: SaveOption = None,
    json_output: JsonOption = False,
) -> None:
    """Offline batches in this process; compare with --scheduling-policy static or --no-enable-prefix-caching."""
    log.setup(default="ERROR")
    from tuili.bench import arms
    from tuili.bench.monitor import recording

    source = PromptSource(
        dataset, preset, trace, trace_shrink, 1.0, max_len, random_input_len, random_output_len,
        shared_prefix, num_prompts, (0, 0),
    )  # fmt: skip
    widths = numbers(concurrency)
    with recording(monitor), counting("runs", len(widths) * (repeats + 1)) as tick:
        result = arms.throughput(
            settings.config, widths, lambda engine: _fitted(source, engine).make(seed), repeats, tick
        )
    deliver(result, save_result, json_output, throughput_table)


@app.command("latency")
@takes_config(*ENGINE_GROUPS, model_argument=False)
def latency(
    settings: Settings,
    batch_size: Annotated[str, typer.Option(help="Requests of a batch; several: 1,8.")] = "1",
    input_len: Annotated[str, typer.Option(help="Prompt tokens.")] = "32",
    output_len: Annotated[str, typer.Option(help="Generated tokens.")] = "128",
    num_iters_warmup: Annotated[int, typer.Option(help="Runs before the measurement.", min=0)] = 2,
    num_iters: Annotated[int, typer.Option(help="Measured runs.", min=1)] = 10,
    seed: SeedOption = 0,
    monitor: MonitorOption = None,
    save_result: SaveOption = None,
    json_output: JsonOption = False,
) -> None:
    """Time of one batch from start to end, and what the host costs per decode step."""
    log.setup(default="ERROR")
    from tuili.bench import arms
    from tuili.bench.monitor import recording
    from tuili.bench.workload import Span, fixed_random

    spans, sizes = (Span.parse(input_len), Span.parse(output_len)), numbers(batch_size)
    with loading() as progress:
        engine = arms.open_engine(settings.config, max(sizes), progress)
    try:
        workloads = [fixed_random(size, *spans, seed=seed, vocab=arms.vocabulary(engine)) for size in sizes]
        with recording(monitor), counting("requests", sum(sizes) * (num_iters + num_iters_warmup)) as tick:
            result = arms.latency(engine, workloads, num_iters_warmup, num_iters, tick)
    finally:
        engine.close()
    deliver(result, save_result, json_output, latency_table)


@app.command("accuracy")
@takes_config(*ENGINE_GROUPS, model_argument=False)
def accuracy(
    settings: Settings,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Plain text, or JSON lines with text and prompt.", show_default="held-out stories"),
    ] = None,
    widths: Annotated[str, typer.Option(help="Widths to compare with float32, by commas.")] = "all",
    num_documents: Annotated[int, typer.Option(help="Documents of --text to use.", min=1)] = 60,
    save_result: SaveOption = None,
    json_output: JsonOption = False,
) -> None:
    """What each width of the weights costs: perplexity and divergence from float32 on text; --model's."""
    log.setup(default="ERROR")
    from tuili.bench import accuracy

    documents, chosen = accuracy.read_documents(text, num_documents), accuracy.widths_of(widths)
    with counting("documents", len(documents) * len({"float32"} | chosen.keys())) as tick:
        result = accuracy.measure(settings.config, documents, chosen, tick)
    deliver(result, save_result, json_output, accuracy_table)
    if save_result is not None:
        save_result.with_suffix(".md").write_text(accuracy.markdown(result))


def accuracy_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    from tuili.bench.accuracy import cells

    columns = ("width", "MB", "bits", "perplexity", "x float32", "KL mean", "KL p99", "same first")
    table = Table(*columns, box=None, header_style="bold")
    for row in cells(result):
        table.add_row(*row[:6], *row[7:])
    console.print(table)


def _fitted(source: PromptSource, engine: Any) -> PromptSource:
    """The source with the engine's vocabulary and no longer than its context."""
    from tuili.bench.arms import vocabulary

    longest = min(source.max_len or 512, engine.max_model_len)
    return replace(source, vocab=vocabulary(engine), max_len=longest)


def is_count(word: str) -> bool:
    """Whether the word is a natural number that is no mistake: at most nine of the digits 0 to 9."""
    return word.isascii() and word.isdigit() and len(word) < 10


def numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(is_count(word) and int(word) for word in words):
        raise ConfigError(f"expected positive numbers such as 1,8,32, got {text!r}")
    return [int(word) for word in words]


def deliver(result: dict[str, Any], path: Path | None, as_json: bool, table: Any) -> None:
    """Show the result, then write it to ``path``: what was measured is not lost with a path that cannot be written."""
    from rich.console import Console

    console = Console(quiet=as_json)
    table(console, result)
    if as_json:
        print(json.dumps(result))
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the result to {path}: {error.strerror}; it is only shown") from error
    console.print(f"written to {path}", style="dim")


def serving_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    for key in ("completed", "failed", "duration", "total_input_tokens", "total_output_tokens"):
        console.print(f"{key.replace('_', ' '):<28}{result[key]:>12,.2f}".replace(".00", "   "))
    for key in ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"):
        if result.get(key) is not None:
            interval = result.get(f"{key}_ci95")
            about = f"   95 % CI {interval[0]:.2f} .. {interval[1]:.2f}" if interval else ""
            console.print(f"{key.replace('_', ' ') + ' (1/s)':<28}{result[key]:>12,.2f}{about}", highlight=False)
    table = Table("ms", *(name.upper() for name in _METRICS), box=None, header_style="bold")
    for statistic in ("mean", "median", "std", "p90", "p95", "p99"):
        table.add_row(statistic, *(f"{result[f'{statistic}_{metric}_ms']:.2f}" for metric in _METRICS))
    console.print(table)
    if not result["failures"]:
        return
    for message, count in list(result["failures"].items())[:5]:
        console.print(f"failed {count} x: {message}", style="red", markup=False)


_METRICS = ("ttft", "tpot", "itl", "e2el")


def throughput_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    columns = (
        "concurrent",
        "output tok/s",
        "95 % CI",
        "total tok/s",
        "requests/s",
        "TPOT ms",
        "cached",
        "host ms/step",
    )
    table = Table(*columns, box=None, header_style="bold")
    for arm in result["arms"]:
        interval = arm["output_throughput_ci95"]
        host = arm["steps"]["host_ms_per_decode_step"].get(str(arm["concurrency"]))
        table.add_row(
            str(arm["concurrency"]),
            f"{arm['output_throughput']:.1f}",
            f"{interval[0]:.0f}..{interval[1]:.0f}" if interval else "-",
            f"{arm['total_token_throughput']:.1f}",
            f"{arm['request_throughput']:.2f}",
            f"{arm['median_tpot_ms']:.2f}",
            f"{arm['cached_tokens'] / max(1, arm['total_input_tokens']):.0%}",
            f"{host['total']:.3f}" if host else "-",
        )
    console.print(table)


def latency_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(
        "batch", "mean ms", "median", "p90", "p99", "TTFT ms", "TPOT ms", "host ms/step", box=None, header_style="bold"
    )
    for arm in result["arms"]:
        host = arm["steps"]["host_ms_per_decode_step"].get(str(arm["batch_size"]))
        times = arm["latency_ms"]
        table.add_row(
            str(arm["batch_size"]),
            *(f"{times[key]:.1f}" for key in ("mean", "median", "p90", "p99")),
            f"{arm['ttft_ms']['median']:.2f}",
            f"{arm['tpot_ms']['median']:.2f}",
            f"{host['total']:.3f}" if host else "-",
        )
    console.print(table)
