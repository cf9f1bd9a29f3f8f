"""What is fuzzed: each target takes damaged input to the code that reads it, and lets only promised errors pass.

A target is ``run(rng, folder)``: it makes its input from the seeds by ``mutations`` and returns; any other error than
the ones it names, a crash or a hang is a finding. Targets that read plain bytes have ``corpus`` and ``read`` too, for a
fuzzer that makes the bytes itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from mutations import damaged_bytes, damaged_json, strange
from PIL import Image
from safetensors.torch import save_file

from mooring.cli import app
from mooring.comparison.records import read_records
from mooring.config.load import config_from_toml, load_config, to_toml
from mooring.data.class_names import readable_names
from mooring.data.images import decode_rgb, inspect
from mooring.data.manifest import HEAD_FILE, QUARANTINE_FILE, ROWS_FILE, SCHEMA, Manifest
from mooring.data.quarantine import ImageProblem
from mooring.data.scan import scan
from mooring.data.source_task import class_indices
from mooring.data.text_features import class_text_features
from mooring.errors import MooringError
from mooring.models.weights import read_state_dict
from mooring.report.metrics_log import read_metrics
from mooring.state.encoding import read_all, view_tree
from mooring.state.tree import load_tree, save_tree

MAX_PIXELS = 250_000  # keeps what a damaged header may ask for small
CLASSES = ("a", "b")


@dataclass(frozen=True)
class Target:
    """One place where foreign input enters.

    Attributes:
        run: one damaged input; raises what it should not.
        read: takes the bytes of a file; None where the input is more than one file.
        corpus: whole inputs of ``read``.
        ending: of the file that ``read`` takes.
    """

    name: str
    run: Callable[[random.Random, Path], None]
    read: Callable[[bytes, Path], None] | None = None
    corpus: Callable[[], Sequence[bytes]] | None = None


TARGETS: dict[str, Target] = {}


def of_bytes(name: str, corpus: Callable[[], Sequence[bytes]], damage=damaged_bytes):
    """Declares a target that reads one file."""

    def declare(read: Callable[[bytes, Path], None]) -> Callable[[bytes, Path], None]:
        def run(rng: random.Random, folder: Path) -> None:
            read(damage(rng.choice(list(corpus())), rng), folder)

        TARGETS[name] = Target(name, run, read, corpus)
        return read

    return declare


def of_folder(name: str):
    """Declares a target of several files, or of values."""

    def declare(run: Callable[[random.Random, Path], None]) -> Callable[[random.Random, Path], None]:
        TARGETS[name] = Target(name, run)
        return run

    return declare


def written(folder: Path, name: str, data: bytes) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


# ---------------------------------------------------------------- images


def pixels(number: int, width: int = 24, height: int = 18) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


@cache
def image_files() -> tuple[bytes, ...]:
    files = []
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [pixels(n).convert("P") for n in (1, 2)]
    for kind, image, options in (
        ("JPEG", pixels(0), {}),
        ("JPEG", pixels(1), {"progressive": True, "exif": exif}),
        ("JPEG", pixels(2).convert("CMYK"), {}),
        ("PNG", pixels(3), {}),
        ("PNG", pixels(4).convert("P"), {"transparency": 3}),
        ("PNG", Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)), {}),
        ("WEBP", pixels(5), {}),
        ("WEBP", pixels(6).convert("RGBA"), {"lossless": True}),
        ("TIFF", pixels(7), {"compression": "tiff_lzw"}),
        ("TIFF", pixels(8), {"compression": "tiff_adobe_deflate"}),
        ("GIF", frames[0], {"save_all": True, "append_images": frames[1:]}),
        ("BMP", pixels(9), {}),
        ("PPM", pixels(10), {}),
    ):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        files.append(stream.getvalue())
    return tuple(files)


@of_bytes("image", image_files)
def read_image(data: bytes, folder: Path) -> None:
    with contextlib.suppress(ImageProblem):
        facts = inspect(data, MAX_PIXELS)
        image = decode_rgb(data, MAX_PIXELS)
        assert image.mode == "RGB" and image.size == (facts.width, facts.height)
        assert facts.width * facts.height <= MAX_PIXELS


@of_folder("image folder")
def read_image_folder(rng: random.Random, folder: Path) -> None:
    for label in CLASSES:
        for number in range(3):
            data = rng.choice(image_files())
            if rng.random() < 0.7:
                data = damaged_bytes(data, rng)
            written(folder, f"{label}/{number}.jpg", data)
    with contextlib.suppress(MooringError):
        scan(folder, workers=1, max_pixels=MAX_PIXELS)


# ---------------------------------------------------------------- lists and manifests


def _photos(root: Path) -> list[str]:
    names = []
    for label in CLASSES:
        for number in range(4):
            written(root, f"{label}{number}.png", image_files()[3] if number else image_files()[4])
            names.append(f"{label}{number}.png")
    return names


@cache
def csv_files() -> tuple[bytes, ...]:
    return (
        b"path,label,split\na0.png,a,train\nb0.png,b,train\na1.png,a,test\nb1.png,b,val\n",
        b'\xef\xbb\xbffile;class\n"a0.png";"x y"\n./b0.png;\xc3\xa9\n',
        b"image\ttarget\r\na0.png\t1\r\nb0.png\t2\r\n../out.png\t2\r\n",
    )


@of_bytes("list.csv", csv_files)
def read_csv(data: bytes, folder: Path) -> None:
    _photos(folder)
    with contextlib.suppress(MooringError):
        scan(written(folder, "list.csv", data), workers=1, max_pixels=MAX_PIXELS)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@cache
def parquet_lists() -> tuple[bytes, ...]:
    names = [f"{label}{number}.png" for label in CLASSES for number in range(4)]
    named = b'{"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}'
    rows = {"path": names, "label": [name[0] for name in names]}
    numbered = pa.table({"path": names, "label": [0] * 4 + [1] * 4}).replace_schema_metadata(
        {"huggingface": named}
    )
    return _parquet(pa.table(rows)), _parquet(numbered)


@of_bytes("list.parquet", parquet_lists)
def read_parquet(data: bytes, folder: Path) -> None:
    _photos(folder)
    with contextlib.suppress(MooringError):
        scan(written(folder, "list.parquet", data), workers=1, max_pixels=MAX_PIXELS)


@cache
def parquet_images() -> tuple[bytes, ...]:
    data = [*image_files()[:4], *image_files()[3:5], b"", None]
    plain = pa.table(
        {"image": pa.array(data, pa.binary()), "label": list("aabbabab"), "split": ["train"] * 8}
    )
    nested = pa.array([{"bytes": item, "path": "../x"} for item in data])
    return _parquet(plain), _parquet(pa.table({"image": nested, "label": [0, 0, 1, 1, 0, 1, 2, None]}))


@of_bytes("images.parquet", parquet_images)
def read_embedded(data: bytes, folder: Path) -> None:
    file = written(folder, "images.parquet", data)
    with contextlib.suppress(MooringError):
        scan(file, out=folder / "out", workers=1, max_pixels=MAX_PIXELS)
    outside = [path for path in folder.iterdir() if path.name not in ("images.parquet", "out")]
    assert not outside, outside


@cache
def _manifest_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for number, label in enumerate("aaabbb"):
            written(root, f"photos/{label}/{number}.png", image_files()[3] + bytes([number]))
        scan(root / "photos", out=root / "out", workers=1)
        return {file: (root / "out" / file).read_bytes() for file in (HEAD_FILE, ROWS_FILE, QUARANTINE_FILE)}


def _load_manifest(files: dict[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        written(folder, name, data)
    with contextlib.suppress(MooringError):
        manifest = Manifest.load(folder)
        for split in manifest.counts:
            rows = manifest.split(split)
            assert ((rows.labels >= 0) & (rows.labels < len(manifest.classes))).all()
            assert all(not Path(path).is_absolute() and ".." not in Path(path).parts for path in rows.paths)


@of_folder("manifest.json")
def damaged_manifest_head(rng: random.Random, folder: Path) -> None:
    files = dict(_manifest_files())
    files[HEAD_FILE] = damaged_json(files[HEAD_FILE], rng)
    _load_manifest(files, folder)


@of_folder("manifest.parquet and quarantine.csv")
def damaged_manifest_rows(rng: random.Random, folder: Path) -> None:
    files = dict(_manifest_files())
    name = rng.choice((ROWS_FILE, QUARANTINE_FILE))
    files[name] = damaged_bytes(files[name], rng)
    _load_manifest(files, folder)


@of_folder("signed manifest rows")
def signed_manifest_rows(rng: random.Random, folder: Path) -> None:
    """Rows with strange values and the digest that belongs to them, as someone with intent would write."""
    files = dict(_manifest_files())
    table = pq.read_table(io.BytesIO(files[ROWS_FILE]))
    for _ in range(rng.randint(1, 3)):
        column = rng.choice(table.schema.names)
        values = table[column].to_pylist()
        at = rng.randrange(len(values))
        values[at] = strange(rng) if rng.random() < 0.7 else rng.choice(values)
        kind = SCHEMA.field(column).type
        try:
            changed = pa.array(values, kind)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
            continue  # the column cannot hold it
        table = table.set_column(table.schema.names.index(column), SCHEMA.field(column), changed)
    head = json.loads(files[HEAD_FILE])
    head["digest"] = Manifest(Path(), tuple(head["classes"]), table).digest
    files |= {HEAD_FILE: json.dumps(head).encode(), ROWS_FILE: _parquet(table)}
    _load_manifest(files, folder)


# ---------------------------------------------------------------- settings


@cache
def toml_files() -> tuple[bytes, ...]:
    return tuple(
        to_toml(load_config(None, words)).encode()
        for words in (
            ["data=photos"],
            ["data=photos", "method=tes", "optimizer.name=sgd", "data.extra_test.x=other"],
            ["data=photos", "method=['daft', 'dr_tune']", "schedule.name=step"],
        )
    )


@of_bytes("config.toml", toml_files)
def read_toml(data: bytes, folder: Path) -> None:
    with contextlib.suppress(MooringError):
        config = load_config(written(folder, "recipe.toml", data), [])
        assert config_from_toml(to_toml(config)) == config


_OVERRIDES = (
    "data=photos", "data.path=x", "seed=1", "out=y", "model.name=resnet18", "method=dr_tune", "method.bank_size=4",
    "method=daft+tes", "train.epochs=3", "optimizer.betas=[0.9, 0.95]", "schedule.milestones=[0.5]", "resume=auto",
    "train.ema_decay=none", "data.extra_test.a=b", "optimizer={lr=1}", "method.name=['daft','tes']", "data='''",
)  # fmt: skip


@of_folder("key=value overrides")
def read_overrides(rng: random.Random, folder: Path) -> None:
    words = [
        damaged_bytes(word.encode(), rng).decode("utf-8", "surrogateescape") if rng.random() < 0.5 else word
        for word in rng.sample(_OVERRIDES, rng.randint(1, 6))
    ]
    if rng.random() < 0.5:
        words.append(f"{rng.choice(_OVERRIDES).partition('=')[0]}={strange(rng)}")
    with contextlib.suppress(MooringError):
        to_toml(load_config(None, words))


# ---------------------------------------------------------------- state, weights, features, tables


@cache
def _state_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        tree = {
            "step": 3,
            "a": torch.arange(6.0),
            "b": [1.5, None, "x", True, (1, 2)],
            "c": {"d": b"\0\1", 4: torch.ones(2)},
        }
        save_tree(Path(name) / "state", tree)
        return {file.name: file.read_bytes() for file in (Path(name) / "state").iterdir()}


@of_folder("signed state")
def damaged_state(rng: random.Random, folder: Path) -> None:
    """A file of a saved state is damaged; most times the manifest that signs it is written anew."""
    files = dict(_state_files())
    name = rng.choice(sorted(files))
    damage = damaged_json if name.endswith(".json") else damaged_bytes
    files[name] = damage(files[name], rng)
    if not name.startswith("manifest") and rng.random() < 0.8:
        signed = json.loads(files["manifest.json"])
        signed["files"][name] |= {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        files["manifest.json"] = json.dumps(signed).encode()
    for file, data in files.items():
        written(folder, f"state/{file}", data)
    with contextlib.suppress(MooringError):
        load_tree(folder / "state")


@of_folder("state looked at")
def damaged_view(rng: random.Random, folder: Path) -> None:
    """The files of a state of which parts are read when they are asked for."""
    files = dict(_state_files())
    name = rng.choice(("tree.json", "tensors.safetensors"))
    files[name] = (damaged_json if name == "tree.json" else damaged_bytes)(files[name], rng)
    with contextlib.suppress(ValueError):
        read_all(view_tree(files["tree.json"], written(folder, "tensors", files["tensors.safetensors"])))


@cache
def safetensors_files() -> tuple[bytes, ...]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "x.safetensors"
        save_file(
            {"a.weight": torch.randn(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}, file, {"format": "pt"}
        )
        return (file.read_bytes(),)


@of_bytes("weights.safetensors", safetensors_files)
def read_safetensors(data: bytes, folder: Path) -> None:
    with contextlib.suppress(MooringError):
        read_state_dict(written(folder, "weights.safetensors", data))


@cache
def torch_files() -> tuple[bytes, ...]:
    files = []
    for content, zipped in (
        ({"state_dict": {"a": torch.ones(3)}}, True),
        ({"model": {"a": torch.ones(3)}, "epoch": 3}, False),
        ({"a": torch.ones(3), "path": Path("x")}, True),  # asks for a global that is not allowed
    ):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=zipped)
        files.append(stream.getvalue())
    return tuple(files)


@of_bytes("weights.pth", torch_files)
def read_torch(data: bytes, folder: Path) -> None:
    with contextlib.suppress(MooringError):
        read_state_dict(written(folder, "weights.pth", data))


@cache
def npz_files() -> tuple[bytes, ...]:
    files = []
    for compressed in (False, True):
        stream = io.BytesIO()
        save = np.savez_compressed if compressed else np.savez
        save(stream, features=np.eye(2, 5, dtype=np.float32), names=np.asarray(CLASSES))
        files.append(stream.getvalue())
    return tuple(files)


@of_bytes("features.npz", npz_files)
def read_npz(data: bytes, folder: Path) -> None:
    file = written(folder, "features.npz", data)
    with contextlib.suppress(MooringError):
        features = class_text_features(str(file), CLASSES, CLASSES, ["{name}"], folder)
        assert features.shape[0] == 2 and bool(features.isfinite().all())


@cache
def class_tables() -> tuple[bytes, ...]:
    return b"class,name\na,apple\nb,a pear\n", b"a\t0\r\nb\t1\r\n", b'"a","1"\n"b","0"\n'


@of_bytes("class table", class_tables)
def read_class_table(data: bytes, folder: Path) -> None:
    file = written(folder, "classes.csv", data)
    with contextlib.suppress(MooringError):
        readable_names(CLASSES, file)
    with contextlib.suppress(MooringError):
        assert all(0 <= index < 2 for index in class_indices(CLASSES, 2, file))


@cache
def metrics_files() -> tuple[bytes, ...]:
    line = '{"kind": "%s", "step": %d, "epoch": 0, "values": {"loss": 1.5, "x": "nan"}}\n'
    return ((line % ("train", 1) + line % ("val", 2) + line % ("note", 3)).encode(),)


@of_bytes("metrics.jsonl", metrics_files)
def read_metrics_log(data: bytes, folder: Path) -> None:
    with contextlib.suppress(MooringError):
        read_metrics(written(folder, "metrics.jsonl", data))


@of_bytes(
    "records.jsonl",
    lambda: (b'{"run": "a", "role": "result", "method": "tes", "shots": null}\n',),
    damaged_json,
)
def read_comparison(data: bytes, folder: Path) -> None:
    written(folder, "records.jsonl", data)
    with contextlib.suppress(MooringError):
        read_records(folder)


# ---------------------------------------------------------------- run folders


@cache
def trained_run() -> Path:
    """A small finished run; kept for the life of the process."""
    import atexit
    import tempfile

    root = Path(tempfile.mkdtemp(prefix="mooring-fuzz-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for label in CLASSES:
        for number in range(6):
            stream = io.BytesIO()
            pixels(number + 100 * ord(label), 32, 32).save(stream, "PNG")
            written(root, f"photos/{label}/{number}.png", stream.getvalue())
    words = [
        "train", f"data={root / 'photos'}", f"out={root / 'run'}", "data.source=torch", "data.workers=1",
        "method=dr_tune", "method.bank_size=4", "model.name=resnet10t", "model.weights=none", "train.epochs=1",
        "train.batch_size=4", "train.image_size=32", "train.eval_size=32", "train.device=cpu",
        "report.progress=quiet", "report.plots=false", "report.tensorboard=false",
    ]  # fmt: skip
    assert command(words) == 0
    return root / "run"


def command(words: Sequence[str]) -> int:
    """Runs the command line in this process; the exit code, or the error that got out of it."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            app(list(words), standalone_mode=False)
        except SystemExit as end:
            return int(end.code or 0) if isinstance(end.code, int | None) else 1
        except Exception as err:
            if type(err).__name__ == "Exit":  # typer's
                return int(err.exit_code)  # type: ignore[attr-defined]
            if type(err).__module__.startswith("click"):  # a word that is no option's value
                return 2
            raise
    return 0


