"""The ``mooring`` command: one thin function per subcommand.

Everything heavy is imported inside the functions, so that ``mooring --help`` answers at once. Results go
to stdout; progress and errors go to stderr. Exit codes: ``mooring.exit_codes``.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from mooring import signs
from mooring.errors import ConfigError, DataError, MooringError
from mooring.exit_codes import CRASHED, INTERRUPTED, LOST, PREEMPTED, USER_ERROR
from mooring.report.terminal import stderr
from mooring.stop_signals import leave_when_preempted

if TYPE_CHECKING:
    from mooring.config.schema import RunConfig
    from mooring.data.manifest import Manifest
    from mooring.launch.request import LaunchRequest
    from mooring.report.predictions import Ranked
    from mooring.train.results import RunPlan, RunResult

_Value = TypeVar("_Value")

NOT_EXACT = 1
_LOCAL_RANK = re.compile(r"--local[_-]rank=\d+")


class _Commands(TyperGroup):
    """Turns what a user can put right into one panel, and Ctrl-C into exit code 130."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:  # allowed anywhere, as in `mooring train ... --debug`
            args = ["--debug", *(argument for argument in args if argument != "--debug")]
        # DeepSpeed's launcher puts it before everything; the environment says it, too
        args = [argument for argument in args if not _LOCAL_RANK.fullmatch(argument)]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.Exit as err:
            signs.ended(err.exit_code, "")
            raise
        except KeyboardInterrupt:
            signs.ended(INTERRUPTED, "interrupted")
            _fail("interrupted", "stopped; what was written so far is kept")
            raise typer.Exit(INTERRUPTED) from None
        except MooringError as err:
            problem, message, code = type(err).__name__.removesuffix("Error"), str(err), err.exit_code
            signs.ended(code, message)
            if ctx.params.get("debug"):
                raise
        except Exception as err:
            problem, message, code = "System", _system_problem(err) or "", USER_ERROR
            signs.ended(code if message else CRASHED, message or f"{type(err).__name__}: {err}")
            if not message or ctx.params.get("debug"):
                raise
        _fail(f"{_words(problem)} error", message)
        if code == LOST:
            _leave_at_once(code)
        raise typer.Exit(code)


def _leave_at_once(code: int) -> None:
    """Ends without waiting for what waits for another rank: a saved state under way, the process group."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _TrainCommand(TyperCommand):
    """Says how a setting is written where one is given as an option: ``--epochs 3``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {"--help"}
        for parameter in self.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
        for place, word in enumerate(args):
            name, equals, value = word.partition("=")
            if word == "--":
                break
            if word.startswith("--") and name not in known:
                following = args[place + 1 : place + 2]
                raise _no_such_option(name, value if equals else next(iter(following), ""))
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from mooring.config.load import shipped_recipes  # only where it is read: it imports the whole schema

        self.epilog = (
            f"Shipped recipes: [bold]{', '.join(shipped_recipes())}[/]. "
            "Settings are listed by:  [bold]mooring info --keys[/]"
        )
        super().format_help(ctx, formatter)


def _no_such_option(option: str, value: str) -> MooringError:
    from mooring.config.keys import SHORTHANDS, all_keys, nearest

    word = option.removeprefix("--").replace("-", "_")
    key = word if word in SHORTHANDS else nearest(word, tuple(all_keys()))
    shown = "..." if not value or value.startswith("-") or ("=" in value) else value
    hint = f"write {key}={shown}" if key is not None else "settings are listed by  mooring info --keys"
    return ConfigError(f"{option}: there is no such option; settings are written key=value: {hint}")


def _given_path(text: str) -> Path:
    """``Path("")`` is the current folder, which nobody means who writes an empty text."""
    if not str(text).strip():
        raise typer.BadParameter("expected a path; got empty text (an unset shell variable?)")
    return Path(text)


def _words(name: str) -> str:
    spaced = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()
    return spaced.capitalize()


