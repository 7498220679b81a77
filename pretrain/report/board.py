"""TensorBoard's file of a run. Its own writer works in a thread, which a full disk ends without a word to the run."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import image, scalar, text


class Board:
    """Scalars and captioned pictures, on disk when a method returns. What earlier files of the folder hold from
    `first_step` on is not shown any more. Every method raises OSError."""

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = self.path.open("ab")
        self._records = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"), 0)
        self._add(Event(session_log=SessionLog(status=SessionLog.START)), first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers by name."""
        for name, value in values.items():
            self._add(Event(summary=scalar(name, value)), step)
        self._file.flush()

    def pictures(self, name: str, images: torch.Tensor, captions: Sequence[str], step: int) -> None:
        """Add uint8 `images` `[n, 3, h, w]`, each with its caption."""
        for index, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
            self._add(Event(summary=image(f"{name}/{index}", pixels, dataformats="CHW")), step)
            self._add(Event(summary=text(f"{name}/{index}", caption)), step)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, event: Event, step: int) -> None:
        event.wall_time, event.step = time.time(), step
        self._records.write(event.SerializeToString())
