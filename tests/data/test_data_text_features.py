"""Class-name features: prompts, the real text encoder of the PyPI package, files, the cache and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mooring.data import text_features
from mooring.data.class_names import prompts, readable_names
from mooring.data.text_features import class_text_features, too_alike
from mooring.errors import DataError

NAMES = ["apple", "fire engine", "umbrella"]
TEMPLATE = "a photo of {a} {name}"


def features(
    cache: Path, names: list[str] = NAMES, templates: tuple[str, ...] = (TEMPLATE,), text: str = "auto"
):
    return class_text_features(text, [n.replace(" ", "_") for n in names], names, templates, cache)


def test_prompts_have_the_right_article() -> None:
    assert prompts(NAMES, TEMPLATE) == [
        "a photo of an apple",
        "a photo of a fire engine",
        "a photo of an umbrella",
    ]


def test_names_come_from_folders_or_from_a_table(tmp_path: Path) -> None:
    assert readable_names(["fire_engine", "Apple"]) == ["fire engine", "Apple"]
    table = tmp_path / "names.tsv"
    table.write_text("class\tname\nn01\ttench\nn02\tgreat white shark\n", encoding="utf-8")
    assert readable_names(["n02", "n01"], table) == ["great white shark", "tench"]


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (["1", "2"], "class names that can be read; got '1', '2'"),
        (["Apple", "apple"], "a different name for each class; got apple more than once"),
        (["fire_engine", "fire engine"], "more than once"),
    ],
)
def test_names_that_say_nothing_or_the_same_are_refused(classes: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        readable_names(classes)


def test_a_table_must_name_every_class(tmp_path: Path) -> None:
    table = tmp_path / "names.csv"
    table.write_text("a,ant\n", encoding="utf-8")
    with pytest.raises(DataError, match="got none for b"):
        readable_names(["a", "b"], table)
    table.write_text("a\n", encoding="utf-8")
    with pytest.raises(DataError, match="two columns"):
        readable_names(["a"], table)


def test_the_package_gives_unit_rows_that_mean_something(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    names = ["golden retriever", "poodle", "teapot"]
    rows = features(tmp_path, names)
    assert rows.shape == (3, 384) and rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    cosines = rows @ rows.T
    assert cosines[0, 1] > cosines[0, 2] + 0.1  # two dogs are closer than a dog and a teapot
    assert too_alike(rows, names) == []
    assert too_alike(torch.stack([rows[0], rows[2], rows[0]]), names) == [("golden retriever", "teapot")]


@pytest.mark.assets
def test_the_package_agrees_with_the_embeddings_made_elsewhere(tmp_path: Path, assets: Path) -> None:
    pytest.importorskip("transformers")
    file = assets / "text" / "minilm_class_embeddings.npz"
    with np.load(file) as archive:
        names, templates = archive["tf_flowers5.names"].tolist(), archive["templates"].tolist()
        folders, given = (
            archive["tf_flowers5.folders"].tolist(),
            torch.from_numpy(archive["tf_flowers5"]).float(),
        )
    assert all("{}" in template for template in templates)
    ours = class_text_features(
        "auto", folders, names, [t.replace("{}", "{name}") for t in templates], tmp_path
    )
    theirs = class_text_features(f"{file}:tf_flowers5", folders, names, (), tmp_path)
    assert given.shape == (len(templates), len(names), 384)
    assert (ours * theirs).sum(1).min() > 0.999


def test_computed_once_and_again_when_a_name_or_template_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    asked: list[list[str]] = []

    def encode(where: Path, texts: list[str]) -> torch.Tensor:
        asked.append(list(texts))
        return torch.tensor([[float(len(text)), 1.0 + i] for i, text in enumerate(texts)])

    monkeypatch.setattr(text_features, "encode_texts", encode)
    cache = tmp_path / "cache"
    first = features(cache, text=str(folder))
    assert torch.equal(features(cache, text=str(folder)), first) and len(asked) == 1
    features(cache, templates=("{name}!",), text=str(folder))
    features(cache, names=["pear", *NAMES[1:]], text=str(folder))
    features(cache, names=NAMES[::-1], text=str(folder))
    (folder / "model.safetensors").write_bytes(b"other weights")
    features(cache, text=str(folder))
    assert len(asked) == 5
    both = features(cache, templates=(TEMPLATE, "{name}"), text=str(folder))
    units = [
        torch.nn.functional.normalize(encode(folder, prompts(NAMES, t)), dim=1) for t in (TEMPLATE, "{name}")
    ]
    torch.testing.assert_close(both, torch.nn.functional.normalize(units[0] + units[1], dim=1))


def test_an_npz_is_matched_by_class_or_name(tmp_path: Path) -> None:
    file = tmp_path / "text.npz"
    values = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float16)
    np.savez(file, features=values, names=["umbrella", "fire engine", "apple"])
    rows = features(tmp_path, text=str(file))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    units = torch.nn.functional.normalize(torch.from_numpy(values).float(), dim=2)[:, [2, 1, 0]]
    torch.testing.assert_close(rows, torch.nn.functional.normalize(units.mean(0), dim=1))
    with pytest.raises(DataError, match="no vector for pear"):
        features(tmp_path, names=["pear", "apple"], text=str(file))
    np.savez(file, birds=values, **{"birds.names": ["a", "b", "c"]})
    with pytest.raises(DataError, match=r"FILE\.npz:SET with a set among birds"):
        features(tmp_path, text=str(file))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x93NUMPY", b"text"])
def test_a_damaged_npz_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "damaged.npz"
    file.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        features(tmp_path, text=str(file))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (np.ones((2, 4)), NAMES),  # a name too many
        (np.full((3, 4), "x"), NAMES),
        (np.zeros((3, 4)), NAMES),
        (np.full((3, 4), np.nan), NAMES),
    ],
)
def test_an_npz_without_a_usable_vector_is_refused(
    tmp_path: Path, values: np.ndarray, names: list[str]
) -> None:
    file = tmp_path / "odd.npz"
    np.savez(file, features=values, names=names)
    with pytest.raises(DataError, match=r"odd\.npz"):
        features(tmp_path, text=str(file))


@pytest.mark.parametrize("text", ["no_such_folder", "no_such.npz"])
def test_what_is_missing_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="no_such"):
        features(tmp_path, text=text)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="not a transformers text encoder"):
        features(tmp_path / "cache", text=str(tmp_path))
