"""The engine on the embedded model: what continuous batching and prefix reuse bring, and what the host costs (`make
bench`).

Arms: 1, 8, 32 concurrent requests x continuous or static batching x prefix reuse on or off, on a mixed-length and on a
shared-prefix workload. The arms of a workload take turns, run by run, and every arm gives the median of its repeats.
Writes ``engine.json`` (all raw summaries), ``engine.md`` and, where matplotlib is installed, ``engine.png`` to
``benchmarks/results/<date>-<cpu>-<instruction set>/``. Sizes are options; ``--smoke`` runs all of it in seconds to see
that it works.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuili.base import log
from tuili.base.config import Config
from tuili.bench.arms import Arm, compare, vocabulary
from tuili.bench.provenance import provenance, results_folder
from tuili.bench.workload import Span, Workload, fixed_random, preset
from tuili.cli.progress import counting

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine

RESULTS = Path(__file__).parent / "results"
POLICIES = {"continuous": "fcfs", "static": "static"}


def main() -> None:
    options = arguments()
    log.setup(default="ERROR")
    arms = [
        Arm(
            {"batching": batching, "prefix_reuse": reuse},
            Config(model=options.model, scheduling_policy=policy, enable_prefix_caching=reuse, threads=options.threads),
            width,
        )
        for width in options.concurrency
        for batching, policy in POLICIES.items()
        for reuse in (True, False)
    ]
    report: dict[str, Any] = {"benchmark": "engine", "provenance": provenance(), "workloads": {}}
    for name in ("mixed", "shared-prefix"):
        with counting(f"{name}: runs", len(arms) * (options.repeats + 1)) as tick:
            results, work = compare(arms, partial(workload, name, options), options.repeats, tick)
        report["workloads"][name] = {"workload": work.describe(), "arms": results}
    folder = options.out or results_folder(RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "engine.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "engine.md").write_text(markdown(report))
    plot(report, folder / "engine.png")
    print(markdown(report))
    print(f"written to {folder}", file=sys.stderr)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--threads", type=int, help="CPU threads of the model; default: the cores")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64, help="per run")
    parser.add_argument(
        "--max-len", type=int, default=512, help="longest prompt + output of the mixed workload, tokens"
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    options = parser.parse_args()
    if options.smoke:
        options.concurrency, options.repeats, options.requests, options.max_len = [1, 4], 1, 6, 96
    return options


def workload(name: str, options: argparse.Namespace, engine: TextEngine) -> Workload:
    """``mixed``: chats and documents of all lengths. ``shared-prefix``: one long common prompt, short questions,
    answers of very different lengths."""
    longest, vocab = min(options.max_len, engine.max_model_len), vocabulary(engine)
    if name == "mixed":
        return preset("mixed", options.requests, max_len=longest, vocab=vocab)
    prompt, answer = Span(longest // 2, longest // 2), Span(max(1, longest // 64), longest // 8)
    return fixed_random(options.requests, prompt, answer, shared_prefix=0.9, vocab=vocab)


def markdown(report: dict[str, Any]) -> str:
    origin = report["provenance"]
    machine = origin["machine"]
    commit = origin["commit"] or {"id": "unknown", "dirty": False}
    lines = [
        "# Engine benchmark",
        "",
        f"Measured {origin['date']} on {machine['cpu']} ({machine['cores']} cores), load average at the start "
        f"{machine['load_average']}, torch {origin['versions']['torch']}, commit `{commit['id'][:12]}`"
        f"{' with local changes' if commit['dirty'] else ''}. Medians; raw values in `engine.json`.",
    ]
    for name, entry in report["workloads"].items():
        work = entry["workload"]
        lines += ["", f"## {name}", ""]
        lines.append(
            f"{work['requests']} requests, {work['input_tokens']} + {work['output_tokens']} tokens (prompt + output)."
        )
        lines += [
            "",
            "| at once | batching | prefix reuse | output tok/s | 95 % CI | x static | cached | host ms/step |",
        ]
        lines += ["|---:|---|---|---:|---:|---:|---:|---:|"]
        lines += [_row(arm, entry["arms"]) for arm in entry["arms"]]
    return "\n".join(lines) + "\n"


def _row(arm: dict[str, Any], arms: list[dict[str, Any]]) -> str:
    width, reuse = arm["concurrency"], arm["prefix_reuse"]
    static = next(a for a in arms if (a["batching"], a["prefix_reuse"], a["concurrency"]) == ("static", reuse, width))
    host = arm["steps"]["host_ms_per_decode_step"].get(str(width))
    interval = arm["output_throughput_ci95"]
    cells = (
        width,
        arm["batching"],
        "on" if reuse else "off",
        f"{arm['output_throughput']:.1f}",
        f"{interval[0]:.1f} .. {interval[1]:.1f}" if interval else "-",
        f"{arm['output_throughput'] / static['output_throughput']:.2f}",
        f"{arm['cached_tokens'] / arm['total_input_tokens']:.0%}",
        f"{host['total']:.3f}" if host else "-",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of output throughput per arm; skipped with a word where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'tuili[bench]')", file=sys.stderr)
        return
    names = list(report["workloads"])
    figure, axes = pyplot.subplots(1, len(names), figsize=(6 * len(names), 4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        arms = report["workloads"][name]["arms"]
        widths = sorted({arm["concurrency"] for arm in arms})
        kinds = list(dict.fromkeys((arm["batching"], arm["prefix_reuse"]) for arm in arms))
        for offset, kind in enumerate(kinds):
            chosen = [arm for arm in arms if (arm["batching"], arm["prefix_reuse"]) == kind]
            heights = [arm["output_throughput"] for arm in chosen]
            intervals = [arm["output_throughput_ci95"] or (0.0, 0.0) for arm in chosen]
            errors = [(high - low) / 2 for low, high in intervals]
            places = [widths.index(arm["concurrency"]) + 0.2 * offset for arm in chosen]
            label = f"{kind[0]}, prefix reuse {'on' if kind[1] else 'off'}"
            axis.bar(places, heights, 0.2, yerr=errors, label=label)
        axis.set_xticks([index + 0.3 for index in range(len(widths))], [str(width) for width in widths])
        axis.set(title=name, xlabel="requests at once", ylabel="output tokens/s (measured, 95 % CI)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