def _system_problem(err: Exception) -> str | None:
    """What to do about an error of the machine, or None where it is a fault of this program."""
    if isinstance(err, OSError):
        advice = {
            errno.ENOSPC: "the disk is full: free some space, or choose another folder with out=",
            errno.EDQUOT: "the disk quota is used up: free some space, or choose another folder with out=",
            errno.EACCES: "no permission: choose files you may read, and a folder you may write with out=",
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
    console = Console(file=stderr(), highlight=False)
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
            parser=_given_path,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", readable=False, help="Where the manifest goes. \\[default: scans/NAME]"
        ),
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option(
            min=0.0001, max=0.9999, help="Share of train held out where no validation split is given."
        ),
    ] = 0.15,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the validation split.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding threads. \\[default: all cores]")
    ] = None,
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


_AllowInexact = Annotated[
    bool,
    typer.Option(
        "--allow-inexact", help="Go on where the run cannot continue bit for bit; it is recorded in the run."
    ),
]


@app.command(cls=_TrainCommand)
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE | KEY=VALUE",
            help="A recipe (a TOML file, or the name of a shipped one) and settings, as in data=photos method=dr_tune.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings and the step count; train nothing.")
    ] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Continue the run in this folder; same as resume=RUN.")
    ] = None,
    allow_inexact: _AllowInexact = False,
    restarts: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Continue by itself, up to N times, where the run was preempted or killed.",
        ),
    ] = 0,
) -> None:
    """Fine-tune a model on a folder of labelled images."""
    leave_when_preempted()
    from mooring.config.load import load_config

    recipe, overrides = _recipe_and_overrides(arguments or [])
    overrides += [f"resume={resume}"] if resume is not None else []
    overrides += ["allow_inexact=true"] if allow_inexact else []
    config = load_config(recipe, overrides)
    if restarts and not dry_run:
        raise typer.Exit(_train_with_restarts(config, arguments or [], resume, allow_inexact, restarts))
    _train(config, dry_run=dry_run)


@app.command(name="resume", cls=_TrainCommand)
def resume_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", readable=False, help="A run folder.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that differ from the run's own."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Only list what is not as it was; exit code 1 where the run would not be exact."
        ),
    ] = False,
    allow_inexact: _AllowInexact = False,
) -> None:
    """Continue a run from its newest whole checkpoint, bit for bit."""
    leave_when_preempted()
    from mooring.config.load import load_config

    overrides = [*(arguments or []), f"resume={run}", *(["allow_inexact=true"] if allow_inexact else [])]
    config = load_config(None, overrides)
    if not check:
        _train(config)
        return
    if not _print_differences(config, run):
        raise typer.Exit(NOT_EXACT)


def _train(config: RunConfig, *, dry_run: bool = False) -> None:
    """Builds and trains, and says what came of it."""
    from mooring.distributed import launched_ranks
    from mooring.report.progress import counting
    from mooring.train.engine import Engine

    first = launched_ranks().is_first  # of several processes, the first one speaks

    # a first use of a data path decodes every image: that can take minutes, and must not look like a hang
    try:
        with counting("reading the data", "images", config.report.progress if first else "quiet") as progress:
            engine = Engine.build(config, scan_progress=progress)
    except KeyboardInterrupt:
        kept = "the run is as it was" if config.resume is not None else "nothing was written"
        _fail("interrupted", f"stopped before the run began; {kept}")
        raise typer.Exit(INTERRUPTED) from None
    if first:
        _print_data_notes(config, engine.parts.manifest)
    if dry_run:
        try:
            if first:
                _print_plan(config, engine.plan())
        finally:
            engine.close()
        return
    try:
        result = engine.fit()
    except KeyboardInterrupt:  # a second Ctrl-C, while the first was being dealt with
        place = config.out or "the newest folder of runs/"
        _fail("interrupted", f"stopped at once; the last saved state, where there is one, is in {place}")
        raise typer.Exit(INTERRUPTED) from None
    if first:
        _print_result(config, result)
    if result.interrupted:
        if first:
            kept, again = f"what was finished is in {result.run}", "continue with"
            if not engine.is_ready:
                kept, again = "stopped in the set-up: no step was done and no state saved", "begin anew with"
            _fail(
                "preempted" if result.preempted else "interrupted",
                f"{kept}; {again}  mooring train --resume {result.run}",
            )
        raise typer.Exit(PREEMPTED if result.preempted else INTERRUPTED)


