from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mooring.errors import RunFolderError
from mooring.state.tree import MANIFEST, load_tree, save_tree

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.bool,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and every bit."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return a.hex() == b.hex()
    return bool(a == b)


def bytes_of(tensor: Tensor) -> list[int]:
    return (
        tensor.detach()
        .resolve_neg()
        .clone(memory_format=torch.contiguous_format)
        .reshape(-1)
        .view(torch.uint8)
        .tolist()
    )


def round_trip(tree: Any, folder: Path) -> Any:
    return load_tree(save_tree(folder, tree))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (5, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    size = math.prod(shape) * dtype.itemsize
    limit = 2 if dtype == torch.bool else 256  # any bit pattern, NaNs included
    raw = torch.randint(limit, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensor = raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    assert same(round_trip({"x": tensor}, tmp_path / "t"), {"x": tensor})


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=6)
    | st.binary(max_size=6)
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(-5, 5), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(tree=trees)
def test_any_tree_of_values(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert same(round_trip(tree, tmp_path_factory.mktemp("t") / "t"), tree)


def test_strides_and_overlaps(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tree = {
        "base": base,
        "again": base,
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "row": base[1],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 1000),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "conjugate": torch.view_as_real(torch.randn(3, dtype=torch.complex64).conj().resolve_conj()),
        "negated": torch.tensor([1 + 2j]).conj().imag,  # torch keeps it as a flag on shared memory
    }
    loaded = round_trip(tree, tmp_path / "t")
    assert same(loaded, {key: value.detach() for key, value in tree.items()})
    assert all(value.is_contiguous() and not value.requires_grad for value in loaded.values())
    assert loaded["base"] is loaded["again"]  # stored once
    loaded["row"].zero_()
    assert torch.equal(loaded["base"], base)  # other overlaps come back apart


def test_an_optimizers_state_comes_back(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.randn(3, 2)
    optimizer.step()
    state = optimizer.state_dict()
    assert same(round_trip(state, tmp_path / "t"), state)


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        (object(), "object"),
        ({1.5: 2}, "keys must be str or int"),
        ({"a": {True: 2}}, "keys must be str or int"),
        (torch.eye(2).to_sparse(), "layout"),
        (torch.tensor([1j]), "complex"),
        ({1, 2}, "set"),
    ],
)
def test_what_cannot_be_stored_is_named_with_its_place(leaf: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=says) as err:
        save_tree(tmp_path / "t", {"outer": [1, {"inner": leaf}]})
    assert "tree.outer[1].inner" in str(err.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_unless_replaced(tmp_path: Path) -> None:
    save_tree(tmp_path / "t", {"x": 1})
    with pytest.raises(RunFolderError, match="exists already"):
        save_tree(tmp_path / "t", {"x": 2})
    assert load_tree(tmp_path / "t") == {"x": 1}
    save_tree(tmp_path / "t", {"x": 2}, replace=True)
    assert load_tree(tmp_path / "t") == {"x": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_death_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    save_tree(tmp_path / "t", {"x": 1})
    (tmp_path / "t").rename(tmp_path / "t.previous")
    assert load_tree(tmp_path / "t") == {"x": 1}
    save_tree(tmp_path / "t", {"x": 2}, replace=True)
    assert load_tree(tmp_path / "t") == {"x": 2}


def test_leftovers_of_a_dead_writer_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "t.partial").mkdir()
    (tmp_path / "t.partial" / "junk").write_text("half")
    save_tree(tmp_path / "t", {"x": torch.ones(3)})
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [
        "manifest.json",
        "tensors.safetensors",
        "tree.json",
    ]
    assert not (tmp_path / "t.partial").exists()


def test_the_manifest_holds_sizes_and_hashes(tmp_path: Path) -> None:
    import hashlib

    folder = save_tree(tmp_path / "t", {"x": torch.ones(3)})
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {"tensors.safetensors", "tree.json"}
    for name, described in files.items():
        content = (folder / name).read_bytes()
        assert described == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        ("tensors.safetensors", flip, "expected sha256"),
        ("tree.json", flip, "expected sha256"),
        ("tensors.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-1]), "bytes, got"),
        ("tree.json", lambda f: f.write_bytes(b""), "expected"),
        ("tensors.safetensors", Path.unlink, "cannot be read"),
        ("tree.json", Path.unlink, "cannot be read"),
        ("manifest.json", Path.unlink, "not written to its end"),
        ("manifest.json", lambda f: f.write_text("{"), "damaged"),
        ("manifest.json", lambda f: f.write_text("[]"), "damaged"),
        ("manifest.json", lambda f: f.write_text('{"format": 1, "files": {}}'), "damaged"),
        (
            "manifest.json",
            lambda f: f.write_text(f.read_text().replace('"format": 1', '"format": 2')),
            "format",
        ),
    ],
)
def test_damage_is_found_and_named(name: str, harm: Any, says: str, tmp_path: Path) -> None:
    folder = save_tree(tmp_path / "t", {"x": torch.ones(3), "y": [1, "two"]})
    harm(folder / name)
    with pytest.raises(RunFolderError, match=says):
        load_tree(folder)


@pytest.mark.parametrize("name", [MANIFEST, "tree.json", "tensors.safetensors"])
@pytest.mark.parametrize("place", ["a pipe", "a device"])
def test_what_is_no_file_keeps_nobody_waiting(
    name: str, place: str, tmp_path: Path, no_waiting: None
) -> None:
    folder = save_tree(tmp_path / "state", {"a": torch.ones(3)})
    (folder / name).unlink()
    if place == "a pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(RunFolderError, match="not a regular file"):
        load_tree(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="absent does not exist"):
        load_tree(tmp_path / "absent")


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot save"):
        save_tree(tmp_path / "file" / "t", {"x": 1})


def test_a_full_disk_leaves_the_old_state(tmp_path: Path) -> None:
    """A real limit: the writing process may not make files beyond 64 KiB."""
    save_tree(tmp_path / "t", {"x": 1})
    code = (
        "import resource, signal, sys, torch\n"
        "from mooring.state.tree import save_tree\n"
        "from mooring.errors import RunFolderError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try: save_tree(sys.argv[1], {'x': torch.ones(100_000)}, replace=True)\n"
        "except RunFolderError as err: print('refused', err)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("refused cannot save"), done.stderr
    assert load_tree(tmp_path / "t") == {"x": 1} and [p.name for p in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1])
def test_a_killed_writer_never_leaves_half_a_state(delay: float, tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from mooring.state.tree import save_tree\n"
        "i = 0\n"
        "while True:\n"
        "    save_tree(sys.argv[1], {'i': i, 'x': torch.full((50_000,), float(i))}, replace=True)\n"
        "    print(i, flush=True)\n"
        "    i += 1\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "t")], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        finished = [0, *map(int, writer.stdout.read().split())]
    state = load_tree(tmp_path / "t")
    assert state["i"] >= finished[-1] and torch.equal(state["x"], torch.full((50_000,), float(state["i"])))
