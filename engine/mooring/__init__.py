"""Mooring fine-tunes pretrained vision models without losing what they already know.

    from mooring import Engine, RunConfig

    engine = Engine.build(RunConfig(data="photos"))
    result = engine.fit()

Names are loaded at first use: ``import mooring`` itself imports neither torch nor timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mooring.config.load import load_config, to_toml
    from mooring.config.schema import RunConfig
    from mooring.data.batch import Batch, DataSource
    from mooring.data.scan import scan
    from mooring.errors import (
        ConfigError,
        DataError,
        MissingDependencyError,
        MooringError,
        RunFolderError,
        WeightsError,
    )
    from mooring.methods.bank import FeatureBank
    from mooring.methods.base import At, Method, Needs, SetupContext, StepOutput
    from mooring.train.engine import Engine
    from mooring.train.evaluate import EvalResult
    from mooring.train.inference import Predictor, load_run
    from mooring.train.results import RunPlan, RunResult, StepResult

__version__ = "0.1.0"

_HOME = {
    "mooring.config.load": ("load_config", "to_toml"),
    "mooring.config.schema": ("RunConfig",),
    "mooring.data.batch": ("Batch", "DataSource"),
    "mooring.data.scan": ("scan",),
    "mooring.errors": (
        "ConfigError",
        "DataError",
        "MissingDependencyError",
        "MooringError",
        "RunFolderError",
        "WeightsError",
    ),
    "mooring.methods.bank": ("FeatureBank",),
    "mooring.methods.base": ("At", "Method", "Needs", "SetupContext", "StepOutput"),
    "mooring.train.engine": ("Engine",),
    "mooring.train.evaluate": ("EvalResult",),
    "mooring.train.inference": ("Predictor", "load_run"),
    "mooring.train.results": ("RunPlan", "RunResult", "StepResult"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "At",
    "Batch",
    "ConfigError",
    "DataError",
    "DataSource",
    "Engine",
    "EvalResult",
    "FeatureBank",
    "Method",
    "MissingDependencyError",
    "MooringError",
    "Needs",
    "Predictor",
    "RunConfig",
    "RunFolderError",
    "RunPlan",
    "RunResult",
    "SetupContext",
    "StepOutput",
    "StepResult",
    "WeightsError",
    "__version__",
    "load_config",
    "load_run",
    "scan",
    "to_toml",
]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'mooring' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
