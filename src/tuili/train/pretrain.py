"""``tuili train pretrain``: a recipe to a model directory, by way of tokenizer, training, evaluation and export."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuili.train import card, export
from tuili.train.report import Reporter
from tuili.train.results import machine, measure
from tuili.train.run import TrainingRun, prepared


def train(run: TrainingRun, reporter: Reporter) -> None:
    """Train to the end of the recipe, saving and evaluating at its intervals. Ctrl-C saves after the step and stops."""
    every = run.recipe.report
    began = time.monotonic() - run.progress.seconds
    saved = evaluated = run.progress.seconds
    with prepared(run.device), interruptible() as interrupted:
        while run.done < 1 and not interrupted.is_set():
            report, lr = run.step()
            run.progress.seconds = now = time.monotonic() - began
            reporter.step(run.progress, report, lr, run.done)
            if now - evaluated >= every.eval_every:
                limit = every.eval_documents
                reporter.evaluation(run.progress, run.evaluate(False, limit), run.evaluate(True, limit))
                evaluated = now
            if now - saved >= every.checkpoint_every:
                run.save()
                saved = now
        run.save()
    if run.done < 1:
        reporter.say(f"stopped at step {run.progress.step}; the checkpoint in {run.out} goes on with --resume")
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, where signals can be caught (in the main thread)."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def export_model(run: TrainingRun, folder: Path, results: dict[str, Any]) -> None:
    """The model directory of the run, with ``results.json`` and the model card made from it."""
    export.model_directory(folder, run.recipe, run.master, run.tokenizer)
    export.write(folder / "results.json", results)
    (folder / "MODEL_CARD.md").write_text(card.write(results))


def complete(run: TrainingRun) -> dict[str, Any]:
    """Train to the end, measure, and write the model directory ``model`` in the run's folder; returns the results."""
    with Reporter(run.out, run.recipe.report.line_every) as reporter:
        reporter.say(
            f"{run.recipe.name}: {sum(w.numel() for w in run.master.values()):,} parameters, "
            f"{len(run.stories.documents):,} documents, on {machine(run.device, len(run.team.replicas))}"
        )
        train(run, reporter)
        results = measure(run)
        reporter.evaluation(run.progress, results["loss_per_token"], results["raw"]["loss_per_token"])
    export_model(run, run.out / "model", results)
    return results