def _train_with_restarts(
    config: RunConfig, arguments: list[str], resume: str | None, allow_inexact: bool, restarts: int
) -> int:
    """Trains in a process of its own, and continues it where it was taken down; returns its exit code."""
    from mooring.launch.restart import run_with_restarts
    from mooring.report.run_folder import default_run_name

    words = [sys.executable, "-m", "mooring.cli", "train", *arguments]
    words += ["--allow-inexact"] if allow_inexact else []
    if resume is not None:
        first = again = [*words, "--resume", resume]
    elif config.resume is not None:
        first = again = words
    else:
        out = config.out or Path("runs") / default_run_name(config)  # the same one for every process
        first, again = [*words, f"out={out}"], [*words, f"out={out}", "resume=auto"]
    return run_with_restarts(first, again, restarts, note=_warn)


def _print_differences(config: RunConfig, run: Path) -> bool:
    """Lists what is not as it was when the run was saved; returns whether it would continue bit for bit."""
    from mooring.state.store import checkpoints_of
    from mooring.train.best_weights import require
    from mooring.train.checkpoint import SHARED, compared, obstacle_to, require_unsaved
    from mooring.train.engine import Engine

    store = checkpoints_of(run)
    found = store.newest()
    found.require_whole()
    for note in found.notes:
        _warn(note)
    console = _stdout()
    if found.ref is None:
        require_unsaved(run)
        console.print("nothing was saved yet: the run would start from its beginning")
        return True
    with Engine.build(config) as engine:
        differences = compared(engine, store, found.ref)
        obstacle = obstacle_to(engine, store, found.ref)
    require(run, store.read(found.ref, SHARED)["best"]["epoch"], store, found.ref)
    exact = obstacle is None and not any(difference.breaks for difference in differences)
    if differences:
        table = Table("what", "saved", "now", "bit for bit", header_style="bold")
        for difference in differences:
            cells = (difference.name, difference.saved, difference.now)
            table.add_row(*map(escape, cells), "no" if difference.breaks else "yes")
        console.print(table)
    if obstacle is not None:
        so = f"{escape(str(run))} cannot be continued so, with --allow-inexact neither: {escape(str(obstacle))}"
        console.print(so, soft_wrap=True)
        return False
    says = (
        "would continue bit for bit" if exact else "would not continue bit for bit (--allow-inexact goes on)"
    )
    console.print(
        f"{escape(str(run))} {says} from step {found.ref.step} ({escape(found.ref.reason)})", soft_wrap=True
    )
    return exact


