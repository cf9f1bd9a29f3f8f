"""Any timm model as an encoder: images in, pooled features out."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mooring.models.cifar_resnet  # noqa: F401  registers what timm lacks
from mooring.config.schema import RunConfig
from mooring.errors import ConfigError, WeightsError
from mooring.models.deferred import DeferredWeights, kept_in_half, parameters_on_meta
from mooring.models.reachable import require_reachable
from mooring.models.torchvision_shim import import_timm
from mooring.models.weights import StateDict, cached_weights, fitted, load_into, read_state_dict
from mooring.parsing import parse_json
from mooring.regular_file import read_regular

timm = import_timm()
_log = logging.getLogger(__name__)

LOCAL_DIR = "local-dir:"
_FOLDER_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "model.pth")


class Encoder(nn.Module):
    """A timm model without its classifier.

    Attributes:
        model: the timm model (``num_classes=0``).
        name: the name it was asked for.
        architecture: timm's name of the architecture, without tag.
        feature_dim: D, width of the features.
        data_config: how timm wants images prepared: ``input_size`` (3, H, W), ``mean``, ``std``,
            ``interpolation``, ``crop_pct``, ``crop_mode``. The size is the one of the pretrained weights,
            or, where ``fixed_input_size``, the one asked for.
        pretrained_cfg: timm's description of the architecture's weights and input.
        model_args: the keyword arguments that rebuild the architecture (``img_size``, ...).
        fixed_input_size: whether the model takes images of ``input_size`` only.
        deferred: the values of its parameters, where they are not loaded yet; None otherwise.

    Args:
        model, name, model_args: as the attributes.
        image_size: of the training images, in pixels; None: the model's own.
        feature_dim: None: measured by one forward.
        deferred: as the attribute.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        model_args: dict[str, Any],
        image_size: int | None,
        *,
        feature_dim: int | None = None,
        deferred: DeferredWeights | None = None,
    ) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.name = name
        cfg: dict[str, Any] = dict(model.pretrained_cfg)
        self.pretrained_cfg = cfg
        self.architecture: str = cfg["architecture"]
        self.model_args = model_args
        self.fixed_input_size = bool(cfg.get("fixed_input_size", False))
        self.data_config: dict[str, Any] = dict(timm.data.resolve_model_data_config(model))
        if image_size is not None and self.fixed_input_size:
            self.data_config["input_size"] = (3, image_size, image_size)
        channels, height, width = self.data_config["input_size"]
        size = channels, image_size or height, image_size or width
        self.feature_dim = self._measured_width(size) if feature_dim is None else feature_dim
        self.deferred = deferred

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoder:
        if self.deferred is None:
            return super()._apply(fn, recurse)
        # what has no storage yet cannot be moved: it is loaded onto the device
        return super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, D] of normalised images [B, 3, H, W], as they enter timm's classifier."""
        return self.model(images)

    @torch.no_grad()
    def _measured_width(self, size: tuple[int, int, int]) -> int:
        """D as one forward shows it: timm's own attribute differs from it in some families."""
        was_training = self.training
        self.eval()
        try:
            features = self.model(torch.zeros(1, *size))
        except (AssertionError, RuntimeError, ValueError) as err:
            raise ConfigError(
                f"{self.name} cannot take images of {size[-2]}x{size[-1]} ({err}): "
                "leave train.image_size out, or take a multiple of the model's patch and window size"
            ) from err
        finally:
            self.train(was_training)
        if features.ndim != 2:
            raise ConfigError(
                f"{self.name} gives features of shape {list(features.shape)}; expected pooled [B, D]: "
                "take a model with global pooling"
            )
        return int(features.shape[1])


def encoder_of(config: RunConfig, *, weights: str | Path | None = None, deferred: bool = False) -> Encoder:
    """``build_encoder`` as a run's settings say; ``weights``: others than the run's."""
    model = config.model
    return build_encoder(
        model.name,
        weights=model.weights if weights is None else weights,
        drop_rate=model.drop_rate,
        drop_path_rate=model.drop_path_rate,
        image_size=config.train.image_size,
        deferred=deferred,
    )


