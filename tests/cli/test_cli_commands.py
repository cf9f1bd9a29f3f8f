"""The real command line: options, errors, exit codes, and the commands that need no training."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import mooring
from mooring.cli import _Commands, app
from mooring.config.load import load_config, to_toml
from mooring.errors import ConfigError, MissingDependencyError, RunFolderError
from mooring.report.metrics_log import MetricsLog
from mooring.report.predictions import open_predictions
from mooring.report.run_folder import RunFolder

OPTIONS = {
    (): {"--debug", "--version", "--install-completion", "--show-completion", "--help"},
    ("scan",): {
        "--out", "--val-fraction", "--seed", "--workers", "--image-column", "--label-column",
        "--split-column", "--help",
    },
    ("train",): {"--dry-run", "--resume", "--allow-inexact", "--restarts", "--help"},
    ("resume",): {"--check", "--allow-inexact", "--help"},
    ("compare",): {"--methods", "--seeds", "--shots", "--fraction", "--lrs", "--out", "--help"},
    ("recommend",): {"--models", "--methods", "--minutes", "--help"},
    ("launch",): {
        "--hostfile", "--processes", "--torchrun", "--pdsh", "--slurm", "--nodes", "--rendezvous", "--restarts",
        "--master-addr", "--master-port", "--gpus-per-node", "--env", "--sbatch", "--preflight",
        "--dry-run", "--help",
    },
    ("preflight",): {
        "--hostfile", "--torchrun", "--slurm", "--processes", "--master-addr", "--master-port", "--env", "--help",
    },
    ("plan",): {
        "--nodes", "--gpus-per-node", "--gpu-memory", "--classes", "--matmul-tflops", "--memory-gbs",
        "--link-gbs", "--node-link-gbs", "--measure", "--help",
    },
    ("eval",): {"--data", "--split", "--help"},
    ("predict",): {"--top", "--out", "--overwrite", "--help"},
    ("export",): {"--out", "--help"},
    ("info",): {"--keys", "--help"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOORING_DEBUG", raising=False)


def run(*arguments: str | Path, environment: dict[str, str] | None = None) -> Any:
    # a wide screen: what is asserted does not depend on where lines break
    return CliRunner(env={"COLUMNS": "200", **(environment or {})}).invoke(app, [str(a) for a in arguments])


# ---------------------------------------------------------------- the surface


@pytest.mark.parametrize("command", OPTIONS, ids=lambda command: " ".join(command) or "mooring")
def test_options_are_frozen(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    # an option starts its line of the help; others may be mentioned in the text
    listed = result.output.partition("Shipped recipes")[0]  # what follows is text, wherever its lines break
    shown = re.findall(r"^\W*(--[a-z-]+)", listed, flags=re.MULTILINE)
    assert set(shown) == OPTIONS[command]


def test_commands_are_frozen() -> None:
    group = typer.main.get_command(app)
    assert list(group.commands) == [
        "scan",
        "train",
        "resume",
        "compare",
        "recommend",
        "launch",
        "preflight",
        "plan",
        "eval",
        "predict",
        "export",
        "info",
    ]  # type: ignore[attr-defined]


def test_version() -> None:
    assert run("--version").output == f"mooring {mooring.__version__}\n"


def test_no_arguments_show_the_help() -> None:
    assert "Fine-tune pretrained vision models" in run().output


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["train", "--help"], ["info", "--keys"]])
def test_light_commands_import_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom mooring.cli import app\n"
        f"app({command!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'timm', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


# ---------------------------------------------------------------- errors


def test_config_errors_are_listed_without_a_traceback() -> None:
    result = run("train", "train.epoch=3", "seed=x", "method=dr_tun")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "4 settings are wrong" in result.stderr
    for line in (
        "train.epoch: got 3; there is no such key, the nearest is train.epochs",
        'seed: got "x"; expected an integer >= 0',
        "the nearest is dr_tune",
        "data: got nothing; expected the images: add data=DIR",
    ):
        assert line in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("how", [{"arguments": ["--debug"]}, {"environment": {"MOORING_DEBUG": "1"}}])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback(how: dict[str, Any], place: int) -> None:
    words = ["train", "seed=x"]
    words[place:place] = how.get("arguments", [])
    result = run(*words, environment=how.get("environment"))
    assert isinstance(result.exception, ConfigError)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "a.toml", "b.toml"], "got 2 words without '=': a.toml b.toml"),
        (["train", "nowhere.toml"], "no such recipe file"),
        (["train", "."], "for a folder of images write data=."),
        (["eval", "nowhere"], "expected a run folder (written by mooring train), got nothing"),
        (["eval", ".", "--split", "tests"], "--split: expected train, val or test, got tests"),
        (["predict", "nowhere", "x.jpg"], "expected a run folder"),
        (
            ["predict", "nowhere", "x.jpg", "--out", "x.txt"],
            "expected a file ending with .csv or .jsonl, got x.txt",
        ),
        (["predict", "nowhere", "x.jpg", "--out", "no/x.csv"], "expected a file in an existing folder"),
        (["info", "nowhere"], "expected a run folder"),
        (["scan", "nowhere"], "nowhere"),
        (
            ["train", "--epochs", "3"],
            "--epochs: there is no such option; settings are written key=value: write train.epochs=3",
        ),
        (["train", "--data=photos"], "write data=photos"),
        (["train", "--resume", "nope"], "resume: expected a run folder, got nope"),
        (["scan", ".", "--val-fraction", "1"], "--val-fraction"),
        (["scan", ".", "--seed", "-1"], "--seed"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_message(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RunFolderError("out: no"), 2, "Run folder error: out: no"),
        (MissingDependencyError("install it"), 2, "Missing dependency error: install it"),
        (OSError(errno.ENOSPC, "full", "runs/a"), 2, "runs/a: the disk is full"),
        (PermissionError(errno.EACCES, "no", "runs/a"), 2, "runs/a: no permission"),
        (RunFolderError("[/weird] [bold]markup"), 2, "[/weird] [bold]markup"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(error: BaseException, code: int, message: str) -> None:
    application = typer.Typer(cls=_Commands)

    @application.command()
    def failing() -> None:
        raise error

    @application.callback()
    def root() -> None:
        pass

    result = CliRunner().invoke(application, ["failing"])
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    application = typer.Typer(cls=_Commands)

    @application.command()
    def failing() -> None:
        raise RuntimeError("a bug")

    @application.callback()
    def root() -> None:
        pass

    result = CliRunner().invoke(application, ["failing"])
    assert isinstance(result.exception, RuntimeError)
    assert result.exit_code == 1


# ---------------------------------------------------------------- scan


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes with 8 images each, and one file that is no image."""
    folder = tmp_path / "my photos"
    for place, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (20, 16), (100 * place, 10 * index, 50)).save(folder / name / f"{index}.png")
    (folder / "cat" / "broken [1].jpg").write_bytes(b"not an image")
    return folder