@app.command(cls=_TrainCommand)
def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE | KEY=VALUE",
            help="Settings of every run, as after mooring train: data=photos train.epochs=10; also methods=[A,B] "
            "and seeds=N.",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="Methods; several joined by + are one combination. \\[required, unless methods=]",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of each method, with seeds counting up. \\[default: 3]"),
    ] = None,
    shots: Annotated[
        str | None, typer.Option(metavar="N,M", help="Train on that many images per class, each in turn.")
    ] = None,
    fraction: Annotated[
        str | None, typer.Option(metavar="P,Q", help="Train on that share of each class, each in turn.")
    ] = None,
    lrs: Annotated[
        str | None,
        typer.Option(
            metavar="R,S",
            help="Learning rates to choose from, for each method, on validation data of the first seed.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            readable=False,
            help="Runs, records, table and picture; what is finished there is not run again. "
            "\\[default: comparisons/NAME]",
        ),
    ] = None,
) -> None:
    """Run several methods with equal budgets over seeds; stopped with Ctrl-C, the same call goes on."""
    from mooring.comparison.plan import Comparison
    from mooring.config.load import load_config
    from mooring.report.run_folder import data_name

    words = list(arguments or [])
    named = _option_or_word("methods", methods, words) or ""
    count = _option_or_word("seeds", None if seeds is None else str(seeds), words)
    recipe, overrides = _recipe_and_overrides(words)
    comparison = Comparison(
        methods=_listed("--methods", named.strip().strip("[]").replace('"', ""), str),
        out=out or Path("comparisons") / data_name(load_config(recipe, overrides).data.path),
        recipe=recipe,
        overrides=overrides,
        seeds=_listed("seeds", count, int)[0] if count else 3,
        shots=_listed("--shots", shots, int),
        fractions=_listed("--fraction", fraction, float),
        lrs=_listed("--lrs", lrs, float),
    )
    comparison.check()

    from mooring.comparison.runner import run_comparison
    from mooring.comparison.table import notes, terminal

    outcome = run_comparison(comparison)
    console = _stdout()
    if any(record["role"] == "result" for record in outcome.records):
        for table in terminal(outcome.records, title=str(outcome.out)):
            console.print(table)
        for note in notes(outcome.records):
            console.print(f"- {escape(note)}", soft_wrap=not console.is_terminal)
        console.print(
            f"in {escape(str(outcome.out))}: records.jsonl, table.md, comparison.png, runs/", soft_wrap=True
        )
    if outcome.interrupted:
        _fail("interrupted", f"finished runs are in {outcome.out}; the same command continues")
        raise typer.Exit(INTERRUPTED)


@app.command(cls=_TrainCommand)
def recommend(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE | KEY=VALUE", help="Settings, as after mooring train: data=photos."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Models whose weights are here. \\[default: model.name]"),
    ] = None,
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="Methods for the race.")
    ] = "fine_tune,l2_sp,dr_tune",
    minutes: Annotated[float, typer.Option(help="Time for the race.")] = 5.0,
) -> None:
    """Say which model and method to begin with, from frozen features and a short few-shot race."""
    from mooring.advice.recommend import recommend as recommend_for

    recipe, overrides = _recipe_and_overrides(arguments or [])
    found = recommend_for(
        recipe,
        overrides,
        models=_listed("--models", models, str),
        methods=_listed("--methods", methods, str),
        minutes=minutes,
    )
    console = _stdout()
    for reason in found.reasons:
        console.print(f"- {escape(reason)}", soft_wrap=True)
    console.print(
        f"begin with [bold]{escape(found.method)}[/] on [bold]{escape(found.model)}[/] ({found.sure}):",
        soft_wrap=True,
    )
    console.print(f"  {escape(found.command)}", soft_wrap=True)


_Hostfile = Annotated[
    Path | None,
    typer.Option(
        "--hostfile", metavar="FILE", readable=False, help="Lines of  NAME slots=COUNT.", show_default=False
    ),
]
_Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE | KEY=VALUE", help="As after mooring train."),
]
_Environment = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME=VALUE", help="Set for every process; may be repeated."),
]
_Address = Annotated[
    str | None, typer.Option("--master-addr", help="Where the processes meet. \\[default: the first host]")
]
_Port = Annotated[int, typer.Option("--master-port", min=1, max=65535, help="Free on the first host.")]