@of_folder("run folder")
def damaged_run(rng: random.Random, folder: Path) -> None:
    """One file of a run is damaged, then each command that reads runs looks at it."""
    source = trained_run()
    run = folder / "run"
    shutil.copytree(source, run)
    victim = written(folder, "victim", b'{"kind": "note", "step": 0, "epoch": 0, "values": {}}\n' * 9)
    files = [file for file in sorted(run.rglob("*")) if file.is_file() and "tensorboard" not in file.parts]
    small = [file for file in files if file.stat().st_size < 1 << 16]
    for file in rng.sample(small if rng.random() < 0.8 else files, rng.randint(1, 2)):
        data = file.read_bytes()
        match rng.randrange(11):
            case 0:
                file.unlink()
            case 1:
                file.unlink()
                file.mkdir()
            case 2:
                file.write_bytes(b"")
            case 8:
                file.unlink()
                os.mkfifo(file)
            case 9:
                file.unlink()
                file.symlink_to(rng.choice(("/dev/zero", "/dev/tty", "/proc/self/mem", "/nowhere")))
            case 10:
                file.unlink()
                file.symlink_to(victim)
            case 3 | 4 | 5 if file.suffix == ".json":
                file.write_bytes(damaged_json(data, rng))
            case _:
                file.write_bytes(damaged_bytes(data, rng))
    for words in rng.sample(
        (
            ["info", str(run)],
            ["eval", str(run)],
            ["predict", str(run), str(source.parent / "photos" / "a")],
            ["train", "--resume", str(run), "report.progress=quiet", "report.plots=false"],
        ),
        2,
    ):
        code = command(words)
        assert code in (0, 2, 130), f"{words}: exit code {code}"
        assert victim.stat().st_size == 9 * 54, f"{words} wrote to a file outside the run"