def build_encoder(
    name: str,
    *,
    weights: str | Path = "auto",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    image_size: int | None = None,
    cache_dir: str | Path | None = None,
    deferred: bool = False,
) -> Encoder:
    """Builds a timm model without classifier and loads its pretrained weights.

    Args:
        name: a timm model name, with or without tag, or ``local-dir:FOLDER`` (a folder that timm's
            ``create_model`` opens, such as one written by ``mooring.models.export``).
        weights: ``auto``: Mooring's weight cache, then timm's own cache or download (for a local-dir: the
            folder's file); ``none``: random; or a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth.
        image_size: height = width in pixels of the training images; None: the model's own. Models of a
            fixed size (ViT, Swin) are built for it; for the others it is only tried out.
        cache_dir: Mooring's cache; None: ``$MOORING_CACHE`` or ``~/.cache/mooring``.
        deferred: names and shapes are checked, buffers are loaded, and parameters stay in their file, which
            ``models.deferred.materialise`` reads one by one. For a ``.safetensors`` file.

    Raises:
        ConfigError: unknown model, or an option it does not have.
        WeightsError: the weights are missing, unsafe, or for another model.
    """
    architecture, cfg, model_args = described(name)
    if image_size is not None and cfg.get("fixed_input_size", False):
        model_args["img_size"] = image_size
    drops = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    options = {key: value for key, value in drops.items() if value > 0}

    def create(pretrained: bool = False, num_classes: int = 0) -> nn.Module:
        return timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, **model_args, **options
        )

    def classifier_keys() -> set[str]:
        with torch.random.fork_rng(devices=[]):
            return set(create(num_classes=2).state_dict()) - set(create().state_dict())

    file = weights_file(name, weights, cache_dir)
    assert not deferred or file is not None  # who asks for it has looked
    try:
        with parameters_on_meta() if deferred else nullcontext():
            model = create()
    except TypeError as err:
        raise ConfigError(
            f"{architecture} does not take one of {sorted({**model_args, **options})} ({err})"
        ) from err
    except (RuntimeError, ValueError, AssertionError) as err:
        raise ConfigError(f"timm cannot build {name} with {model_args | options}: {err}") from err
    if deferred and file is not None:
        state = fitted(
            model,
            read_state_dict(file, mapped=True, keep_half=kept_in_half),
            source=str(file),
            classifier_keys=classifier_keys,
        )
        left = [key for key, buffer in model.named_buffers() if buffer.is_meta and key not in state]
        if left:
            raise ConfigError(
                f"{architecture} cannot be loaded parameter by parameter: it computes {', '.join(left)} from "
                "parameters; set backend.sharded_loading=false"
            )
        return _deferred(model, state, create, name, model_args, image_size)
    if file is not None:
        load_into(model, read_state_dict(file), source=str(file), classifier_keys=classifier_keys)
    elif str(weights) == "auto":
        model = from_timm(name, create, cached_weights(name, cache_dir))
    return Encoder(model, name, model_args, image_size)


@torch.no_grad()
def _deferred(
    model: nn.Module,
    state: StateDict,
    create: Callable[[], nn.Module],
    name: str,
    model_args: dict[str, Any],
    image_size: int | None,
) -> Encoder:
    for key, buffer in model.named_buffers():
        if key in state:
            buffer.copy_(state.pop(key))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # its width, by a forward without numbers
        shapes = Encoder(create(), name, model_args, image_size)
    deferred = DeferredWeights(state)
    return Encoder(model, name, model_args, image_size, feature_dim=shapes.feature_dim, deferred=deferred)


