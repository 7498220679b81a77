"""Which precision a device computes fast in. Everything that picks one asks here."""

from __future__ import annotations

import functools
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.config.tree import PRECISIONS
from pretrain.process.collectives import gather

AUTO, FP32, BF16 = PRECISIONS
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # of x86 and of ARM, as /proc/cpuinfo spells them
_BF16_ISAS = re.compile("BF16|FP16|AMX|AVX10|ALL|DEFAULT")  # values of ONEDNN_MAX_CPU_ISA that leave bf16 units in use
_TOO_SLOW = 5.0  # times
_SIDE = 256  # of the square matrices of the measurement: 33 MFLOP, at worst 10 ms on a core that emulates bf16
_CPUINFO = Path("/proc/cpuinfo")
_ROUNDS = 5  # the first one sets kernels up; the fastest counts


@dataclass(frozen=True)
class Ability:
    """What a device makes of bf16. `units`: it multiplies bf16 in hardware; `slowness`: seconds of a product of bf16
    matrices by those of one of fp32 matrices; `name`: what it is called."""

    units: bool
    slowness: float
    name: str

    @property
    def fast(self) -> bool:
        """Whether bf16 is what to compute in here."""
        return self.units and self.slowness <= _TOO_SLOW


@dataclass(frozen=True)
class ResolvedPrecision:
    """A precision that all ranks share, fp32 or bf16, and the lines that tell the user of it: first what and why, then
    what is wrong with it here."""

    precision: str
    lines: tuple[str, ...]


def resolve(asked: str, device: torch.device, recorded: str | None = None) -> ResolvedPrecision:
    """What `asked`, a value of train.precision, comes to. All ranks must call it; they get the same.

    `auto` is `recorded`, the precision of the run that is gone on with, or else bf16 where every rank's device has it
    in hardware.
    """
    found = gather((ability(device), recorded))
    abilities, recorded = [one for one, _ in found], found[0][1]
    poorest = next((rank for rank, one in enumerate(abilities) if not one.fast), None)
    fault = None if poorest is None else _fault(abilities[poorest], poorest, len(abilities))
    if asked != AUTO:
        precision, why = asked, "as set"
    elif recorded is not None:
        faster = "; train.precision=bf16 is faster here" if recorded == FP32 and fault is None else ""
        precision, why = recorded, f"auto: the run goes on in that of its checkpoint{faster}"
    elif fault is None:
        precision, why = BF16, "auto: in hardware"
    else:
        precision, why = FP32, f"auto: {fault}"
    lines = [f"precision: {precision} on {abilities[0].name} ({why})"]
    slowest = max(range(len(abilities)), key=lambda rank: abilities[rank].slowness)
    if precision == BF16 and fault is not None and abilities[slowest].slowness > 1:
        worst = _fault(abilities[slowest], slowest, len(abilities))
        lines.append(f"warning: bf16 is slow here: {worst}; remedy: train.precision=fp32")
    return ResolvedPrecision(precision, tuple(lines))


def is_bf16(precision: str) -> bool:
    """Whether a resolved precision is bf16 autocast. Raises ValueError for `auto`, which nobody has resolved."""
    if precision not in (FP32, BF16):
        raise ValueError(f"precision {precision!r} is not resolved")
    return precision == BF16


def matrix_dtype(device: torch.device) -> torch.dtype:
    """What matrices that need no more than bf16 are multiplied in: bf16 where that is fast on every rank. All ranks
    must call it; they get the same."""
    return torch.bfloat16 if all(one.fast for one in gather(ability(device))) else torch.float32


@functools.cache
def ability(device: torch.device) -> Ability:
    """What this process's `device` makes of bf16. A GPU with units for it is not measured."""
    if device.type == "cuda":
        units = _gpu_has_bf16(device)
        return Ability(units, 0.0 if units else slowness(device), torch.cuda.get_device_name(device))
    return Ability(cpu_has_bf16(), slowness(device), processor())


def _gpu_has_bf16(device: torch.device) -> bool:
    new = torch.cuda.get_device_capability(device) >= (8, 0)
    return new and torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware, and torch's kernels may make use of it."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    usable = torch.backends.mkldnn.is_available() and _BF16_ISAS.search(limit.upper()) is not None
    return usable and not _BF16_FLAGS.isdisjoint(_cpuinfo("flags", "Features").split())


def processor() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def slowness(device: torch.device) -> float:
    """Seconds of a bf16 matrix product by those of an fp32 one; at worst it takes 50 ms. On one thread: what the other
    cores are at does not count."""
    matrices = [torch.ones(_SIDE, _SIDE, device=device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [[_product_seconds(matrix) for matrix in matrices] for _ in range(_ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    bf16, fp32 = (min(seconds) for seconds in zip(*rounds, strict=True))
    return bf16 / fp32


def _product_seconds(matrix: torch.Tensor) -> float:
    _wait(matrix.device)
    started = time.perf_counter()
    matrix @ matrix
    _wait(matrix.device)
    return max(time.perf_counter() - started, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fault(one: Ability, rank: int, ranks: int) -> str:
    """Why a device is no place for bf16."""
    where = one.name if ranks == 1 else f"rank {rank}, {one.name},"
    units = "" if one.units else "has no units for bf16 and "
    return f"{where} {units}takes {one.slowness:.2g} times as long for it as for fp32"


@functools.cache
def _cpuinfo(*names: str) -> str:
    """The first value under one of `names` in /proc/cpuinfo; empty where there is none."""
    try:
        lines = _CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() in names), "")
