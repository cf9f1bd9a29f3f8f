"""DeepSpeed's ZeRO: optimizer state, gradients and parameters divided among the ranks."""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mooring.collectives import broadcast_
from mooring.config.schema import RunConfig
from mooring.data.batch import Batch
from mooring.distributed import Ranks, init_alone
from mooring.errors import require
from mooring.methods.base import At, Method, StepOutput
from mooring.models.deferred import is_deferred, materialise
from mooring.models.partition import chunks, is_divided, whole
from mooring.train.deepspeed_config import deepspeed_config
from mooring.train.deepspeed_traffic import count_exchanges, reducing
from mooring.train.local_backend import LocalBackend
from mooring.train.optimizer_pieces import Flat, Piece, encode_pieces, redistributed, same_pieces
from mooring.train.optimizer_state import known_numbers, load_optimizer_state, optimizer_state, trained_names


class DeepSpeedBackend(LocalBackend):
    """Runs the method inside a DeepSpeed engine.

    What is divided, by ``backend.zero_stage``: 0 nothing; 1 the optimizer's state; 2 gradients too; 3 parameters too.
    The gradient is the mean over ranks. The optimizer is the run's own, over flat parts of the parameters.

    Where a phase of a method leaves parameters without a gradient (LP-FT's probe, at rate factor 0), DeepSpeed
    gives them one of zero; their optimizer state is kept at its start, as if they had had none.

    Args:
        config: of the run.
        device, precision: as ``LocalBackend``.
        ranks: all that train together, in one process group; one rank works too.

    Raises:
        ConfigError: settings that DeepSpeed cannot honour, or that contradict ours.
        MissingDependencyError: it is not installed.
    """

    name = "deepspeed"

    def __init__(self, config: RunConfig, device: torch.device, precision: str, ranks: Ranks) -> None:
        super().__init__(device, precision)
        self.ranks = ranks
        self.rank, self.world = ranks.rank, ranks.world
        self.stage = config.backend.zero_stage
        self.divided = self.stage > 0
        self.settings = deepspeed_config(config)
        self._deepspeed = _import(device)
        self._engine: Any = None
        self._limit: float | None = None
        self._resting: list[int] = []

    def prepare(self, method: Method, optimizer: Optimizer) -> None:
        super().prepare(method, optimizer)
        count_exchanges()
        if is_deferred(method):
            self._load_in_parts(method)
        _to_contiguous(method, optimizer)
        if self.world > 1:
            with torch.no_grad():
                for tensor in (*method.parameters(), *method.buffers()):
                    if not is_divided(tensor):
                        broadcast_(tensor, self.ranks, "first weights")
        self._trained_parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._names = trained_names(optimizer, method)  # DeepSpeed puts flat tensors in their place
        for parameter in method.parameters():
            # it sends parameters as bytes, in their order in memory; divided ones are flat in any case
            parameter.data = parameter.data.contiguous()
        for state in optimizer.state.values():  # fused optimizers walk both in that order
            state.update({k: v.contiguous() for k, v in state.items() if isinstance(v, Tensor)})
        if self.divided:
            optimizer.state.clear()  # of whole parameters; DeepSpeed steps flat ones
        self._module = _Forward(method)
        self._engine, *_ = self._deepspeed.initialize(
            model=self._module, optimizer=optimizer, config=self.settings, dist_init_required=False
        )
        # its hooks hold it, through objects that Python's collector cannot see into
        weakref.finalize(self, self._engine.destroy).atexit = False

    def _load_in_parts(self, method: Method) -> None:
        """Reads the encoder's parameters on rank 0, one after the other, each divided before the next is read."""
        encoder: Any = method.encoder
        init = self._deepspeed.zero.Init(config_dict_or_path=self.settings, dtype=torch.float32)
        materialise(
            encoder.model,
            encoder.deferred if self.ranks.is_first else None,
            self.device,
            # sends rank 0's values to all, keeps this rank's part, frees the rest
            lambda parameter: init._convert_to_zero_parameters([parameter]),
        )
        encoder.deferred = None

    def forward(self, batch: Batch, at: At) -> StepOutput:
        with self.autocast():
            loss = self._engine(batch, at)
        output = self._module.taken()
        output.loss = loss
        return output

    def predict(self, images: Tensor) -> Tensor:
        return self._engine(images, None)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        with reducing("gradients"):
            self._engine.backward(loss)

    def clip(self, limit: float) -> Tensor:
        """The norm of the gradient of all ranks; the step scales by it, where the run's settings say so."""
        if not self.divided:
            return super().clip(limit)
        norm = self._norm()
        return norm if isinstance(norm, Tensor) else torch.tensor(float(norm), device=self.device)

    def _norm(self) -> Any:
        zero = self._engine.optimizer
        if self.stage < 3:
            return zero.scaled_global_norm()
        from deepspeed.runtime.utils import combine_grad_norm_groups  # where stage 3's own step has it from

        zero._partition_all_parameters()
        return combine_grad_norm_groups(zero._get_norm_groups())

    def step(self) -> None:
        resting = [i for i, group in enumerate(self.optimizer.param_groups) if group["lr"] == 0.0]
        self._engine.step()
        for i in resting:
            self._reset(i)

    def discard(self) -> None:
        """DeepSpeed's own way to leave out a step whose gradient overflows: every counter and buffer is its matter."""
        if not self.divided:
            super().discard()
            return
        zero = self._engine.optimizer
        name = "scaled_global_norm" if self.stage < 3 else "_get_norm_groups"
        nothing = torch.tensor(math.nan, device=self.device)
        setattr(zero, name, lambda *_: nothing if self.stage < 3 else [nothing])
        try:
            self._engine.step()
        finally:
            delattr(zero, name)

    def gradient_norms(self) -> tuple[list[nn.Parameter], Tensor]:
        if not self.divided:
            return super().gradient_norms()
        zero = self._engine.optimizer
        norms = []
        for p in self._trained_parameters:  # one at a time: no rank has room for all
            whole_gradient = zero.get_fp32_grad_for_param(p) if self.stage == 3 else p.get_full_hp_grad()
            norms.append(whole_gradient.norm().float())
        return self._trained_parameters, torch.stack(norms)

    def _flat(self, group: int) -> list[Tensor]:
        """What the optimizer steps of one group: this rank's flat parts of its parameters, or these themselves."""
        if not self.divided:
            return list(self.optimizer.param_groups[group]["params"])
        zero = self._engine.optimizer
        if self.stage < 3:
            return [zero.single_partition_of_fp32_groups[group]]
        return [
            flat
            for flat, owner in zip(
                zero.fp32_partitioned_groups_flat, zero.sub_group_to_group_id.values(), strict=True
            )
            if owner == group
        ]

    def _reset(self, group: int) -> None:
        for flat in self._flat(group):
            for value in self.optimizer.state.get(flat, {}).values():
                if isinstance(value, Tensor):
                    value.zero_()

    # ---------------------------------------------------------------- weights and state

    def weights(self) -> dict[str, Tensor]:
        """On the CPU where parameters are divided: no GPU has room for all of them."""
        found = dict(self.method.state_dict())
        if self.stage == 3:
            names = {id(p): name for name, p in self.method.named_parameters()}
            for chunk in chunks(self.method.parameters()):
                with whole(chunk):
                    for p in chunk:
                        found[names[id(p)]] = p.detach().cpu().clone()
        return found

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """A few parameters at a time where they are divided."""
        if self.stage < 3:
            super().load_weights(weights)
            return
        names = {id(p): name for name, p in self.method.named_parameters()}
        for chunk in chunks(self.method.parameters()):
            with whole(chunk, write=True):
                for p in chunk:
                    p.copy_(weights[names[id(p)]])
                self._refresh_masters(chunk)
        persistent = self.method.state_dict()
        for name, buffer in self.method.named_buffers():
            if name in persistent:
                buffer.copy_(weights[name])

    @contextmanager
    def whole(self, module: nn.Module, *, write: bool = False) -> Iterator[None]:
        if self._engine is None:
            yield
            return
        parameters = list(module.parameters())
        with whole(parameters, write=write):
            offload = getattr(self._engine.optimizer, "parameter_offload", None) if self.stage == 3 else None
            if offload is not None:
                _remove_hooks(offload)
            try:
                yield
                if write:
                    self._refresh_masters(parameters)
            finally:
                if offload is not None:
                    offload._register_deepspeed_module(offload.module)

    @torch.no_grad()
    def _refresh_masters(self, parameters: list[nn.Parameter]) -> None:
        """Gives the fp32 parts that the optimizer steps the values that the parameters have now.

        Not by DeepSpeed's own setters: they read past the end of a parameter whose last part is padded, and do not
        know of ``round_robin_gradients``.
        """
        if not self.divided:
            return
        names = {id(p): name for name, p in self.method.named_parameters()}
        now = {names[id(p)]: p.detach().flatten() for p in parameters}
        for i in range(len(self.optimizer.param_groups)):
            for flat, pieces in zip(self._flat(i), self._pieces(i), strict=True):
                for piece in pieces:
                    if piece.name in now:
                        flat[piece.offset : piece.offset + piece.size].copy_(
                            now[piece.name][piece.start : piece.start + piece.size]
                        )

    def _pieces(self, group: int) -> list[list[Piece]]:
        """What each of ``_flat(group)`` is made of; padding is none of it."""
        zero = self._engine.optimizer
        names = {id(p): name for name, p in self.method.named_parameters()}
        if self.stage < 3:
            (flat,) = self._flat(group)
            begin = flat.numel() * dist.get_rank(zero.real_dp_process_group[group])
            found = []
            for p, place in zip(
                zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group], strict=True
            ):
                first, end = max(begin, place), min(begin + flat.numel(), place + p.numel())
                if first < end:
                    found.append(Piece(names[id(p)], first - place, end - first, first - begin))
            return [found]
        parts = []
        for sub_group, owner in zip(zero.fp16_groups, zero.sub_group_to_group_id.values(), strict=True):
            if owner != group:
                continue
            found = []
            for p in sub_group:
                _, offset, share = zero.grad_position[zero.get_param_id(p)]
                start = share * zero._get_param_partition_rank(p)
                count = min(share, p.ds_numel - start)
                if count > 0:
                    found.append(Piece(names[id(p)], start, count, offset))
            parts.append(found)
        return parts

    def state_dict(self) -> dict[str, Any]:
        if not self.divided:
            return optimizer_state(self.optimizer)
        parts = []
        for i, group in enumerate(self.optimizer.param_groups):
            numbers = {
                k: v for k, v in group.items() if k not in ("params", "lr") and isinstance(v, int | float)
            }
            states = [
                {
                    k: v.clone() if isinstance(v, Tensor) else v
                    for k, v in self.optimizer.state.get(flat, {}).items()
                }
                for flat in self._flat(i)
            ]
            pieces = [encode_pieces(of_flat) for of_flat in self._pieces(i)]
            parts.append({"numbers": numbers, "states": states, "pieces": pieces})
        return {"groups": parts, "stage": self.stage, "world": self.world}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.divided:
            load_optimizer_state(self.optimizer, state)
            return
        for i, (group, part) in enumerate(zip(self.optimizer.param_groups, state["groups"], strict=True)):
            group.update(part["numbers"])
            for flat, values in zip(self._flat(i), part["states"], strict=True):
                self._set_state(group, flat, values)

    def takes(self, state: Mapping[str, Any]) -> bool:
        if not self.divided:
            return super().takes(state)
        if (state.get("stage"), state.get("world")) != (self.stage, self.world):
            return False
        for i, part in enumerate(state["groups"]):
            if "pieces" not in part:  # of a version that did not save them
                continue
            own = [encode_pieces(pieces) for pieces in self._pieces(i)]
            if len(own) != len(part["pieces"]) or not all(map(same_pieces, own, part["pieces"])):
                return False
        return True

    def load_redistributed(self, states: Iterable[Mapping[str, Any]]) -> None:
        if not self.divided:
            super().load_redistributed(states)
            return
        targets: list[Flat] = []
        flats: list[Tensor] = []
        for i in range(len(self.optimizer.param_groups)):
            for flat, pieces in zip(self._flat(i), self._pieces(i), strict=True):
                flats.append(flat)
                targets.append(Flat(i, flat.numel(), pieces))
        found, numbers = redistributed(states, targets, self._names)
        groups = self.optimizer.param_groups
        for group, own in zip(groups, known_numbers(self.optimizer, numbers), strict=True):
            group.update(own)
        for flat, target, values in zip(flats, targets, found, strict=True):
            self._set_state(groups[target.group], flat, values)

    def _set_state(self, group: Mapping[str, Any], flat: Tensor, values: Mapping[str, Any]) -> None:
        own = self.optimizer.state[flat] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                # a fused step counts where it steps, others on the CPU
                moves = value.ndim > 0 or group.get("fused") or group.get("capturable")
                value = value.to(flat.device if moves else value.device).clone()
            own[name] = value


