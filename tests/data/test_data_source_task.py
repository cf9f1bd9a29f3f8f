"""Source images: their labels are the source head's, and their rows come in any number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mooring.data.batch import Batch
from mooring.data.manifest import Manifest
from mooring.data.row_stream import RowStream
from mooring.data.source_task import class_indices, source_split
from mooring.errors import DataError


class Counted:
    """Batches of 5 consecutive ids, 3 batches an epoch; the state as a real source has it."""

    def __init__(self) -> None:
        self.next, self.read, self.closed = 0, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.next // 3
        while self.next // 3 == epoch:
            first = 5 * self.next
            self.next += 1
            self.read += 1
            ids = torch.arange(first, first + 5)
            yield Batch(ids.float().view(5, 1, 1, 1).expand(5, 3, 2, 2), ids % 4, ids)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]

    def close(self) -> None:
        self.closed += 1


def test_rows_come_in_order_across_batches_and_epochs_and_none_is_wasted() -> None:
    source = Counted()
    stream = RowStream(source)
    assert source.read == 0
    seen = []
    for rows in (2, 3, 8, 1, 13, 5):
        batch = stream.take(rows)
        assert batch.images.shape == (rows, 3, 2, 2) and batch.labels.shape == (rows,)
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.ids)
        seen += batch.ids.tolist()
    assert seen == list(range(32))
    assert source.read == 7  # 32 rows lie in 7 batches of 5


@pytest.mark.parametrize("before", [(), (2,), (5,), (2, 3, 8), (15,)])
def test_a_loaded_stream_goes_on_with_the_next_row(before: tuple[int, ...]) -> None:
    first = RowStream(Counted())
    for rows in before:
        first.take(rows)
    state = first.state_dict()
    second = RowStream(Counted())
    second.load_state_dict(state)
    assert second.state_dict() == state
    for rows in (1, 7, 4):
        assert torch.equal(first.take(rows).ids, second.take(rows).ids)
    assert first.state_dict() == second.state_dict()


def test_a_closed_stream_goes_on_where_it_stood() -> None:
    source = Counted()
    stream = RowStream(source)
    stream.take(3)
    stream.close()
    assert source.closed == 1
    assert stream.take(4).ids.tolist() == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="rows >= 1"):
        stream.take(0)


def test_a_file_says_which_class_is_which(tmp_path: Path) -> None:
    table = tmp_path / "classes.tsv"
    table.write_text("wnid\tindex\tname\nn2\t7\tb\nn1\t3\ta\nn9\t0\tunused\n")
    assert class_indices(["n1", "n2"], 8, table) == [3, 7]
    plain = tmp_path / "classes.csv"
    plain.write_text("n1,5\nn2,5\n")
    assert class_indices(["n1", "n2"], 8, plain) == [5, 5]
    for text, message in [
        ("n1,5\n", "lacks n2"),
        ("n1,5\nn2,8\n", "indices 0 to 7.*n2 -> 8"),
        ("n1,5\nn2,-1\n", "the row"),
        ("n1,5\nn2\n", "the row"),
        ("", "no rows"),
    ]:
        plain.write_text(text)
        with pytest.raises(DataError, match=message):
            class_indices(["n1", "n2"], 8, plain)
    with pytest.raises(DataError, match="cannot be read"):
        class_indices(["n1"], 8, tmp_path / "none.csv")


def test_without_a_file_the_order_is_sorted_and_numbers_are_numbers() -> None:
    assert class_indices(["b", "a", "c"], 3, None) == [1, 0, 2]
    assert class_indices([str(i) for i in (0, 1, 10, 2, *range(3, 10))], 11, None)[:4] == [0, 1, 10, 2]
    with pytest.raises(
        DataError, match=r"has 2 classes and the classifier of the weights 1000.*source_classes"
    ):
        class_indices(["a", "b"], 1000, None)


def test_images_of_the_target_are_left_out_and_a_choice_is_balanced(manifest: Manifest) -> None:
    classes = len(manifest.classes)
    whole = source_split(manifest, classes)
    plain = manifest.split("train")
    assert np.array_equal(whole.labels, plain.labels) and whole.paths == plain.paths
    without = source_split(manifest, classes, without=[plain.sha256[0], "other"])
    assert without.paths == plain.paths[1:]
    assert len({whole.digest, plain.digest, without.digest}) == 3
    few = [source_split(manifest, classes, images=2 * classes, seed=seed) for seed in (0, 0, 1)]
    assert all(np.bincount(split.labels).tolist() == [2] * classes for split in few)
    assert few[0].digest == few[1].digest
    with pytest.raises(DataError, match="every image"):
        source_split(manifest, classes, without=plain.sha256)
