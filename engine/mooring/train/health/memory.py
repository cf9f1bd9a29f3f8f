"""Where the memory of a run goes, for the message when there is not enough of it."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mooring.errors import MooringError
from mooring.methods.bank import FeatureBank

if TYPE_CHECKING:
    from mooring.train.engine import Engine


class OutOfMemoryError(MooringError):
    """The device or the machine has too little memory for the run; the message names its largest parts."""


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an error means that an allocation failed, on a GPU or on the host."""
    if isinstance(err, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's CPU allocator raises a plain RuntimeError
    text = str(err)
    return isinstance(err, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "std::bad_alloc" in text
    )


def memory_parts(engine: Engine) -> dict[str, int]:
    """Bytes by part of the run, the largest first; activations as far as the device's allocator tells."""
    method = engine.method
    parameters = list(method.parameters())
    trained = [p for group in engine.optimizer.param_groups for p in group["params"]]
    held = {id(p) for p in (*parameters, *method.buffers())}
    parts = {
        "parameters and buffers": _bytes((*parameters, *method.buffers())),
        "gradients": _bytes(trained),
        f"optimizer ({type(engine.optimizer).__name__})": _bytes(
            value for state in engine.optimizer.state.values() for value in state.values()
        ),
        "frozen or key networks": _bytes(
            tensor
            for module in _hidden_modules(method)
            for tensor in (*module.parameters(), *module.buffers())
            if id(tensor) not in held
        ),
        "banks": sum(_bank_bytes(bank) for bank in banks_of(method).values()),
        "average of the weights": 0 if engine.ema is None else _bytes(_tensors(engine.ema.state_dict())),
    }
    if engine.backend.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(engine.backend.device)
        parts["activations and work space"] = max(0, peak - sum(parts.values()))
    return dict(sorted(((name, size) for name, size in parts.items() if size), key=lambda item: -item[1]))


def explain_out_of_memory(engine: Engine, err: BaseException) -> OutOfMemoryError:
    """The error to show instead of an allocator's.

    Args:
        engine: of the run.
        err: what the allocator raised.
    """
    parts = ", ".join(f"{name} {_shown(size)}" for name, size in list(memory_parts(engine).items())[:5])
    train = engine.config.train
    where = "the GPU" if engine.backend.device.type == "cuda" else "this machine"
    size = f"{train.batch_size} images of {train.image_size or engine.parts.eval_size} pixels"
    if train.batch_size > 1:
        half = max(1, train.batch_size // 2)
        parts_of = train.accumulate * train.batch_size // half
        advice = f"train.batch_size={half} train.accumulate={parts_of} makes the same step in smaller parts"
    else:
        advice = "lower train.image_size, or take a smaller model"
    reason = (str(err).strip() or type(err).__name__).splitlines()[0][:200]
    return OutOfMemoryError(
        f"{where} has too little memory for this run ({reason}). It holds: {parts}, and what a forward and backward "
        f"pass over {size} needs: {advice}; train.precision=bf16 halves activations on a GPU. "
        "The last saved state stands"
    )


def banks_of(method: nn.Module) -> dict[str, FeatureBank]:
    """Every feature bank of a method, and of the methods it is made of, by where it hangs."""
    found: dict[str, FeatureBank] = {}
    for prefix, module in method.named_modules():
        for name, value in vars(module).items():
            place = f"{prefix}.{name}".strip(".")
            if isinstance(value, FeatureBank):
                found[place] = value
            elif isinstance(value, dict):
                found |= {
                    f"{place}.{key}": bank for key, bank in value.items() if isinstance(bank, FeatureBank)
                }
    return found


def _hidden_modules(method: nn.Module) -> list[nn.Module]:
    """Networks that a method holds outside of its module tree (in tuples), each once."""
    found: dict[int, nn.Module] = {}
    for module in method.modules():
        for value in vars(module).values():
            for inner in value if isinstance(value, tuple | list) else ():
                if isinstance(inner, nn.Module):
                    found[id(inner)] = inner
    return list(found.values())


def _bank_bytes(bank: FeatureBank) -> int:
    view = bank.view()
    return _bytes((*view.fields.values(), view.labels, view.ids))


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from _tensors(branch)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _shown(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def release() -> None:
    """Gives back what a failed step still holds, so that the state can be written."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