def _to_contiguous(method: nn.Module, optimizer: Optimizer) -> None:
    """DeepSpeed sends parameters as bytes and keeps them in flat rows: channels_last weights fail there."""
    for p in method.parameters():
        p.data = p.data.contiguous()
        state = optimizer.state.get(p, {})
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.contiguous()


class _Forward(nn.Module):
    """What DeepSpeed wraps: it must see the tensor that the gradient comes from, and no structure around it."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self._output: StepOutput | None = None

    def forward(self, batch: Any, at: At | None) -> Tensor:
        if at is None:
            return self.method.predict(batch)
        # not through its hooks: they look for tensors in tuples only, and a method owns no parameter itself
        self._output = self.method.forward(batch, at)
        return self._output.loss

    def taken(self) -> StepOutput:
        """The output of the last forward, once."""
        output, self._output = self._output, None
        assert output is not None
        return output


def _remove_hooks(offload: Any) -> None:
    for parameter in offload.module.parameters():
        parameter.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def _import(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed = require("deepspeed", needed_for="backend.name=deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed.ops as ops

    # its shared-memory exchange is compiled on first use, for a minute, with a compiler that may not be there
    ops.__compatible_ops__.update({name: False for name in ops.__compatible_ops__ if "shm" in name})
    init_alone()
    os.environ.setdefault("LOCAL_RANK", str(Ranks.here().local_rank))  # it insists
    deepspeed.comm.init_distributed(dist_init_required=False)
    return deepspeed