@app.command(cls=_TrainCommand)
def launch(
    arguments: _Arguments = None,
    hostfile: _Hostfile = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine, or on each of Slurm's nodes. \\[default: 1]"),
    ] = None,
    torchrun: Annotated[
        bool, typer.Option("--torchrun", help="Start them by torchrun instead of DeepSpeed's launcher.")
    ] = False,
    pdsh: Annotated[
        bool, typer.Option("--pdsh", help="Reach the hosts by DeepSpeed's runner and pdsh.")
    ] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Write and submit a Slurm batch script.")] = False,
    nodes: Annotated[
        str | None,
        typer.Option(
            metavar="N | MIN:MAX", help="Machines to ask Slurm for; a range where nodes may be lost."
        ),
    ] = None,
    rendezvous: Annotated[
        str, typer.Option(metavar="static | c10d", help="torchrun: c10d lets nodes fail and come again.")
    ] = "static",
    restarts: Annotated[
        int, typer.Option(min=0, help="Start a failed job again, from its newest checkpoint.")
    ] = 0,
    master_addr: _Address = None,
    master_port: _Port = 29500,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="GPUs to ask Slurm for. \\[default: one a process]")
    ] = None,
    env: _Environment = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="NAME=VALUE", help="Further Slurm option, as in partition=gpu."),
    ] = None,
    preflight: Annotated[
        bool, typer.Option("--preflight/--no-preflight", help="Check all hosts before anything is trained.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands, or the batch script; start nothing.")
    ] = False,
) -> None:
    """Train on many machines, or with several processes on this one."""
    from mooring.launch.request import launch_request

    if rendezvous not in ("static", "c10d"):
        raise ConfigError(f"--rendezvous: expected static or c10d, got {rendezvous}")
    config, words = _launched(arguments or [])
    assert config.out is not None
    request = launch_request(
        words,
        name=config.out.name,
        hostfile=hostfile,
        processes=processes,
        nodes=nodes,
        torchrun=torchrun,
        slurm=slurm,
        pdsh=pdsh,
        rendezvous="c10d" if rendezvous == "c10d" else "static",
        restarts=restarts,
        master_addr=master_addr,
        master_port=master_port,
        gpus_per_node=gpus_per_node,
        env=env or [],
        sbatch=sbatch or [],
    )
    if request.rendezvous.min_nodes is not None and not config.allow_inexact:
        raise ConfigError(
            f"--nodes {nodes}: with fewer nodes the run cannot go on bit for bit, and would be refused then: add "
            "allow_inexact=true, which records it, or give one number"
        )
    if slurm:
        from mooring.launch.slurm import submit, write_script

        script = write_script(request, folder=Path.cwd(), preflight=preflight, dry_run=dry_run)
        if dry_run:
            typer.echo(script.text, nl=False)
            return
        _stdout().print(f"job {submit(script.path)} submitted; its script is {script.path}", soft_wrap=True)
        return
    if dry_run:
        typer.echo(request.plan().text())
        return
    if preflight and request.is_remote:
        _check_hosts(request, config)
    from mooring.launch.attempts import run_with_restarts

    run_with_restarts(request, cwd=Path.cwd(), out=config.out, warn=_warn)


@app.command(cls=_TrainCommand)
def preflight(
    hostfile: _Hostfile = None,
    arguments: _Arguments = None,
    torchrun: Annotated[
        bool, typer.Option("--torchrun", help="Try the all-reduce under torchrun, not DeepSpeed's launcher.")
    ] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Ask the nodes of the Slurm job that this runs in, by srun.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="--slurm: processes on each node. \\[default: 1]")
    ] = None,
    master_addr: _Address = None,
    master_port: _Port = 29500,
    env: _Environment = None,
) -> None:
    """Ask every host what it has, and try a small all-reduce; mooring launch does this by itself."""
    from mooring.launch.request import launch_request
    from mooring.launch.slurm import allocated_hosts

    if slurm and hostfile is not None:
        raise ConfigError("--hostfile: got one with --slurm, which knows the nodes itself; leave one out")
    if processes is not None and not slurm:
        raise ConfigError("--processes: belongs to --slurm; a hostfile says how many slots each host has")

    config, words = _launched(arguments or [])
    request = launch_request(
        words,
        name="preflight",
        hostfile=hostfile,
        torchrun=torchrun or slurm,
        allocated=allocated_hosts(processes or 1) if slurm else (),
        master_addr=master_addr,
        master_port=master_port,
        env=env or [],
    )
    _check_hosts(request, config)


