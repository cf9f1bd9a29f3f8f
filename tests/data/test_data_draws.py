"""Augmentation descriptions, the numbers drawn for them, and the order of an epoch."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mooring.data.augment import (
    Augmentation,
    CentreCrop,
    ColourJitter,
    ModelInput,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    evaluation,
    preset,
)
from mooring.data.draws import Draws, draw, words
from mooring.data.order import EpochOrder
from mooring.data.render import render, tone_curve
from mooring.errors import DataError

MODEL = ModelInput(size=64, crop_pct=0.9)
ALL = [evaluation(MODEL), *(preset(name, MODEL) for name in ("light", "standard", "strong"))]
IDS = ["evaluation", "light", "standard", "strong"]
FROZEN = {
    "window": [[14, 2, 71, 49], [6, 10, 66, 84]],
    "flip": [False, False],
    "gain": [0.7699, 1.5412],
    "order": [1, 5, 2, 3, 6, 7, 4, 0],
}
rng = np.random.default_rng(0)
SIZES = rng.integers(1, 500, (40, 2))


def fields(draws: Draws) -> dict[str, np.ndarray]:
    return {name: getattr(draws, name) for name in Draws.__slots__}


def equal(a: Draws, b: Draws) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(fields(a).values(), fields(b).values(), strict=True))


@pytest.mark.parametrize("augment", ALL, ids=IDS)
def test_a_description_survives_json(augment: Augmentation) -> None:
    again = Augmentation.from_json(json.loads(json.dumps(augment.to_json())))
    assert again == augment
    assert again.fingerprint == augment.fingerprint
    assert replace(augment, flip=0.25).fingerprint != augment.fingerprint


def test_presets_and_model_configs() -> None:
    with pytest.raises(DataError, match="light, standard or strong"):
        preset("medium", MODEL)  # type: ignore[arg-type]
    config = {"input_size": (3, 256, 256), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.94}
    model = ModelInput.from_model_config(config | {"interpolation": "bilinear"}, size=128)
    assert model == ModelInput(128, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.94)
    assert ModelInput.from_model_config(config).size == 256
    with pytest.raises(DataError, match="3-channel"):
        ModelInput.from_model_config(config | {"input_size": (1, 28, 28)})


@pytest.mark.parametrize("augment", ALL, ids=IDS)
def test_a_pictures_numbers_depend_on_its_key_alone(augment: Augmentation) -> None:
    ids = np.arange(40)
    together = draw(augment, SIZES, ids, seed=3, epoch=2)
    order = rng.permutation(40)
    shuffled = draw(augment, SIZES[order], ids[order], seed=3, epoch=2)
    for name, values in fields(together).items():
        assert np.array_equal(values[order], fields(shuffled)[name]), name
    if augment.flip:
        for other in (
            draw(augment, SIZES, ids, seed=4, epoch=2),
            draw(augment, SIZES, ids, seed=3, epoch=1),
            draw(augment, SIZES, ids, seed=3, epoch=2, view=1),
            draw(augment, SIZES, ids + 40, seed=3, epoch=2),
        ):
            assert not np.array_equal(together.flip, other.flip)
            assert not np.array_equal(together.window, other.window)


def test_numbers_are_the_same_in_every_version() -> None:
    """Frozen: a resumed run must draw what the interrupted one would have drawn."""
    draws = draw(
        preset("strong", MODEL), np.array([[100, 80]] * 2), np.array([0, 7]), seed=1, epoch=3, view=1
    )
    assert draws.window.astype(int).tolist() == FROZEN["window"]
    assert draws.flip.tolist() == FROZEN["flip"]
    assert np.round(draws.gain.astype(float), 4).tolist() == FROZEN["gain"]
    requests = EpochOrder(8, 4, seed=1, shuffle=True, drop_last=True).epoch(2)
    assert [row for request in requests for row in request.rows] == FROZEN["order"]


@pytest.mark.parametrize("augment", ALL, ids=IDS)
def test_windows_lie_inside_the_picture(augment: Augmentation) -> None:
    window = draw(augment, SIZES, np.arange(40), seed=0, epoch=0).window
    top, left, bottom, right = window.T
    slack = 1e-4 * SIZES.max()  # float32 of a sum of two coordinates
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (bottom <= SIZES[:, 1] + slack).all()
    assert (right <= SIZES[:, 0] + slack).all()
    assert (bottom - top >= 1 - slack).all()
    assert (right - left >= 1 - slack).all()


def test_random_resized_crop_keeps_scale_and_ratio() -> None:
    crop = RandomResizedCrop((0.4, 1.0))
    sizes = np.tile([400, 300], (500, 1))
    window = draw(Augmentation(MODEL, crop), sizes, np.arange(500), seed=0, epoch=0).window
    height, width = window[:, 2] - window[:, 0], window[:, 3] - window[:, 1]
    area, ratio = width * height / (400 * 300), width / height
    # sides are rounded to whole pixels: each off by at most half of one
    assert ((area > 0.4 - 0.01) & (area <= 1)).all()
    assert ((ratio > 0.75 - 0.01) & (ratio < 4 / 3 + 0.01)).all()
    # mean of a uniform share, less those too large to fit: 500 draws, standard error 0.008
    assert 0.55 < area.mean() < 0.72


def test_shares_of_flips_and_erasings() -> None:
    augment = preset("strong", MODEL)
    sizes = np.tile([100, 100], (2000, 1))
    draws = draw(augment, sizes, np.arange(2000), seed=0, epoch=0)
    # four standard deviations of a binomial share of 2000
    assert abs(draws.flip.mean() - 0.5) < 4 * np.sqrt(0.25 / 2000)
    assert abs((draws.erase[:, 2] > 0).mean() - 0.25) < 4 * np.sqrt(0.1875 / 2000)
    # each of two operations is geometric with 5 in 12
    assert abs(draws.warps.mean() - (1 - (7 / 12) ** 2)) < 4 * np.sqrt(0.23 / 2000)
    inside = draws.erase[:, :2] + draws.erase[:, 2:]
    assert (inside <= MODEL.size).all()


def test_switching_a_stage_off_leaves_the_others_alone() -> None:
    strong = preset("strong", MODEL)
    plain = replace(strong, rand_augment=None, erasing=None)
    a, b = (draw(x, SIZES, np.arange(40), seed=0, epoch=0) for x in (strong, plain))
    assert np.array_equal(a.window, b.window)
    assert np.array_equal(a.flip, b.flip)


def test_zero_magnitude_changes_nothing() -> None:
    augment = Augmentation(
        MODEL,
        CentreCrop(1.0),
        jitter=ColourJitter(),
        rand_augment=RandAugment(6, 0.0),
        erasing=RandomErasing(0.0),
    )
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    draws = draw(augment, np.tile([64, 64], (20, 1)), np.arange(20), seed=0, epoch=0)
    reference = render(image, evaluation(replace(MODEL, crop_pct=1.0)), draws, 0)
    for i in range(20):
        assert tone_curve(draws, i) is None
        assert np.array_equal(render(image, augment, draws, i), reference)


def test_evaluation_is_resize_then_centre_crop() -> None:
    """Against the two-step form (timm's): one resampling of the same window, so only rounding differs."""
    side, whole = MODEL.size, round(MODEL.size / MODEL.crop_pct)
    y, x = np.mgrid[0:150, 0:200]
    smooth = np.stack([127 + 100 * np.sin(x / 9), 127 + 100 * np.cos(y / 11), (x + y) % 200], axis=2)
    image = Image.fromarray(smooth.astype(np.uint8))
    model = replace(MODEL, crop_pct=side / whole)
    draws = draw(evaluation(model), np.array([image.size]), np.zeros(1, int), seed=0, epoch=0)
    normalised = render(image, evaluation(model), draws, 0)
    ours = 255 * (normalised * np.array(model.std) + np.array(model.mean))
    width = whole * 4 // 3
    two_steps = image.resize((width, whole), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (whole - side) // 2
    theirs = np.asarray(two_steps.crop((left, top, left + side, top + side)), dtype=np.float64)
    # crop offsets are whole pixels there, fractions here: at most half an output pixel of shift
    gradient = np.abs(np.diff(theirs, axis=1)).mean() + np.abs(np.diff(theirs, axis=0)).mean()
    assert np.abs(ours - theirs).mean() < 0.5 * gradient + 0.5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_every_rank_has_the_same_number_of_batches_and_each_row_comes_once(
    count: int, batch_size: int, world: int, shuffle: bool, epoch: int
) -> None:
    orders = [
        EpochOrder(count, batch_size, seed=1, shuffle=shuffle, drop_last=False, rank=rank, world=world)
        for rank in range(world)
    ]
    batches = [list(order.epoch(epoch)) for order in orders]
    assert len({len(mine) for mine in batches}) == 1
    assert len(batches[0]) == len(orders[0])
    assert all(len(request.rows) == batch_size for mine in batches for request in mine)
    rows = np.concatenate([request.rows for mine in batches for request in mine])
    assert sorted(rows[rows >= 0].tolist()) == list(range(count))
    if count >= batch_size * world:
        full = EpochOrder(count, batch_size, seed=1, shuffle=shuffle, drop_last=True, world=world)
        assert len(full) == count // (batch_size * world)
        assert all((request.rows >= 0).all() for request in full.epoch(epoch))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    def rows(seed: int, epoch: int) -> list[int]:
        order = EpochOrder(50, 50, seed=seed, shuffle=True, drop_last=True)
        return next(order.epoch(epoch)).rows.tolist()

    assert rows(0, 0) == rows(0, 0)
    assert rows(0, 0) != rows(0, 1) != rows(1, 1)


def test_more_processes_share_the_batches_of_one() -> None:
    """Global batch t holds the same rows however it is divided over ranks."""
    alone = EpochOrder(64, 8, seed=2, shuffle=True, drop_last=True)
    ranks = [EpochOrder(64, 2, seed=2, shuffle=True, drop_last=True, rank=r, world=4) for r in range(4)]
    for whole, *parts in zip(alone.epoch(1), *(order.epoch(1) for order in ranks), strict=True):
        assert np.array_equal(whole.rows, np.concatenate([part.rows for part in parts]))


def test_interleaved_ranks_share_any_part_of_a_batch() -> None:
    alone = EpochOrder(50, 12, seed=2, shuffle=True, drop_last=True)
    ranks = [
        EpochOrder(50, 4, seed=2, shuffle=True, drop_last=True, rank=r, world=3, interleaved=True)
        for r in range(3)
    ]
    for whole, *parts in zip(alone.epoch(1), *(order.epoch(1) for order in ranks), strict=True):
        for rows in (1, 2, 4):
            taken = {int(row) for part in parts for row in part.rows[:rows]}
            assert taken == set(whole.rows[: 3 * rows].tolist())


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"count": 5, "batch_size": 6}, "at most 5"),
        ({"count": 11, "batch_size": 6, "world": 2}, "at most 10"),
        ({"count": 0, "batch_size": 1}, "got none"),
        ({"count": 5, "batch_size": 0}, "batch_size >= 1"),
        ({"count": 5, "batch_size": 1, "world": 2, "rank": 2}, "rank < world"),
    ],
)
def test_an_order_that_cannot_be_is_refused(settings_: dict[str, int], says: str) -> None:
    with pytest.raises(DataError, match=says):
        EpochOrder(**settings_, seed=0, shuffle=True, drop_last=True)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**31 ^ 12345, 2**53 + 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("whole", [int, np.uint64])
def test_a_seed_is_an_exact_key(seed: int, whole: type) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = words(whole(seed), 3, 5, 7, 1, 6)
    # Philox by its definition: two key words, four counter words, the lowest first
    key, counter = np.array([seed, 3], np.uint64), np.array([0, 1, 7, 5], np.uint64)
    assert np.array_equal(got, np.random.Philox(key=key, counter=counter).random_raw(6))


@pytest.mark.parametrize("seed", [1.0, float("nan"), "1"])
def test_a_seed_that_is_no_whole_number_is_an_error(seed: object) -> None:
    with pytest.raises(TypeError):
        words(seed, 3, 5, 7, 1, 6)  # type: ignore[arg-type]
