"""Generated data sets of the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_cases import odd_files, write, write_splits

from mooring.data.manifest import Manifest
from mooring.data.scan import scan


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train|test/class/image``: 3 classes, 10 + 3 images each."""
    return write_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="session")
def manifest(folder: Path) -> Manifest:
    return scan(folder).manifest


@pytest.fixture(scope="session")
def odd_manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Every readable kind of file, in two classes."""
    root = tmp_path_factory.mktemp("odd")
    names = list(odd_files().items())
    write(root, {f"{'ab'[i % 2]}/{name}": data for i, (name, data) in enumerate(names)})
    return scan(root).manifest
