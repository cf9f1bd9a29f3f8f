from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mooring.errors import WeightsError
from mooring.models.encoder import Encoder, build_encoder
from mooring.models.weights import cached_weights, read_state_dict, write_weights_cache

NAME = "test_resnet"


def full_state(num_classes: int = 7, name: str = NAME, seed: int = 3) -> dict[str, Tensor]:
    """State of a whole timm model, classifier included, with nothing at its initial value."""
    import timm

    model = timm.create_model(name, num_classes=num_classes)
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + 5
        for key, value in model.state_dict().items()
    }


def holds(encoder: Encoder, state: dict[str, Tensor]) -> bool:
    own = encoder.model.state_dict()
    return set(own) <= set(state) and all(torch.equal(own[key], state[key]) for key in own)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return full_state()


WRAPPERS: dict[str, Any] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"lr": 0.1}},
    "model": lambda s: {"model": s, "args": None},
    "module.": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "nested": lambda s: {"model": {"state_dict": s}},
    "only_ema": lambda s: {"model_ema": s},
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_common_nestings_of_a_torch_file(
    wrapper: str, suffix: str, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    file = tmp_path / f"w{suffix}"
    torch.save(WRAPPERS[wrapper](state), file)
    assert holds(build_encoder(NAME, weights=file), state)


def test_features_are_what_the_files_classifier_reads(tmp_path: Path) -> None:
    import timm

    whole = timm.create_model("test_vit", num_classes=7).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    encoder = build_encoder("test_vit", weights=tmp_path / "w.pth").eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(whole.get_classifier()(encoder(images)), whole(images))


def test_averaged_weights_are_taken_where_asked(tmp_path: Path, state: dict[str, Tensor]) -> None:
    averaged = {key: value + 1 for key, value in state.items()}
    file = tmp_path / "w.pth"
    torch.save({"state_dict": state, "state_dict_ema": averaged}, file)
    assert all(torch.equal(v, state[k]) for k, v in read_state_dict(file).items())
    assert all(torch.equal(v, averaged[k]) for k, v in read_state_dict(file, prefer_ema=True).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(dtype: torch.dtype, tmp_path: Path, state: dict[str, Tensor]) -> None:
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    save_file(stored, tmp_path / "w.safetensors")
    loaded = read_state_dict(tmp_path / "w.safetensors")
    for key, value in loaded.items():
        assert value.dtype == (torch.float32 if state[key].is_floating_point() else torch.int64)
        assert torch.equal(value, stored[key].to(value.dtype))


class Payload:
    """Something a pickle could run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("never-created"),))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_its_globals_are_named(
    legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Payload()}, "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match="Path") as err:
        read_state_dict("w.pth")
    assert "touch" in str(err.value) or "getattr" in str(err.value)
    assert not Path("never-created").exists()


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(WeightsError):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("w.safetensors", b"not a header", "not a readable safetensors"),
        ("w.safetensors", b"", "not a readable safetensors"),
        ("w.pth", b"", "not a readable torch file"),
        ("w.pth", b"junk", "not a readable torch file"),
        ("w.txt", b"junk", "must be one of"),
        (None, b"", "which is nothing"),
    ],
)
def test_a_broken_file_is_named(name: str | None, content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / (name or "absent.pth")
    if name is not None:
        file.write_bytes(content)
    with pytest.raises(WeightsError, match=says) as err:
        read_state_dict(file)
    assert file.name in str(err.value)


def test_a_file_that_is_no_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="epoch, lr"):
        read_state_dict(tmp_path / "w.pth")


def test_all_differences_come_in_one_error_and_nothing_is_loaded(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    wrong = dict(state)
    gone = [key for key in wrong if key.startswith("layer2.0.bn") and "num_batches" not in key]
    for key in gone:
        del wrong[key]
    wrong["stranger.weight"] = torch.zeros(2)
    wrong["layer1.0.conv1.weight"] = torch.zeros(1, 2, 3, 3)
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as err:
        build_encoder(NAME, weights=tmp_path / "w.safetensors")
    message = str(err.value)
    assert gone and all(key in message for key in gone)
    assert f"missing ({len(gone)})" in message and "unexpected (1): stranger.weight" in message
    assert "wrong shape (1): layer1.0.conv1.weight expected" in message and "got [1, 2, 3, 3]" in message


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    save_file(full_state(name="test_vit"), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="does not fit test_resnet") as err:
        build_encoder(NAME, weights=tmp_path / "w.safetensors")
    assert "pos_embed" in str(err.value) and "layer1.0.conv1.weight" in str(err.value)


def test_files_from_before_batch_counting_load(tmp_path: Path, state: dict[str, Tensor]) -> None:
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "w.safetensors")
    own = build_encoder(NAME, weights=tmp_path / "w.safetensors").model.state_dict()
    assert all(torch.equal(own[key], old[key]) for key in own if key in old)


def test_auto_finds_the_cache(tmp_path: Path, state: dict[str, Tensor]) -> None:
    written = write_weights_cache(f"{NAME}.r160_in1k", state, cache_dir=tmp_path)
    assert written == cached_weights(NAME, tmp_path) == tmp_path / "weights" / f"{NAME}.safetensors"
    assert [file.name for file in written.parent.iterdir()] == [written.name]
    assert holds(build_encoder(NAME, cache_dir=tmp_path), state)


def test_the_environment_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOORING_CACHE", str(tmp_path))
    assert cached_weights(NAME).is_relative_to(tmp_path)


def test_auto_without_any_weights_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(WeightsError) as err:
        build_encoder("resnet18", cache_dir=tmp_path)
    message = str(err.value)
    assert str(tmp_path / "weights" / "resnet18.safetensors") in message
    assert (
        "model.weights=FILE" in message
        and "model.weights=none" in message
        and "create_model('resnet18'" in message
    )


def test_none_is_random_and_seeded() -> None:
    torch.manual_seed(1)
    first = build_encoder(NAME, weights="none").model.state_dict()
    torch.manual_seed(1)
    second = build_encoder(NAME, weights="none").model.state_dict()
    torch.manual_seed(2)
    third = build_encoder(NAME, weights="none").model.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], third[key]) for key in first)


def test_a_classifier_of_several_layers_is_left_out(tmp_path: Path) -> None:
    """LeViT's classifier is a BatchNorm and a linear layer: more names than timm lists."""
    state = full_state(name="levit_128s")
    save_file(state, tmp_path / "w.safetensors")
    encoder = build_encoder("levit_128s", weights=tmp_path / "w.safetensors")
    assert holds(encoder, state)
    assert not any(key.startswith("head") for key in encoder.model.state_dict())
