"""Encoders whose pretrained parameters are read one by one and divided, beside those that are loaded as always."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from mooring.config.method_settings import FineTuneSettings
from mooring.config.schema import RunConfig
from mooring.distributed import Ranks
from mooring.methods.registry import build_method
from mooring.models.encoder import build_encoder
from mooring.models.head import build_head
from mooring.models.partition import is_divided
from mooring.train.deepspeed_backend import DeepSpeedBackend
from mooring.train.engine import Engine


def built(**tables: Any) -> dict[str, Any]:
    """The run's first weights and logits once it is handed to its backend, and what of the encoder lies here."""
    with Engine.build(RunConfig.model_validate(tables)) as engine:
        in_parts = engine.parts.in_parts
        engine.prepare()
        parameters = list(engine.method.encoder.parameters())
        engine.method.eval()
        return {
            "in_parts": in_parts,
            "divided": all(is_divided(p) for p in parameters),
            "held": sum(p.ds_tensor.numel() for p in parameters),
            "elements": sum(p.ds_numel for p in parameters),
            "weights": {name: tensor.clone() for name, tensor in engine.backend.weights().items()},
            "logits": engine.backend.predict(torch.ones(2, 3, 32, 32)).detach(),
        }


def memory_of_loading(name: str, file: str, *, in_parts: bool) -> dict[str, int]:
    """Bytes of this process's own memory that loading and dividing a model takes, at the worst moment and after it."""
    config = RunConfig.model_validate({"data": "nowhere", "backend": {"zero_stage": 3}})
    device = torch.device("cpu")
    backend = DeepSpeedBackend(config, device, "fp32", Ranks.here())
    with torch.device("meta"):
        build_encoder("test_vit", weights="none")  # imports what tensors without storage need
    before = own_memory()
    with PeakMemory() as peak:
        encoder = build_encoder(name, weights=file, deferred=in_parts)
        head = build_head(encoder.feature_dim, 3)
        method = build_method(FineTuneSettings(), encoder, head)
        if in_parts:
            backend._load_in_parts(method)
        else:
            backend._deepspeed.zero.Init(module=encoder.model, config_dict_or_path=backend.settings)
    return {"peak": peak.bytes - before, "after": own_memory() - before}


def own_memory() -> int:
    """Bytes resident that belong to no file: pages of a file can be dropped at any time."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class PeakMemory:
    """The largest ``own_memory`` inside, looked at by a thread."""

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, own_memory())

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = max(self.bytes, own_memory())
