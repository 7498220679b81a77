"""How a batch gets from a loader process to its rank: in an anonymous file in memory, mapped there without a copy.

torch would share tensors through /dev/shm, of which containers have 64 MB unless asked for more, and lose a batch that
does not fit. An anonymous file is bounded by the memory alone, and goes with its last user.
"""

import mmap
import os
import pickle
import tempfile
from io import BytesIO
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch

from data_tools.errors import UserError

_ALIGNMENT = 64  # bytes; tensors begin at multiples of it


class Parcel:
    """`value` ready to be sent to another process, where it arrives as `value` itself, its arrays and tensors in the
    anonymous file.

    Raises UserError where there is no memory for it: here, not in the thread that sends, which could only drop it.
    """

    def __init__(self, value: Any):
        buffers: list[pickle.PickleBuffer] = []
        stream = BytesIO()
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
        views = [buffer.raw() for buffer in buffers]
        self._pickled, self._sizes = stream.getvalue(), [view.nbytes for view in views]
        total = sum(map(_padded, self._sizes))
        try:
            self._file = _anonymous_file()
            os.truncate(self._file, total)
            for view, at in zip(views, _offsets(self._sizes), strict=True):
                _write(self._file, view, at)
        except OSError as error:
            raise UserError(
                "no memory for a batch on its way from a loader process",
                got=error.strerror,
                expected=f"{total} bytes for each batch that is kept ready",
                remedy="give more memory, or lower data.workers; 0 loads in the rank itself",
            ) from None

    def __reduce__(self):
        return _open, (self._pickled, self._sizes, DupFd(self._file))

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Tensors travel as the arrays that share their memory."""
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _open(pickled: bytes, sizes: list[int], handle: Any) -> Any:
    file = handle.detach()
    try:
        length = sum(map(_padded, sizes))
        view = memoryview(mmap.mmap(file, length) if length else bytearray())
    finally:
        os.close(file)  # the mapping stays, until the last tensor in it is gone
    return pickle.loads(
        pickled, buffers=[view[at : at + size] for at, size in zip(_offsets(sizes), sizes, strict=True)]
    )


def _anonymous_file() -> int:
    """A descriptor of a new file without a name; on the temporary folder's disk where the kernel has none in memory."""
    try:
        return os.memfd_create("batch", os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())


def _write(file: int, view: memoryview, at: int) -> None:
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _offsets(sizes: list[int]) -> list[int]:
    return (np.cumsum([0, *map(_padded, sizes)])[:-1]).tolist()