@app.command(cls=_TrainCommand)
def plan(
    arguments: _Arguments = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each.")] = 8,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="GB of one GPU.")] = 80.0,
    classes: Annotated[int, typer.Option(min=2, help="Classes of the new task.")] = 1000,
    matmul_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="What one GPU achieves. \\[default: 400, or 100 in fp32]")
    ] = None,
    memory_gbs: Annotated[float, typer.Option(min=0.1, help="GB/s of its memory.")] = 2400.0,
    link_gbs: Annotated[float, typer.Option(min=0.001, help="GB/s a GPU sends between nodes.")] = 40.0,
    node_link_gbs: Annotated[float, typer.Option(min=0.001, help="GB/s a GPU sends inside a node.")] = 200.0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take matmul and memory rates from this machine, now.")
    ] = False,
) -> None:
    """Predict memory, traffic and time on machines one does not have yet; needs no data, weights or GPU."""
    from mooring.config.load import load_config

    recipe, overrides = _recipe_and_overrides(arguments or [])
    try:
        config = load_config(recipe, overrides)
    except ConfigError:  # perhaps for the data alone, which a plan does not need
        config = load_config(recipe, [*overrides, "data=photos"])

    from mooring.capacity.prediction import Cluster, Predictor, advise
    from mooring.capacity.rates import Rates, measured
    from mooring.capacity.tables import plan_tables

    precision = "fp32" if config.train.precision == "fp32" else "bf16"
    matmul, memory = (matmul_tflops or (100.0 if precision == "fp32" else 400.0)) * 1e12, memory_gbs * 1e9
    if measure:
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        matmul, memory = measured(device, torch.float32 if precision == "fp32" else torch.bfloat16)
    predictor = Predictor(
        config,
        classes,
        precision=precision,
        rates=Rates(matmul=matmul, memory=memory, link=link_gbs * 1e9, node_link=node_link_gbs * 1e9),
    )
    cluster = Cluster(nodes, gpus_per_node, gpu_memory * 1e9)
    console = _stdout()
    for part in plan_tables(predictor, cluster, advise(predictor, cluster)):
        console.print(part, soft_wrap=isinstance(part, str))


@app.command(name="eval")
def evaluate(
    # readable=False, here and below: the message about a path is ours, where it is used
    run: Annotated[Path, typer.Argument(metavar="RUN", readable=False, help="A run folder.")],
    data: Annotated[
        Path | None,
        typer.Option(parser=_given_path, help="Other images to evaluate on. \\[default: the run's own]"),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test. \\[default: test where there is one, else val]")
    ] = None,
) -> None:
    """Measure a finished run on a split of its data, or on other data with the same classes."""
    from mooring.report.metrics import counted, shown_metrics
    from mooring.report.run_folder import existing_run
    from mooring.report.table import Row, results_table

    if split not in (None, "train", "val", "test"):
        raise MooringError(f"--split: expected train, val or test, got {split}")
    existing_run(run)
    from mooring.train.inference import load_run

    predictor = load_run(run)
    rows = predictor.evaluation_split(data, split)
    result = predictor.evaluate_split(rows)
    values = result.scalars()
    title = f"{run}: {counted(result.n, 'image')} of {data or 'its data'}, {rows.name} split"
    columns = shown_metrics(list(values), len(predictor.classes))
    _stdout().print(results_table([Row(run.name, values)], columns, title=title, first="run"))


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", readable=False, help="A run folder.")],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE_OR_FOLDER", readable=False, help="What to classify.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes to show per image.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option(readable=False, help="Write to this .csv or .jsonl file instead of the screen."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --out.")] = False,
) -> None:
    """Classify images with a finished run. What cannot be read in a folder is named and left out."""
    from mooring.report.metrics import counted
    from mooring.report.predictions import PredictionWriter, check_predictions_path, open_predictions
    from mooring.report.progress import counting
    from mooring.report.run_folder import existing_run

    if out is not None:
        check_predictions_path(out, overwrite=overwrite)
    existing_run(run)
    files = _image_files(images)
    from mooring.train.inference import load_run

    predictor = load_run(run)
    top = min(top, len(predictor.classes))
    unreadable: list[Path] = []

    def left_out(path: Path, problem: DataError) -> None:
        if files[path]:
            raise problem
        unreadable.append(path)
        _warn(str(problem))

    console = _stdout()
    with ExitStack() as stack:
        if out is not None:
            write = stack.enter_context(open_predictions(out, top, overwrite=overwrite)).write
        elif console.is_terminal:
            table = Table("image", *(["class", ""] * top), header_style="bold")
            stack.callback(
                lambda: console.print(table) if table.row_count else None
            )  # also where a file fails

            def write(file: Path, ranked: Ranked) -> None:
                cells = [cell for name, share in ranked for cell in (escape(name), f"{100 * share:.1f} %")]
                table.add_row(escape(str(file)), *cells)

        else:
            write = PredictionWriter(sys.stdout, ".csv", top).write
        progress = stack.enter_context(counting("classifying", "images"))
        done = 0
        for file, ranked in predictor.predict_each(files, left_out):
            write(file, ranked[:top])
            done += 1
            progress(done + len(unreadable), len(files))
    if unreadable:
        _warn(f"{counted(len(unreadable), 'file')} could not be read")
    if not done:
        raise DataError("none of the files could be read")
    if out is not None:
        console.print(f"{counted(done, 'prediction')} in {escape(str(out))}", soft_wrap=True)


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN | CHECKPOINT",
            readable=False,
            help="A run folder (its best epoch, else its newest state), or RUN/checkpoints/step-N.",
        ),
    ],
    out: Annotated[Path, typer.Option(readable=False, help="A new folder for the model.")],
) -> None:
    """Write the model of a run, or of one of its checkpoints, as a folder that timm opens.

    Neither the run's processes nor its data or first weights are needed: whatever ranks a state was divided among, one
    process on any machine makes one model of it.
    """
    from mooring.train.exporting import export_saved

    says = export_saved(source, out)
    _stdout().print(f"{escape(says)} is in {escape(str(out))}", soft_wrap=True)


