"""The process and its place in the job: device, ranks, threads."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from pretrain.process.collectives import use

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # DeepSpeed 0.19.6 lowered its default to 10, too short for a large save


@dataclass(frozen=True)
class Runtime:
    """Where this process stands. `threads`: CPU threads that torch uses in it; `local_size`: ranks of this node."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    threads: int
    local_size: int = 1

    @property
    def node_ranks(self) -> range:
        """The ranks of this node; launchers number them one after the other."""
        first = self.rank - self.local_rank
        return range(first, min(first + self.local_size, self.world_size))

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes what exists once."""
        return self.rank == 0

    def __str__(self) -> str:
        backend = dist.get_backend() if dist.is_initialized() else "no process group"
        return f"{self.world_size} rank(s) on {self.device.type}, {backend}, {self.threads} CPU thread(s) each"


def start(distributed: bool | None = None) -> Runtime:
    """Pick device, backend and threads, and join the process group. All ranks must call it, once.

    Args:
        distributed: whether DeepSpeed's engine will run, which needs a process group even alone; default: only where a
            launcher started several ranks.
    """
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 0))
    )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    local_size = local_size or int(os.environ.get("LOCAL_SIZE", 0)) or size
    threads = max(1, len(os.sched_getaffinity(0)) // local_size)
    torch.set_num_threads(threads)
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if distributed or (distributed is None and size > 1):
        _join(rank, size, "nccl" if cuda else "gloo")
    return Runtime(rank, size, local_rank, device, threads, local_size)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that were freed for the next step: fetching their pages from the system anew, and
    zeroing them, takes a tenth of a step on a CPU. Settings of the environment (MALLOC_*, GLIBC_TUNABLES) win."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def _join(rank: int, size: int, backend: str) -> None:
    if backend == "gloo":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch 2.14 renames these collectives, which DeepSpeed and older torch know by these names only.
    warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated")
    import deepspeed

    # Training never uses this op; building it takes a compiler and half a minute, and it leaks shared memory.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, launcher or not
    if not dist.is_initialized():
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    if backend == "nccl":
        use(cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)))


def finish() -> None:
    """Leave the process group; all ranks must call it at a good end."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class OnHost:
    """Device scalars, by name, on their way to the host: the copy starts at once, and `read` waits for it alone."""

    def __init__(self, values: Mapping[str, torch.Tensor]):
        together = torch.stack([value.detach() for value in values.values()])
        self._names, self._values = tuple(values), together.to("cpu", non_blocking=True)
        self._copied = None
        if together.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> dict[str, float]:
        """The numbers, by name."""
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))
