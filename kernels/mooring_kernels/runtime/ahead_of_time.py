"""Compiles every Triton kernel for a GPU that is not there, and reads what the compiler made of it.

The launchers themselves are run, on CPU tensors, with the launch replaced by a recorder: what is compiled is
exactly what a GPU would get (tile shapes, constants, the alignment of each argument), and no second list of
configurations can go stale. Run as a program it prints a table and fails if a kernel spills or does not fit:

    python -m mooring_kernels.runtime.ahead_of_time 80 90

Triton's interpreter cannot compile, so this needs a process without TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mooring_kernels.bank_cross_entropy import gpu_cases as bank_cross_entropy
from mooring_kernels.batchnorm_statistics import gpu_cases as batchnorm_statistics
from mooring_kernels.calibrate import gpu_cases as calibrate
from mooring_kernels.class_ring_push import gpu_cases as class_ring_push
from mooring_kernels.class_statistics import gpu_cases as class_statistics
from mooring_kernels.concept_boxes import gpu_cases as concept_boxes
from mooring_kernels.dr_tune_loss import gpu_cases as dr_tune_loss
from mooring_kernels.patch_match_info_nce import gpu_cases as patch_match_info_nce
from mooring_kernels.queue_info_nce import gpu_cases as queue_info_nce
from mooring_kernels.ring_push import gpu_cases as ring_push
from mooring_kernels.row_normalise import gpu_cases as row_normalise
from mooring_kernels.text_supervised_loss import gpu_cases as text_supervised_loss
from mooring_kernels.two_head_cross_entropy import gpu_cases as two_head_cross_entropy

# Every op with Triton kernels: `cases()` of its gpu_cases.py calls each launcher at the shapes that are used.
_OPS = (
    bank_cross_entropy,
    batchnorm_statistics,
    calibrate,
    class_ring_push,
    class_statistics,
    concept_boxes,
    dr_tune_loss,
    patch_match_info_nce,
    queue_info_nce,
    ring_push,
    row_normalise,
    text_supervised_loss,
    two_head_cross_entropy,
)

MAX_REGISTERS = 255  # per thread, on every device since sm_35
# Most shared memory of a block in bytes, by compute capability. The launch checks it, the compiler does not.
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as a launcher asked for it: what Triton would specialise the compilation on."""

    name: str  # kernel, then the case that launched it
    kernel: Any  # triton.JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments known to be multiples of 16 (bytes for pointers)
    options: tuple[tuple[str, int], ...]

    @property
    def configuration(self) -> tuple[Any, ...]:
        """Equal for launches that share one compiled binary."""
        return (self.kernel.__name__, self.signature, self.constants, self.aligned, self.options)


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel on one target. Bytes are per thread, shared memory per block."""

    name: str
    capability: int
    num_warps: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    widest_load_bits: int
    widest_store_bits: int

    def faults(self) -> list[str]:
        """Why this kernel may not ship; empty when it may."""
        limit = SHARED_MEMORY_LIMIT[self.capability]
        found = []
        if self.stack_bytes or self.local_bytes:
            found.append(
                f"registers spill: {self.stack_bytes} bytes of stack, {self.local_bytes} of local memory"
            )
        if self.registers > MAX_REGISTERS:
            found.append(f"{self.registers} registers, the limit is {MAX_REGISTERS}")
        if self.shared_bytes > limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, the limit is {limit}")
        return [f"{self.name} on sm_{self.capability}: {fault}" for fault in found]


def _specialise(name: str, kernel: Any, values: dict[str, Any], options: dict[str, int]) -> Launch:
    """Applies Triton's own rules: what divides by 16 is aligned, an integer equal to 1 is a constant."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                aligned.append(parameter.name)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(parameter.name)
    return Launch(
        name,
        kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        tuple(options.items()),
    )


@contextmanager
def recorded_launches(case: str) -> Iterator[list[Launch]]:
    """Within it, a Triton launch is written down instead of run; the results of launchers hold garbage."""
    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key) for key in _OPTIONS if key in kwargs}
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(_specialise(f"{self.__name__}[{case}]", self, values, options))

    original = JITFunction.run
    JITFunction.run = record  # type: ignore[method-assign, assignment]
    try:
        yield launches
    finally:
        JITFunction.run = original  # type: ignore[method-assign]


def all_launches() -> list[Launch]:
    """Every distinct kernel configuration that the launchers ask for at the shapes that are used."""
    distinct: dict[tuple[Any, ...], Launch] = {}
    for name, call in chain.from_iterable(op.cases() for op in _OPS):
        with recorded_launches(name) as launches:
            call()
        for launch in launches:
            distinct.setdefault(launch.configuration, launch)
    return list(distinct.values())


def _widest_access(ptx: str, instruction: str) -> int:
    """Bits moved by the widest global load ("ld") or store ("st") in the PTX; 0 when there is none."""
    found = re.findall(rf"{instruction}\.global(?:\.[a-zA-Z0-9_:]+)*?(?:\.v(\d))?\.[bufs](\d+)\s", ptx)
    return max((int(lanes or 1) * int(bits) for lanes, bits in found), default=0)


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles one configuration down to machine code for ``sm_<capability>`` and reads its resource use."""
    names = [name for name, _ in launch.signature]
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    options = dict(launch.options)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    usage = _resource_usage(kernel.asm["cubin"])
    return Compiled(
        name=launch.name,
        capability=capability,
        num_warps=options.get("num_warps", 4),
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        widest_load_bits=_widest_access(ptx, "ld"),
        widest_store_bits=_widest_access(ptx, "st"),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory per thread by cuobjdump; spilled registers live in the stack."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [str(cuobjdump), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def main(arguments: list[str] | None = None) -> int:
    """Prints one line per kernel and target, or JSON lines; returns 1 if any kernel may not ship."""
    parser = argparse.ArgumentParser(description="Compile all Triton kernels and check their resources.")
    parser.add_argument("capabilities", nargs="*", type=int, default=[80, 90], help="for example 80 90 100")
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel and target")
    chosen = parser.parse_args(arguments)
    unknown = [c for c in chosen.capabilities if c not in SHARED_MEMORY_LIMIT]
    if unknown:
        parser.error(f"compute capabilities must be among {sorted(SHARED_MEMORY_LIMIT)}; got {unknown}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter cannot compile, unset it")
    faults: list[str] = []
    for launch in all_launches():
        for capability in chosen.capabilities:
            compiled = compile_launch(launch, capability)
            faults += compiled.faults()
            if chosen.json:
                print(json.dumps(asdict(compiled)))
            else:
                spilled = compiled.stack_bytes + compiled.local_bytes
                print(
                    f"sm_{capability:<4}{compiled.registers:>4} registers "
                    f"{compiled.shared_bytes:>6} B shared {spilled:>4} B spilled  "
                    f"load {compiled.widest_load_bits:>3} bit "
                    f"store {compiled.widest_store_bits:>3} bit  {compiled.num_warps} warps  {compiled.name}"
                )
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
