"""What has to be equal for a run to continue bit for bit, and what is not."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mooring import __version__
from mooring.config.method_settings import CombinedSettings
from mooring.models.encoder import LOCAL_DIR
from mooring.report.environment import cpu_model, package_versions
from mooring.train.deepspeed_config import given_settings
from mooring.train.inputs import MEASURED, PATHS

if TYPE_CHECKING:
    from mooring.train.engine import Engine

# Settings that may differ between the two parts of a run without changing what is computed.
_FREE = frozenset({"out", "resume", "allow_inexact", "checkpoint", "report"})
_FREE_KEYS = frozenset({
    "data.workers",  # decoding order does not depend on it
    "backend.timeout_minutes", "backend.sharded_loading",
    "health.spike", "health.hang_after", "health.hang_after_slow", "health.hang_abort", "health.compare_banks_every",
})  # fmt: skip
_HARMLESS = frozenset({"Python"})


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as it was when the state was saved.

    Attributes:
        name: what it is: a version, ``device``, ``data``, or a dotted setting.
        saved, now: the two values, in words.
        breaks: whether the rest of the run may come out different.
    """

    name: str
    saved: str
    now: str
    breaks: bool

    def __str__(self) -> str:
        return f"{self.name}: saved {self.saved}, now {self.now}"


def run_facts(engine: Engine) -> dict[str, Any]:
    """What the arithmetic of a run depends on beside its state, as JSON values."""
    return {
        "environment": _environment(engine),
        "data": engine.parts.manifest.digest,
        "inputs": engine.parts.inputs,
        "config": _settings(engine),
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What differs between two ``run_facts``, in a fixed order.

    Raises:
        ValueError: ``saved`` is not of this form.
    """
    found: list[Difference] = []
    try:
        pairs = [(saved["environment"], now["environment"])]
        pairs.append(({"data": saved["data"][:12]}, {"data": now["data"][:12]}))
        pairs.append((_inputs(saved, now), _inputs(now, saved)))
        pairs.append((saved["config"], now["config"]))
        harmless = _HARMLESS | _later_policy(saved["config"], now["config"])
        for before, after in pairs:
            for name in dict.fromkeys([*after, *before]):
                old, new = (str(each.get(name, "absent")) for each in (before, after))
                if old != new:
                    found.append(Difference(name, old, new, name not in harmless))
    except (KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"{type(err).__name__}: {err}") from err
    return found


def _later_policy(saved: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """What to do about a step that is not finite, where it can be chosen anew.

    Under ``stop`` none was left out, so what was trained is what ``skip`` would have trained.
    """
    if (saved.get("health.nonfinite"), now.get("health.nonfinite")) == (repr("stop"), repr("skip")):
        return {"health.nonfinite", "health.max_skips"}
    return set()


def _inputs(facts: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, str]:
    """The beginnings of digests, without those of sets to measure on that only one of the two has."""
    return {
        name: digest[:12]
        for name, digest in facts.get("inputs", {}).items()
        if name in others.get("inputs", {}) or not name.startswith(MEASURED)
    }


def _environment(engine: Engine) -> dict[str, str]:
    device = engine.backend.device
    packages = package_versions()
    # what decodes and augments the images, what computes the weights
    used = ["torch", "timm", "numpy", "safetensors"]
    used += (
        ["pillow"] if engine.train_source.kind == "torch" else [name for name in packages if "dali" in name]
    )
    used += ["triton"] if device.type == "cuda" else []
    used += ["deepspeed"] if engine.backend.name == "deepspeed" else []
    facts = {name: packages.get(name, "absent") for name in used}
    facts["mooring"] = f"{__version__} ({source_digest()[:12]})"
    facts["Python"] = platform.python_version()
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["CUDA"] = str(torch.version.cuda)
    else:
        facts["device"] = f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()})"
        facts["CPU threads"] = str(torch.get_num_threads())
    facts["processes"] = str(engine.backend.world)
    return facts


@cache
def source_digest() -> str:
    """sha256 over the code that trains: every source file and native library of both packages.

    Of the files as they are at the first call, which the engine makes when it is built: what is changed afterwards does
    not run in this process.
    """
    total = hashlib.sha256()
    for package in ("mooring", "mooring_kernels"):
        root = Path(str(import_module(package).__file__)).parent
        for file in sorted([*root.rglob("*.py"), *root.glob("_C*.so")]):
            total.update(f"{package}/{file.relative_to(root)}\n".encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _settings(engine: Engine) -> dict[str, str]:
    """Dotted settings as text, without those that change nothing."""
    tree = {k: v for k, v in engine.config.model_dump(mode="json").items() if k not in _FREE}
    if isinstance(engine.config.method, CombinedSettings):
        parts = tree["method"]["parts"]
        tree["method"] = {part["name"]: part for part in parts} | {"name": [part["name"] for part in parts]}
    flat = dict(_flatten("", tree))
    if engine.config.health.nonfinite != "skip":
        del flat["health.max_skips"]
    for name in list(flat):
        section, _, key = name.partition(".")
        # of inputs, the content is compared; the extra tests are looked at when the training is over
        is_path = name in PATHS or f"{section}.{key.rpartition('.')[2]}" in PATHS
        if name in _FREE_KEYS or is_path or name.startswith("data.extra_test"):
            del flat[name]
    if engine.config.model.name.startswith(LOCAL_DIR):
        flat["model.name"] = f"{LOCAL_DIR} {engine.parts.method.encoder.architecture}"
    # what `auto` became on this machine, and what a file said
    parts = engine.parts
    further = "none"
    if parts.backend.name == "deepspeed":
        further = json.dumps(given_settings(engine.config), sort_keys=True)
    return flat | {
        "train.device": str(parts.backend.device),
        "backend.name": parts.backend.name,
        "backend.deepspeed_config": further,
        "train.precision": parts.precision,
        "optimizer.implementation": type(parts.optimizer).__qualname__,
        "data.source": parts.train_source.kind,
    }


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, repr(value)