def described(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, pretrained_cfg and model arguments of a model, before it is built."""
    if name.startswith(LOCAL_DIR):
        return _described_folder(Path(name.removeprefix(LOCAL_DIR)))
    architecture, _, tag = name.partition(".")
    if not re.fullmatch(r"\w+", architecture) or not timm.is_model(architecture):
        known = timm.list_models()
        near = difflib.get_close_matches(architecture.lower(), known, n=5, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else f"timm {timm.__version__} knows {len(known)} names"
        raise ConfigError(
            f"model.name: timm has no model {name!r}; {hint}. "
            "All names: python -c 'import timm; print(timm.list_models())'"
        )
    cfgs = timm.models.get_arch_pretrained_cfgs(architecture)
    if tag and name not in cfgs:
        tags = sorted(cfgs)
        raise ConfigError(
            f"model.name: {architecture} has no pretrained tag {tag!r}; it has {', '.join(tags) or 'none'}"
        )
    cfg = timm.models.get_pretrained_cfg(name)
    return architecture, cfg.to_dict() if cfg is not None else {}, {}


def _described_folder(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    file = folder / "config.json"
    try:
        config = parse_json(read_regular(file))
        cfg = config.get("pretrained_cfg", config)
        architecture = config["architecture"]
    except FileNotFoundError:
        raise ConfigError(
            f"model.name: {folder} has no config.json; expected a folder in timm's format, such as a "
            "run's model/"
        ) from None
    except (OSError, ValueError, KeyError, AttributeError) as err:
        raise ConfigError(
            f"model.name: {file} is not a timm model config ({type(err).__name__}: {err})"
        ) from err
    if not timm.is_model(str(architecture)):
        raise ConfigError(
            f"model.name: {file} names the architecture {architecture!r}, which timm does not have"
        )
    return architecture, dict(cfg), dict(config.get("model_args") or {})


def weights_file(name: str, weights: str | Path, cache_dir: str | Path | None) -> Path | None:
    """The file that ``weights`` of ``build_encoder`` means, or None for random weights and for timm's own."""
    if str(weights) == "none":
        return None
    if str(weights) != "auto":
        given = Path(weights).expanduser()
        if not given.exists():
            raise WeightsError(
                f"model.weights: {weights} does not exist; expected auto, none, or a .safetensors or .pth file"
            )
        return given
    if not name.startswith(LOCAL_DIR):
        cached = cached_weights(name, cache_dir)
        return cached if cached.is_file() else None
    folder = Path(name.removeprefix(LOCAL_DIR))
    for file in _FOLDER_FILES:
        if (folder / file).is_file():
            return folder / file
    raise WeightsError(f"{folder} holds none of {', '.join(_FOLDER_FILES)}: give model.weights=FILE or none")


def from_timm(name: str, create: Callable[..., nn.Module], cached: Path) -> nn.Module:
    """A model with timm's own pretrained weights, from its cache or its download."""
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise WeightsError(
            f"timm has no pretrained weights for {name}, and {cached} does not exist: "
            "give model.weights=FILE, or model.weights=none to start from random weights"
        )
    generator = torch.get_rng_state()
    try:
        return _from_cache_or_network(cfg, create)
    except Exception as err:  # hub, network and file errors share no base class
        torch.set_rng_state(generator)
        reason = (str(err).strip() or "no message").splitlines()[0]
        raise WeightsError(
            f"no weights for {name}: {cached} does not exist, and timm could not get them "
            f"({type(err).__name__}: {reason}). Do one of these: put a safetensors file with timm's keys "
            "there; set model.weights=FILE; on a machine with network run once  "
            f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\"; "
            "or set model.weights=none for random weights"
        ) from err


def _from_cache_or_network(cfg: Any, create: Callable[..., nn.Module]) -> nn.Module:
    """timm's pretrained model: from the hub's cache without asking the network, else downloaded.

    The hub's client asks its server about every file, cached or not, and tries again for about a minute
    where nobody answers: so the cache is read in its offline mode, and a download starts only where the
    server can be reached.

    Raises:
        OSError: the server cannot be reached.
        Exception: whatever timm or the hub raise.
    """
    from huggingface_hub import constants

    if not cfg.hf_hub_id:  # a plain URL: torch looks into its own cache, and asks once
        return create(pretrained=True)
    generator = torch.get_rng_state()
    was_offline = constants.HF_HUB_OFFLINE
    try:
        with _quiet_hub():
            constants.HF_HUB_OFFLINE = True
            try:
                return create(pretrained=True)
            except Exception:
                if was_offline:
                    raise
            finally:
                constants.HF_HUB_OFFLINE = was_offline
            torch.set_rng_state(
                generator
            )  # the head's random numbers do not depend on where weights come from
            require_reachable(constants.ENDPOINT)
            _log.info("downloading the weights of %s", cfg.hf_hub_id)
            return create(pretrained=True)
    finally:
        constants.HF_HUB_OFFLINE = was_offline


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keeps the retry lines of the hub's client off the screen; what matters is in the error."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
