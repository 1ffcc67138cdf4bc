"""``tuili train``: make a model from a recipe; measure and export what a run made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tuili.train.run import TrainingRun

app = typer.Typer(help="Train models from recipes.", no_args_is_help=True, add_completion=False)

RecipeFile = Annotated[Path, typer.Argument(help="TOML recipe, such as recipes/target.toml", metavar="RECIPE")]
Data = Annotated[Path | None, typer.Option(help="corpus archive; instead of the recipe's data.path")]
Out = Annotated[Path | None, typer.Option(help="folder of the run [default: runs/NAME]")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]


@app.command()
def pretrain(
    recipe: RecipeFile,
    data: Data = None,
    out: Out = None,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's checkpoint")] = False,
) -> None:
    """Train a model from scratch; the model directory is written to OUT/model."""
    from tuili.train.pretrain import complete

    run = open_run(recipe, data, out, device, resume)
    typer.echo(json.dumps(complete(run), indent=2))


@app.command()
def evaluate(recipe: RecipeFile, data: Data = None, out: Out = None, device: Device = "auto") -> None:
    """Measure the run's last checkpoint on all held-out documents; prints JSON."""
    from tuili.train.results import measure

    typer.echo(json.dumps(measure(open_run(recipe, data, out, device, True)), indent=2))


@app.command()
def export(
    recipe: RecipeFile,
    to: Annotated[Path, typer.Argument(help="model directory to write")],
    data: Data = None,
    out: Out = None,
) -> None:
    """Write the run's last checkpoint as a Hugging Face model directory, with its results and model card."""
    from tuili.train.pretrain import export_model
    from tuili.train.results import measure

    run = open_run(recipe, data, out, "cpu", True)
    export_model(run, to, measure(run))
    typer.echo(f"wrote {to}")


def open_run(recipe: Path, data: Path | None, out: Path | None, device: str, resume: bool) -> TrainingRun:
    from tuili.train import recipe as recipes
    from tuili.train.run import open_run as open_at

    loaded = recipes.load(recipe)
    return open_at(loaded, data or Path(loaded.data.path), out or Path("runs") / loaded.name, device, resume)
