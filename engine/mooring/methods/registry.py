"""Methods by name: a fixed table, never an import path from a file."""

from __future__ import annotations

import difflib

from torch import nn

from mooring.config.method_settings import CombinedSettings, Settings
from mooring.errors import ConfigError
from mooring.methods.base import Method, Needs, Resources
from mooring.methods.bi_tuning import BiTuning
from mooring.methods.bss import BSS
from mooring.methods.co_tuning import CoTuning
from mooring.methods.combined import Combined, check_combination, merged_needs, ordered
from mooring.methods.concept_tuning import ConceptTuning
from mooring.methods.core_tuning import CoreTuning
from mooring.methods.daft import DAFT
from mooring.methods.delta import DELTA
from mooring.methods.dr_tune import DRTune
from mooring.methods.feature_distillation import FeatureDistillation
from mooring.methods.feature_map import FeatureMap
from mooring.methods.fine_tune import FineTune
from mooring.methods.l2_sp import L2SP
from mooring.methods.linear_probe import LinearProbe
from mooring.methods.lp_ft import LPFT
from mooring.methods.lwf import LwF
from mooring.methods.soft_fine_tuning import SoftFineTuning
from mooring.methods.stoch_norm import StochNorm
from mooring.methods.tes import TeS

_CLASSES: tuple[type[Method], ...] = (
    FineTune,
    LinearProbe,
    LPFT,
    DRTune,
    L2SP,
    FeatureMap,
    DELTA,
    BSS,
    StochNorm,
    LwF,
    FeatureDistillation,
    CoTuning,
    BiTuning,
    CoreTuning,
    TeS,
    ConceptTuning,
    SoftFineTuning,
    DAFT,
)
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in _CLASSES}


def method_class(name: str) -> type[Method]:
    """The class registered as ``name``.

    Raises:
        ConfigError: no such method; the nearest name is given.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"method.name: got {name!r}, expected one of {', '.join(METHODS)}{hint}")


def needs_of(settings: Settings) -> Needs:
    """What the method, or all methods together, ask the engine for.

    Raises:
        ConfigError: the methods do not combine.
    """
    if isinstance(settings, CombinedSettings):
        check_combination([part.name for part in settings.parts])
        return merged_needs([method_class(part.name).needs_of(part) for part in settings.parts])
    return method_class(str(getattr(settings, "name", ""))).needs_of(settings)


def build_method(
    settings: Settings,
    encoder: nn.Module,
    head: nn.Linear,
    *,
    label_smoothing: float = 0.0,
    resources: Resources | None = None,
) -> Method:
    """The method that ``settings`` describe, around ``encoder`` and ``head``.

    Args:
        settings: an instance of one method's ``Config``; its ``name`` chooses the class.
        encoder: pretrained, maps [B, 3, H, W] to [B, D].
        head: D -> C.
        label_smoothing: share of each target spread evenly over the classes.
        resources: what the method's ``needs_of(settings)`` asks for; None: nothing.
    """
    if isinstance(settings, CombinedSettings):
        check_combination([part.name for part in settings.parts])
        tables: dict[str, Settings] = {part.name: part for part in settings.parts}
        parts = [
            method_class(name)(
                encoder, head, tables[name], label_smoothing=label_smoothing, resources=resources
            )
            for name in ordered(list(tables))
        ]
        return Combined(
            encoder, head, settings, parts=parts, label_smoothing=label_smoothing, resources=resources
        )
    cls = method_class(str(getattr(settings, "name", "")))
    return cls(encoder, head, settings, label_smoothing=label_smoothing, resources=resources)
