"""Pretrained weights: where they come from, how a file is read safely, how they are fitted to a model."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mooring.errors import WeightsError
from mooring.models.mapped_file import map_safetensors

StateDict = dict[str, Tensor]

_SAFETENSORS = (".safetensors",)
_PICKLES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
_NESTS = ("state_dict", "model_state_dict", "model", "module", "net")
_EMA_NESTS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "encoder.", "backbone.")
# timm names a family's checkpoint conversion one of these; the fit below is strict whichever ran
_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Mooring's cache: ``cache_dir``, else ``$MOORING_CACHE``, else ``~/.cache/mooring``."""
    return Path(cache_dir or os.environ.get("MOORING_CACHE") or Path.home() / ".cache" / "mooring")


def cached_weights(name: str, cache_dir: str | Path | None = None) -> Path:
    """Where the cache keeps the weights of a timm model; the part of ``name`` after the dot is dropped."""
    return cache_folder(cache_dir) / "weights" / f"{name.partition('.')[0]}.safetensors"


def write_weights_cache(
    name: str, state_dict: Mapping[str, Tensor], cache_dir: str | Path | None = None
) -> Path:
    """Puts weights where ``weights="auto"`` finds them; a reader never sees half a file.

    Returns:
        The file written.
    """
    path = cached_weights(name, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        # clone: safetensors refuses tensors that share memory
        save_file(
            {key: value.detach().cpu().contiguous().clone() for key, value in state_dict.items()}, partial
        )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_state_dict(
    path: str | Path,
    *,
    prefer_ema: bool = False,
    mapped: bool = False,
    keep_half: Callable[[Tensor], bool] = lambda _: False,
) -> StateDict:
    """Reads a weights file without running code from it.

    Common nestings (``state_dict``, ``model``, ...) are opened and half-precision tensors become fp32.

    Args:
        path: a ``.safetensors`` file, or ``.pth``, ``.pt``, ``.bin`` (read with ``weights_only=True``).
        prefer_ema: take the averaged weights where the file holds both.
        mapped: of a safetensors file, tensors are mapped into memory: read when they are used, and no copy.
        keep_half: which tensors stay in the precision of the file.

    Raises:
        WeightsError: no such file, an unknown or broken format, a pickle with other things than
            tensors (its globals are named), or no tensors inside.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing"
        raise WeightsError(
            f"weights must be a file; got {path}, which is {kind}: give a .safetensors or .pth file"
        )
    if path.suffix in _SAFETENSORS:
        content: Any = _read_safetensors(path, mapped)
    elif path.suffix in _PICKLES:
        content = _read_pickle(path)
    else:
        raise WeightsError(
            f"weights must be one of {', '.join(_SAFETENSORS + _PICKLES)}; got {path.name}: "
            "convert the file first"
        )
    for nests in (_EMA_NESTS + _NESTS if prefer_ema else _NESTS + _EMA_NESTS, _NESTS):
        for key in nests:
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise WeightsError(f"{path} holds a {type(content).__name__}; expected named tensors (a state dict)")
    strangers = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strangers or not content:
        shown = ", ".join(strangers[:8]) or "no entries"
        raise WeightsError(
            f"{path} is not a state dict: expected only tensors, got {shown}: save model.state_dict() alone"
        )
    return {key: value if keep_half(value) else _single_precision(value) for key, value in content.items()}


def _read_safetensors(path: Path, mapped: bool) -> StateDict:
    try:
        return map_safetensors(path) if mapped else load_file(path)
    except (SafetensorError, OSError, ValueError) as err:
        raise WeightsError(
            f"{path} is not a readable safetensors file ({err}): copy or download it again"
        ) from err


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        names = _unsafe_globals(path)
        if not names:
            raise WeightsError(f"{path} is not a readable torch file ({_first_line(err)})") from err
        raise WeightsError(
            f"{path} is refused: besides tensors its pickle needs {', '.join(names)}, and loading "
            "those could run any code. Where you trust the file, load it yourself "
            "and save model.state_dict() as .safetensors"
        ) from err
    except (
        Exception
    ) as err:  # on broken bytes torch's reader fails with struct.error, EOFError, KeyError, ...
        raise WeightsError(
            f"{path} is not a readable torch file ({_first_line(err)}): copy it again"
        ) from err


def _unsafe_globals(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, pickle.UnpicklingError):
        return _legacy_globals(path)


def _legacy_globals(path: Path) -> list[str]:
    """Globals of pickles that are not in torch's zip format; parses opcodes, runs nothing."""
    names: set[str] = set()
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            while True:  # torch's old format is a row of pickles, then raw storage
                for opcode, argument, _ in pickletools.genops(file):
                    if opcode.name == "GLOBAL":
                        names.add(str(argument).replace(" ", "."))
                    elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                        names.add(".".join(strings[-2:]))
                    elif isinstance(argument, str):
                        strings.append(argument)
    except Exception:  # where the pickles end; the names found so far stand
        return sorted(name for name in names if not name.startswith(("torch.", "collections.OrderedDict")))


def _first_line(err: BaseException) -> str:
    # torch puts the reason of a refusal after a paragraph of advice to load unsafely, which is not ours
    reason = re.search(r"WeightsUnpickler error: *(.+)", str(err))
    return reason[1] if reason else (str(err).strip() or type(err).__name__).splitlines()[0]


def _single_precision(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() and value.dtype != torch.float32 else value


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    classifier_keys: Callable[[], set[str]] = set,
) -> None:
    """Loads weights into a timm model built without classifier: all of them, or none.

    Args:
        model, state, source, classifier_keys: as for ``fitted``.

    Raises:
        WeightsError: keys or shapes do not fit; the message lists every one. The model is unchanged.
    """
    model.load_state_dict(fitted(model, state, source=source, classifier_keys=classifier_keys), strict=True)


def fitted(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    classifier_keys: Callable[[], set[str]] = set,
) -> StateDict:
    """The model's state dict with the values that these weights have.

    Wrapper prefixes (``module.`` ...) are dropped, timm's own conversion for the family runs (foreign key
    names, position embeddings resampled to the model's grid), and classifier entries are left out. Of the model
    only names and shapes are read.

    Args:
        model: a timm model with ``num_classes=0``.
        state: named tensors.
        source: file or place they come from, for the message.
        classifier_keys: gives the names that the same model has only when it has a classifier; called
            only where names are left over.

    Raises:
        WeightsError: keys or shapes do not fit; the message lists every one.
    """
    own = model.state_dict()
    found = _without_prefix(dict(state), own)
    failure = ""
    try:
        found = _converted(found, model)
    except Exception as err:  # a conversion for another family may fail in any way; the lists below tell more
        failure = f" (timm's conversion failed: {type(err).__name__}: {_first_line(err)})"
    heads = _classifier_names(model)
    found = {
        key: value
        for key, value in found.items()
        if key in own or not key.startswith(tuple(f"{h}." for h in heads))
    }
    left_over = [key for key in found if key not in own]
    if left_over:
        of_classifier = classifier_keys()
        found = {key: value for key, value in found.items() if key in own or key not in of_classifier}
    problems = _differences(own, found)
    if problems or failure:
        architecture = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
        raise WeightsError(
            f"{source} does not fit {architecture}{failure}: " + "; ".join(problems) + ". "
            f"Give weights of {architecture}, name the model they belong to, or set model.weights=none"
        )
    return found


def _without_prefix(state: StateDict, own: Mapping[str, Tensor]) -> StateDict:
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in state) and not any(
                key.startswith(prefix) for key in own
            ):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                stripped = bool(state)
    return state


def _converted(state: StateDict, model: nn.Module) -> StateDict:
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture", "")
    from mooring.models.torchvision_shim import import_timm

    timm = import_timm()
    modules = [type(model).__module__]
    if timm.is_model(architecture):
        modules.insert(0, timm.model_entrypoint(architecture).__module__)
    for module in modules:
        for name in _FILTERS:
            convert = getattr(sys.modules.get(module), name, None)
            if convert is None:
                continue
            takes_model = convert.__code__.co_argcount > 1
            return dict(convert(dict(state), model) if takes_model else convert(dict(state)))
    return state


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    # BatchNorm counts its batches since torch 0.4.1; files from before lack the counter and load fine
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in own]
    shapes = [
        f"{key} expected {list(own[key].shape)} got {list(given[key].shape)}"
        for key in own
        if key in given and own[key].shape != given[key].shape
    ]
    named = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
    return [f"{what} ({len(keys)}): {', '.join(keys)}" for what, keys in named if keys]
