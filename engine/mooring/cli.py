"""The ``mooring`` command: one thin function per subcommand.

Everything heavy is imported inside the functions, so that ``mooring --help`` answers at once. Results go
to stdout; progress and errors go to stderr. Exit codes: 0 done, 2 something the user can put right,
130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from typer.core import TyperGroup

from mooring.errors import MooringError

if TYPE_CHECKING:
    from mooring.config.schema import RunConfig
    from mooring.train.results import RunPlan, RunResult

INTERRUPTED = 130
USER_ERROR = 2


class _Commands(TyperGroup):
    """Turns what a user can put right into one panel, and Ctrl-C into exit code 130."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:  # allowed anywhere, as in `mooring train ... --debug`
            args = ["--debug", *(argument for argument in args if argument != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail("interrupted", "stopped before anything was finished")
            raise typer.Exit(INTERRUPTED) from None
        except MooringError as err:
            problem, message = type(err).__name__.removesuffix("Error"), str(err)
            if ctx.params.get("debug"):
                raise
        except Exception as err:
            problem, message = "System", _system_problem(err) or ""
            if not message or ctx.params.get("debug"):
                raise
        _fail(f"{_words(problem)} error", message)
        raise typer.Exit(USER_ERROR)


def _words(name: str) -> str:
    spaced = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()
    return spaced.capitalize()


def _system_problem(err: Exception) -> str | None:
    """What to do about an error of the machine, or None where it is a fault of this program."""
    if isinstance(err, OSError):
        advice = {
            errno.ENOSPC: "the disk is full: free some space, or choose another folder with out=",
            errno.EDQUOT: "the disk quota is used up: free some space, or choose another folder with out=",
            errno.EACCES: "no permission: choose a folder you may write, with out=",
            errno.EROFS: "the file system is read-only: choose another folder with out=",
        }.get(err.errno or 0)
        return f"{err.filename or err}: {advice}" if advice else None
    torch = sys.modules.get("torch")  # an error of torch can only come where torch is imported
    if torch is not None and isinstance(err, torch.OutOfMemoryError):
        return (
            "the device has too little memory for this run: lower train.batch_size, and raise "
            "train.accumulate by the same factor to keep the step the same"
        )
    return None


def _stdout() -> Console:
    return Console(highlight=False)


def _fail(title: str, message: str) -> None:
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:  # logs and pipes: whole lines, no frame, nothing wrapped
        console.print(f"{title}: {escape(message)}", soft_wrap=True)
        return
    console.print(Panel(escape(message), title=title, title_align="left", border_style="red", expand=False))


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune pretrained vision models without losing what they already know.",
    epilog="Start with:  [bold]mooring train data=DIR[/]   where DIR holds one folder of images per class.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from mooring import __version__

        typer.echo(f"mooring {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MOORING_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def scan(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Image folder (class/image or train|val|test/class/image), CSV, TSV or Parquet list.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the manifest goes. [default: scans/NAME]")
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(help="Share of train held out where the data has no validation split.")
    ] = 0.15,
    seed: Annotated[int, typer.Option(help="Of the validation split.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads. [default: all cores]")] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column of a list with paths or image bytes.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of a list with the class.")] = None,
    split_column: Annotated[
        str | None, typer.Option(help="Column of a list with train, val or test.")
    ] = None,
) -> None:
    """Read and check every image once; write a manifest and a quarantine list."""
    from mooring.data.scan import scan as scan_images
    from mooring.report.progress import counting
    from mooring.report.run_folder import data_name
    from mooring.report.scan_summary import scan_summary

    with counting(f"scanning {source.name or source}", "images") as progress:
        report = scan_images(
            source,
            out=out or Path("scans") / data_name(source),
            val_fraction=val_fraction,
            seed=seed,
            workers=workers or os.cpu_count() or 1,
            progress=progress,
            image_column=image_column,
            label_column=label_column,
            split_column=split_column,
        )
    console = _stdout()
    for part in scan_summary(report):
        console.print(part)


