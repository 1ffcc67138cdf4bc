"""What a run tells: a progress bar on a terminal, else a line now and then; all of it in metrics.jsonl."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tuili.train.checkpoint import Progress
from tuili.train.loop import StepReport


class Reporter:
    """Writes to ``out``/metrics.jsonl and to stderr; a line ``every`` seconds where stderr is no terminal."""

    def __init__(self, out: Path, every: float):
        self.metrics = (out / "metrics.jsonl").open("a", buffering=1)
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.percentage:>4.1f} %"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = None
        if self.console.is_terminal:
            self.bar = Bar(*columns, TextColumn("{task.description}"), console=self.console)
            self.task = self.bar.add_task("starting", total=1.0)
        self.every = 1.0 if self.bar else every
        #: When the last line was shown, and the run's tokens then.
        self.shown: tuple[float, int] | None = None

    def __enter__(self) -> Reporter:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
        self.metrics.close()

    def step(self, progress: Progress, report: StepReport, lr: float, done: float) -> None:
        """Tell of a step; ``done`` is the share of the run that is over."""
        seconds = round(progress.seconds, 2)
        at = {"step": progress.step, "tokens": progress.tokens, "seconds": seconds}
        self._write(**at, loss=report.loss, norm=report.norm, lr=lr)
        now = time.monotonic()
        if self.shown is None:
            self.shown = (now, progress.tokens)
            return
        then, tokens = self.shown
        if now - then < self.every:
            return
        self.shown = (now, progress.tokens)
        rate = f"{(progress.tokens - tokens) / (now - then):,.0f} tokens/s"
        text = f"step {progress.step}  loss {report.loss:.3f}  lr {lr:.2e}  norm {report.norm:.2f}  {rate}"
        if self.bar:
            self.bar.update(self.task, completed=min(done, 1.0), description=text)
        else:
            left = progress.seconds * (1 - done) / done / 60
            self.say(f"{done:6.1%}  {text}  {progress.tokens / 1e6:.1f} M tokens  {left:.0f} min left")

    def evaluation(self, progress: Progress, loss: float, raw: float) -> None:
        """Tell of the held-out losses of answers and of raw text in nats per token."""
        self._write(step=progress.step, tokens=progress.tokens, held_out_loss=loss, held_out_raw_loss=raw)
        self.say(f"step {progress.step}: held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}; raw {raw:.4f}")

    def say(self, text: str) -> None:
        if self.bar:
            self.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _write(self, **values: float) -> None:
        self.metrics.write(json.dumps(values) + "\n")
