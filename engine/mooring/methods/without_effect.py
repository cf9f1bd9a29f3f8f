"""Settings beside which a method, or a part of it, would do nothing: refused, or said before the run."""

from __future__ import annotations

from mooring.config.concept_settings import ConceptTuningSettings
from mooring.config.daft_settings import DAFTSettings
from mooring.config.method_settings import CombinedSettings
from mooring.config.schema import RunConfig
from mooring.config.settings import Settings
from mooring.config.soft_settings import SoftFineTuningSettings
from mooring.errors import ConfigError
from mooring.methods.registry import needs_of

_OF_SOURCE_IMAGES = ("source_classes", "source_images", "source_batch_size")


def check_effect(config: RunConfig) -> list[str]:
    """What of the method has no effect beside the run's other settings, one sentence each.

    Raises:
        ConfigError: the whole method, or something that was asked for by name, would have none.
    """
    mode = config.train.batchnorm
    frozen = (needs_of(config.method).batchnorm or "frozen" if mode == "auto" else mode) == "frozen"
    notes = []
    for part in config.method.parts if isinstance(config.method, CombinedSettings) else (config.method,):
        refusal = _refused(part, config)
        if refusal is not None:
            raise ConfigError(refusal)
        notes += _noted(part, frozen)
    return notes


def _refused(method: Settings, config: RunConfig) -> str | None:
    train = config.train
    if getattr(method, "name", None) == "stoch_norm" and train.batchnorm == "frozen":
        return (
            "stoch_norm draws between batch and moving statistics, and train.batchnorm=frozen never uses those of a "
            "batch, which is plain fine-tuning: leave train.batchnorm out, set it to train, or take method=fine_tune"
        )
    if (
        isinstance(method, ConceptTuningSettings)
        and method.concept_contrast > 0
        and method.concept_start_epoch >= train.epochs
    ):
        return (
            f"method.concept_start_epoch={method.concept_start_epoch} lies behind the last of {train.epochs} epochs "
            "(they count from 0), so no concept would ever be contrasted: lower it, or set method.concept_contrast=0"
        )
    if isinstance(method, SoftFineTuningSettings) and method.source == "distill":
        given = [name for name in _OF_SOURCE_IMAGES if getattr(method, name) is not None]
        if given:
            return f"method.source=distill reads no source images: leave method.{given[0]} out, or take source=data"
    return None


def _noted(method: Settings, frozen: bool) -> list[str]:
    if isinstance(method, DAFTSettings) and method.conversion and frozen:
        return [
            "daft: its conversion prepares for batch statistics, and train.batchnorm=frozen uses none: what is left of "
            "the method is the head's start and rate; leave train.batchnorm out"
        ]
    if isinstance(method, SoftFineTuningSettings) and method.source_bn not in ("auto", "joint") and frozen:
        return [
            f"soft_fine_tuning: method.source_bn={method.source_bn} has no effect with frozen BatchNorm statistics, "
            "which source and target images share; train.batchnorm=train uses those of the batch"
        ]
    return []