@app.command(epilog="Settings are listed by:  [bold]mooring info --keys[/]")
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE | KEY=VALUE",
            help="A recipe (TOML file or shipped name) and settings, as in data=photos method=dr_tune.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings and the step count; train nothing.")
    ] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Continue the run in this folder; same as resume=RUN.")
    ] = None,
) -> None:
    """Fine-tune a model on a folder of labelled images."""
    from mooring.config.load import load_config

    recipe, overrides = _recipe_and_overrides(arguments or [])
    config = load_config(recipe, [*overrides, *([f"resume={resume}"] if resume is not None else [])])

    from mooring.report.progress import counting
    from mooring.train.engine import Engine

    # a first use of a data path decodes every image: that can take minutes, and must not look like a hang
    with counting("reading the data", "images", config.report.progress) as progress:
        engine = Engine.build(config, scan_progress=progress)
    if dry_run:
        try:
            _print_plan(config, engine.plan())
        finally:
            engine.close()
        return
    try:
        result = engine.fit()
    except KeyboardInterrupt:  # a second Ctrl-C, while the first was being dealt with
        _fail(
            "interrupted",
            f"stopped at once; the last saved state is in {config.out or 'the newest folder of runs/'}",
        )
        raise typer.Exit(INTERRUPTED) from None
    _print_result(config, result)
    if result.interrupted:
        _fail(
            "interrupted",
            f"what was finished is in {result.run}; continue with  mooring train --resume {result.run}",
        )
        raise typer.Exit(INTERRUPTED)


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    data: Annotated[
        Path | None, typer.Option(help="Other images to evaluate on. [default: the run's own]")
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
) -> None:
    """Measure a finished run on a split of its data, or on other data with the same classes."""
    from mooring.report.run_folder import existing_run
    from mooring.report.table import Row, results_table

    if split not in ("train", "val", "test"):
        raise MooringError(f"--split: expected train, val or test, got {split}")
    existing_run(run)
    from mooring.train.inference import load_run

    result = load_run(run).evaluate(data, split)
    values = result.scalars()
    title = f"{run}: {result.n} images of {data or 'its data'}, {split}"
    _stdout().print(results_table([Row(run.name, values)], list(values), title=escape(title), first="run"))


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE_OR_FOLDER...", help="What to classify.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show per image.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Write to this .csv or .jsonl file instead of the screen.")
    ] = None,
) -> None:
    """Classify images with a finished run."""
    from mooring.report.predictions import check_predictions_path, predictions_csv, write_predictions
    from mooring.report.run_folder import existing_run

    if out is not None:
        check_predictions_path(out)
    existing_run(run)
    files = _image_files(images)
    from mooring.train.inference import load_run

    ranked = [classes[:top] for classes in load_run(run).predict_files(files)]
    console = _stdout()
    if out is not None:
        write_predictions(out, files, ranked)
        console.print(f"{len(files)} predictions in {escape(str(out))}")
    elif console.is_terminal:
        table = Table("image", *(["class", ""] * min(top, len(ranked[0]))), header_style="bold")
        for file, classes in zip(files, ranked, strict=True):
            cells = [cell for name, share in classes for cell in (escape(name), f"{100 * share:.1f} %")]
            table.add_row(escape(str(file)), *cells)
        console.print(table)
    else:
        typer.echo(predictions_csv(files, ranked), nl=False)


@app.command()
def info(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder to summarise.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every setting instead.")] = False,
) -> None:
    """Show what this installation can do, or what a run did."""
    from mooring.report import summary

    if keys:
        parts = summary.settings_tables()
    elif run is not None:
        parts = summary.run_summary(run)
    else:
        parts = summary.installation_summary()
    console = _stdout()
    for part in parts:
        console.print(part)


def _image_files(named: list[Path]) -> list[Path]:
    """The files named, and those under the folders named, in the order of their paths."""
    from mooring.data.discover import IMAGE_SUFFIXES
    from mooring.errors import DataError

    files: list[Path] = []
    for path in named:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(IMAGE_SUFFIXES))
            if not found:
                raise DataError(
                    f"{path}: expected images ({', '.join(IMAGE_SUFFIXES)}), got a folder without any"
                )
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: expected an image or a folder, got nothing")
    return files


def _recipe_and_overrides(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Splits the words after ``mooring train``; a recipe is what has no ``=``, wherever it stands."""
    from mooring.errors import ConfigError

    recipes = [word for word in arguments if "=" not in word or Path(word).is_file()]
    if len(recipes) > 1:
        raise ConfigError(
            f"expected one recipe and key=value settings, got {len(recipes)} words without '=': "
            + " ".join(recipes)
        )
    return (recipes[0] if recipes else None), [word for word in arguments if word not in recipes]


def _print_plan(config: RunConfig, plan: RunPlan) -> None:
    """The resolved settings as TOML with the plan in its comments, so that the output is itself a recipe."""
    from mooring.config.load import to_toml

    typer.echo(to_toml(config))
    typer.echo(
        f"# {plan.train_images} train, {plan.val_images} validation and {plan.test_images} test images; "
        f"{plan.classes} classes\n"
        f"# {plan.total_steps} steps: {config.train.epochs} epochs of {plan.steps_per_epoch}\n"
        f"# {plan.method} on {plan.model}: {plan.parameters:,} parameters, {plan.feature_dim} features\n"
        f"# device {plan.device}, images from the {plan.source} source"
    )


def _print_result(config: RunConfig, result: RunResult) -> None:
    from mooring.report.metrics import duration
    from mooring.report.table import Row, results_table

    columns = ["top1", "top5", "mean_per_class", "ece", "nll"]
    evaluated = (("validation", result.val), ("test", result.test))
    rows = [Row(name, found.scalars()) for name, found in evaluated if found is not None]
    console = _stdout()
    if rows:
        title = f"{config.method.name} on {config.model.name}"
        if result.best_epoch is not None:
            title += f", epoch {result.best_epoch + 1} of {config.train.epochs}"
        console.print(results_table(rows, columns, title=escape(title), first="split"))
    # a run that was only finished from its saved state trained nothing
    speed = f"{result.images_per_second:.0f} images/s in training, " if result.images_per_second else ""
    where = f"{duration(result.seconds)} in all; run folder: {escape(str(result.run))}"
    console.print(speed + where, soft_wrap=True)


def main() -> None:
    """Entry point of the ``mooring`` command."""
    app()


if __name__ == "__main__":
    main()
