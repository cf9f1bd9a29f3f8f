"""One bounded look at a server, and weights from the hub's cache without any."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from huggingface_hub import constants
from torch import nn

from mooring.errors import WeightsError
from mooring.models import encoder
from mooring.models.encoder import build_encoder
from mooring.models.reachable import require_reachable


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[int]:
    """Port of a server that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def test_a_server_that_answers_is_reachable(server: int) -> None:
    require_reachable(f"http://127.0.0.1:{server}/some/path")


def test_a_server_that_does_not_is_named(closed_port: int) -> None:
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1 cannot be reached"):
        require_reachable(f"https://127.0.0.1:{closed_port}")


def test_only_the_proxy_has_to_answer(server: int, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server}")
    require_reachable(f"https://behind.invalid:{closed_port}")


def test_an_unreachable_hub_is_not_asked_for_weights(
    closed_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Neither its client's retries nor a download start; the message names the host that the client would ask."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    asked: list[bool] = []
    create = encoder.timm.create_model

    def spy(name: str, *, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            asked.append(constants.is_offline_mode())
        return create(name, pretrained=pretrained, **options)

    monkeypatch.setattr(encoder.timm, "create_model", spy)
    with pytest.raises(WeightsError, match=r"127\.0\.0\.1 cannot be reached.*set model\.weights=FILE"):
        build_encoder("resnet10t", cache_dir=tmp_path_factory.mktemp("cache"))
    assert asked == [True], "only the cache was looked at"
    assert not constants.is_offline_mode(), "the client's setting is put back"


def test_a_weights_file_that_is_not_there_is_named() -> None:
    with pytest.raises(WeightsError, match=r"model\.weights: /nope does not exist; expected auto, none, or"):
        build_encoder("resnet10t", weights="/nope")