@app.command()
def info(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", readable=False, help="A run folder to summarise.")
    ] = None,
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


def _listed(option: str, text: str | None, kind: Callable[[str], _Value]) -> list[_Value]:
    """``1,2,5`` as a list; none where the option is not given."""
    if text is None:
        return []
    try:
        return [kind(word.strip()) for word in text.split(",") if word.strip()]
    except ValueError:
        expected = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{option}: expected {expected} with commas between, got {text}") from None


def _option_or_word(name: str, given: str | None, words: list[str]) -> str | None:
    """What ``--NAME X`` or the word ``NAME=X`` says; the word is taken out of ``words``."""
    said = [word for word in words if word.partition("=")[0].strip() == name]
    for word in said:
        words.remove(word)
    values = [*([] if given is None else [given]), *(word.partition("=")[2] for word in said)]
    if len(values) > 1:
        raise ConfigError(
            f"{name}: expected one value, as --{name} or as {name}=; got {' and '.join(values)}"
        )
    return values[0] if values else None


def _image_files(named: list[Path]) -> dict[Path, bool]:
    """The files named (True), and those under the folders named (False), in the order of their paths."""
    from mooring.data.discover import IMAGE_SUFFIXES

    files: dict[Path, bool] = {}
    for path in named:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(IMAGE_SUFFIXES))
            if not found:
                raise DataError(
                    f"{path}: expected images ({', '.join(IMAGE_SUFFIXES)}), got a folder without any"
                )
            for file in found:
                files.setdefault(file, False)
        elif path.is_file():
            files[path] = True
        else:
            raise DataError(f"{path}: expected an image or a folder, got nothing")
    return files


def _warn(message: str) -> None:
    Console(file=stderr(), highlight=False).print(f"[yellow]warning[/] {escape(message)}", soft_wrap=True)


