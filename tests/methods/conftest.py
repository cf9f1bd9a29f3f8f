"""Every method, on a CNN and on a ViT."""

from __future__ import annotations

import pytest
from method_cases import SETTINGS


@pytest.fixture(params=sorted(SETTINGS))
def method_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["cnn", "vit"])
def encoder_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)
