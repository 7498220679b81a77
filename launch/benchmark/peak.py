"""Peak memory of this process: of its device where that is a GPU, else its largest resident size."""

from __future__ import annotations

from pathlib import Path

import torch

# For the environment of a process that measures itself: freed tensors go back to the system at once, so that the
# resident size is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def reset_peak(device: torch.device) -> int:
    """Bytes in use now; from here on the peak counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