def _recipe_and_overrides(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Splits the words after ``mooring train``; a recipe is what has no ``=``, wherever it stands."""
    recipes = [word for word in arguments if "=" not in word or Path(word).is_file()]
    if len(recipes) > 1:
        raise ConfigError(
            f"expected one recipe and key=value settings, got {len(recipes)} words without '=': "
            + " ".join(recipes)
        )
    return (recipes[0] if recipes else None), [word for word in arguments if word not in recipes]


def _launched(arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """The settings of a launch, and the words that every rank is started with: they all name one run folder."""
    from mooring.config.load import load_config
    from mooring.report.run_folder import default_run_name

    recipe, overrides = _recipe_and_overrides(arguments)
    config = load_config(recipe, overrides)
    if config.out is None:
        out = Path("runs") / default_run_name(config)
        config = config.model_copy(update={"out": out})
        overrides = [*overrides, f"out={out}"]
    return config, ["train", *([recipe] if recipe is not None else []), *overrides]


def _check_hosts(request: LaunchRequest, config: RunConfig) -> None:
    """Prints what the hosts answered.

    Raises:
        LaunchError: something stands against a start.
    """
    from mooring.launch.preflight import check
    from mooring.models.weights import cached_weights

    out, weights = config.out, config.model.weights
    assert out is not None
    files = [Path(weights)] if weights not in ("auto", "none") else []
    if weights == "auto" and cached_weights(config.model.name).is_file():
        files = [cached_weights(config.model.name)]
    result = check(request, data=config.data.path, out=out, files=files, cwd=Path.cwd())
    console = Console(file=stderr(), highlight=False)
    for table in result.tables():
        console.print(table)
    result.require_ready()


def _print_data_notes(config: RunConfig, manifest: Manifest) -> None:
    """What the scan decided, on stderr: how validation was split off, and what was left out."""
    from mooring.report.progress import resolve_mode
    from mooring.report.scan_summary import left_out

    if resolve_mode(config.report.progress) == "quiet":
        return
    console = Console(file=stderr(), highlight=False)
    for note in manifest.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    if manifest.quarantine:
        listed = (config.out or Path("RUN")) / "manifest" / "quarantine.csv"
        line = f"{left_out(manifest.quarantine)}: listed in {listed}"
        console.print(f"[yellow]note[/] {escape(line)}", soft_wrap=True)


def _print_plan(config: RunConfig, plan: RunPlan) -> None:
    """The resolved settings as TOML with the plan in its comments, so that the output is itself a recipe."""
    from mooring.config.load import to_toml
    from mooring.report.metrics import counted

    typer.echo(to_toml(config))
    typer.echo(
        f"# {plan.train_images} train, {plan.val_images} validation and {plan.test_images} test images; "
        f"{counted(plan.classes, 'class', 'classes')}\n"
        f"# {counted(plan.total_steps, 'step')}: {counted(config.train.epochs, 'epoch')} of "
        f"{plan.steps_per_epoch}\n"
        f"# {plan.method} on {plan.model}: {plan.parameters:,} parameters, {plan.feature_dim} features\n"
        f"# device {plan.device}, images from the {plan.source} source"
    )


def _print_result(config: RunConfig, result: RunResult) -> None:
    from mooring.report.metrics import duration, shown_metrics
    from mooring.report.table import Row, results_table

    rows = [Row({"val": "validation"}.get(name, name), values) for name, values in result.rows().items()]
    console = _stdout()
    measured = result.test or result.val
    if measured is not None:
        from mooring.config.method_settings import method_title

        columns = shown_metrics(
            list(dict.fromkeys(name for row in rows for name in row.values)), len(measured.confusion)
        )
        title = f"{method_title(config.method)} on {config.model.name}"
        if result.best_epoch is not None:
            title += f", epoch {result.best_epoch + 1} of {config.train.epochs}"
        console.print(results_table(rows, columns, title=title, first="split"))
    if result.discrimination:
        rows = [Row(name, values) for name, values in result.discrimination.items()]
        console.print(results_table(rows, list(rows[0].values), first="encoder"))
    # a run that was only finished from its saved state trained nothing
    speed = f"{result.images_per_second:.0f} images/s in training, " if result.images_per_second else ""
    where = f"{duration(result.seconds)} in all; run folder: {escape(str(result.run))}"
    console.print(speed + where, soft_wrap=True)


def main() -> None:
    """Entry point of the ``mooring`` command."""
    app()


if __name__ == "__main__":
    main()