def test_scan_reports_and_writes_a_manifest(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("scan", photos, "--val-fraction", "0.25", "--workers", "1")
    assert result.exit_code == 0, result.output
    assert "16 images, 2 classes" in result.stdout
    assert "1 file left out: 1 not an image" in result.stdout
    assert "broken [1].jpg" in result.stdout
    assert "note no validation split was given" in result.stdout
    assert "scanning my photos: 17/17 images" in result.stderr
    head = json.loads((tmp_path / "scans" / "my photos" / "manifest.json").read_text())
    assert head["counts"] == {"train": 12, "val": 4}


def test_scan_reads_a_list_with_its_columns(photos: Path, tmp_path: Path) -> None:
    with (photos / "list.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["where", "what", "part"])
        for index in range(8):
            for name in ("cat", "dog"):
                writer.writerow([f"{name}/{index}.png", name, "val" if index < 2 else "train"])
    result = run(
        "scan", photos / "list.csv", "--out", tmp_path / "manifest",
        "--image-column", "where", "--label-column", "what", "--split-column", "part",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    head = json.loads((tmp_path / "manifest" / "manifest.json").read_text())
    assert head["counts"] == {"train": 12, "val": 4}


# ---------------------------------------------------------------- info


def test_info_names_the_parts() -> None:
    result = run("info")
    assert result.exit_code == 0, result.output
    for part in (
        "torch",
        "cpu",
        "DALI",
        "Triton",
        "DeepSpeed",
        "Apex",
        "CUDA",
        "torchvision ops",
        "dr_tune_paper",
    ):
        assert part in result.stdout


def test_info_lists_every_key() -> None:
    from mooring.config.keys import all_keys

    output = run("info", "--keys").stdout
    assert [name for name in all_keys() if name not in output] == []


def test_info_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_text("config.toml", to_toml(load_config(None, ["data=photos", "method=lp_ft"])))
    with MetricsLog(tmp_path) as log:
        log.write("train", step=40, epoch=1, values={"loss": 1.0})
    unfinished = run("info", tmp_path)
    assert unfinished.exit_code == 0, unfinished.output
    assert "Not finished: 40 steps logged" in unfinished.stdout
    scalars = {"top1": 0.8125, "top5": 1.0, "mean_per_class": 0.75, "ece": float("nan"), "nll": 0.5}
    folder.write_json(
        "result.json",
        {
            "best_epoch": 3, "val": scalars, "test": None, "images_per_second": 31.0, "seconds": 75.0,
            "interrupted": False,
        },
    )  # fmt: skip
    finished = run("info", tmp_path)
    assert finished.exit_code == 0, finished.output
    for text in (
        "lp_ft",
        "photos",
        "81.2 %",
        "nan",
        "Finished after 1:15, best epoch 4, 31 images/s",
        "metrics.jsonl",
    ):
        assert text in finished.stdout


# ---------------------------------------------------------------- predictions

FILES = [Path("a b.jpg"), Path('c"d.jpg')]
RANKED = [[("cat", 0.75), ("dog, small", 0.25)], [("dog, small", 0.5), ("cat", 0.5)]]


def write(path: Path, *, overwrite: bool = False) -> str:
    with open_predictions(path, top=2, overwrite=overwrite) as writer:
        for file, ranked in zip(FILES, RANKED, strict=True):
            writer.write(file, ranked)
    return path.read_text(encoding="utf-8")


def test_predictions_as_csv_and_json_lines(tmp_path: Path) -> None:
    rows = list(csv.DictReader(write(tmp_path / "out.csv").splitlines()))
    assert rows[0] == {
        "file": "a b.jpg", "class_1": "cat", "probability_1": "0.750000",
        "class_2": "dog, small", "probability_2": "0.250000",
    }  # fmt: skip
    assert rows[1]["file"] == 'c"d.jpg'
    lines = [json.loads(line) for line in write(tmp_path / "OUT.JSONL").splitlines()]
    assert lines[1] == {"file": 'c"d.jpg', "classes": [["dog, small", 0.5], ["cat", 0.5]]}


def test_an_existing_file_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    first = write(tmp_path / "out.csv")
    with pytest.raises(RunFolderError, match="exists: choose another name, or add --overwrite"):
        write(tmp_path / "out.csv")
    assert write(tmp_path / "out.csv", overwrite=True) == first


@pytest.mark.parametrize("done", [0, 1])
def test_what_was_predicted_before_an_error_stays(done: int, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_predictions(tmp_path / "out.jsonl", top=2) as writer:
        for file, ranked in zip(FILES[:done], RANKED, strict=False):
            writer.write(file, ranked)
            assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1, "not written as it came"
        raise ZeroDivisionError
    assert (tmp_path / "out.jsonl").exists() == bool(done), "an empty file would be in the way"


@pytest.mark.parametrize("names", [["nowhere.jpg"], ["empty"]])
def test_images_to_predict_must_be_there(names: list[str], tmp_path: Path) -> None:
    RunFolder(tmp_path).write_text("config.toml", to_toml(load_config(None, ["data=photos"])))
    (tmp_path / "empty").mkdir()
    result = run("predict", tmp_path, *(tmp_path / name for name in names))
    assert result.exit_code == 2
    assert re.search("expected (an image|images)", result.stderr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run folder with an export, the photos beside it, and what training printed."""
    root = tmp_path_factory.mktemp("trained")
    for place, name in enumerate(("[bold]q", "dog")):
        (root / "photos" / name).mkdir(parents=True)
        for index in range(8):
            picture = Image.new("RGB", (20, 16), (100 * place, 10 * index, 50))
            picture.save(root / "photos" / name / f"{index}.png")
    (root / "photos" / "dog" / "bad.jpg").write_bytes(b"no image")
    settings = [
        f"data={root / 'photos'}", f"out={root / 'run'}", "model.name=resnet10t", "model.weights=none",
        "method=fine_tune", "train.image_size=32", "train.eval_size=32", "train.batch_size=4", "train.epochs=1",
        "data.source=torch", "data.workers=1", "report.plots=false", "report.tensorboard=false",
    ]  # fmt: skip
    result = run("train", *settings, environment={"MOORING_CACHE": str(root / "cache")})
    assert result.exit_code == 0, result.output
    return root, result


def test_training_says_what_the_scan_decided(trained: Any) -> None:
    root, result = trained
    assert "note no validation split was given" in result.stderr
    assert "1 file left out: 1 not an image: listed in" in result.stderr
    assert f"{root / 'run' / 'manifest' / 'quarantine.csv'}" in result.stderr
    assert "note" not in result.stdout
    assert "top-5" not in result.output, "two classes"


def test_eval_takes_the_split_there_is(trained: Any) -> None:
    root, _ = trained
    result = run("eval", root / "run")
    assert result.exit_code == 0, result.output
    assert "val split" in result.stdout
    assert "top-5" not in result.stdout
    assert "test" in run("eval", root / "run", "--split", "test").stderr


def test_predict_leaves_out_what_a_folder_holds_of_bad_files(trained: Any, tmp_path: Path) -> None:
    root, _ = trained
    result = run("predict", root / "run", root / "photos", "--out", tmp_path / "out.csv", "--top", "1")
    assert result.exit_code == 0, result.output
    assert "bad.jpg" in result.stderr
    assert "1 file could not be read" in result.stderr
    assert "16 predictions in" in result.stdout
    assert len(list(csv.DictReader((tmp_path / "out.csv").open()))) == 16
    again = run("predict", root / "run", root / "photos", "--out", tmp_path / "out.csv")
    assert again.exit_code == 2
    assert "add --overwrite" in again.stderr


def test_predict_refuses_a_bad_file_that_was_named(trained: Any, tmp_path: Path) -> None:
    root, _ = trained
    result = run("predict", root / "run", root / "photos" / "dog" / "bad.jpg", "--out", tmp_path / "out.csv")
    assert result.exit_code == 2
    assert "bad.jpg" in result.stderr
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("metrics.jsonl", "junk\n{}\n"), ("result.json", "[]"), ("result.json", '{"val": {"top1": "x"}}')],
)
def test_info_names_a_damaged_record(name: str, content: str, tmp_path: Path) -> None:
    RunFolder(tmp_path).write_text("config.toml", to_toml(load_config(None, ["data=photos"])))
    (tmp_path / name).write_text(content)
    result = run("info", tmp_path)
    assert result.exit_code == 2
    assert name in result.stderr
    assert "Traceback" not in result.output


def test_defaults_that_are_words_are_shown() -> None:
    assert "[default: scans/NAME]" in run("scan", "--help").output
    assert "[default: the run's own]" in run("eval", "--help").output
    assert "dr_tune_paper" in run("train", "--help").output


# ---------------------------------------------------------------- the package


def test_public_names_load() -> None:
    for name in mooring.__all__:
        assert getattr(mooring, name) is not None
    assert set(mooring.__all__) <= set(dir(mooring))
    with pytest.raises(AttributeError, match="has no attribute 'engine_'"):
        mooring.engine_  # noqa: B018


def test_import_is_light() -> None:
    code = (
        "import sys, mooring\nfrom mooring import RunConfig, load_config, MooringError\n"
        "RunConfig(data='photos')\n"
        "print([name for name in ('torch', 'timm', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_is_the_one_of_the_package(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == mooring.__version__
    assert project["scripts"]["mooring"] == "mooring.cli:main"


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mooring.cli", "train", "epochs=3"],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "the nearest is train.epochs" in done.stderr


@pytest.mark.parametrize("arguments", [["scan", ""], ["eval", "run", "--data", " "]])
def test_an_empty_path_is_not_the_current_folder(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "got empty text" in " ".join(result.output.replace("│", " ").split())
