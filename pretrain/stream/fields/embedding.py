"""A stored vector of a sample, such as the feature that a teacher gave its image or its caption.

It is a member in NumPy's format (`KEY.teacher_image.npy`), or a list of numbers in a json. Of either nothing is
unpickled, and nothing is allocated by what a file says of its size.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import xxhash

from data_tools.corpus import Sample
from data_tools.media.bad import BadSampleError
from data_tools.media.members import DEFAULT_FIELDS, Fields, describe, found_at, holds
from pretrain.stream.draw import Draw, Purpose
from pretrain.stream.fields import EmbeddingConfig
from pretrain.stream.fields.field import FieldContext, Shown
from pretrain.towers.cut import Rows

_MAX_BYTES = 1 << 24  # of a member; a list in a json is bounded with the json
_MAX_HEADER = 1024  # bytes of the text that says shape and type; NumPy writes 118
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class Embedding:
    """`values` fp32 `[n, size]`, zeros where there is none.

    A sample has one vector, `[size]`, or one for each of its captions, `[captions, size]` in their order: a training
    step then sees that of the caption which it sees, an evaluation the first.

    Args:
        place: where it stands: an extension, or `json:FIELD` (dots go deeper).
        size: numbers of a vector.
        normalise: give it unit norm.
        mapping: where the captions are in a sample.
        choose: which of several captions a training step sees, see `Text`.
        optional: see `Field`.
    """

    place: str
    size: int
    normalise: bool = True
    mapping: Fields = DEFAULT_FIELDS
    choose: str = "random"
    optional: bool = False

    @classmethod
    def of(cls, settings: EmbeddingConfig, context: FieldContext) -> Embedding:
        """The field of these settings, whose size is checked."""
        place, size = settings.member or f"{context.name}.npy", cast(int, settings.size)
        if ":" not in place:
            place = place.lower()  # as the index has extensions
        return cls(place, size, settings.normalise, context.mapping, context.choose, context.optional)

    def rows(self, n: int) -> Rows:
        """See `Field`."""
        return {"values": torch.zeros(n, self.size)}

    def train(self, sample: Sample, draw: Draw, out: Rows) -> Shown:
        """See `Field`. Raises BadSampleError `no_embedding` or `bad_embedding`, and what reading a json or captions
        raises."""
        vectors = self._vectors(sample)
        first = self.choose == "first" or len(vectors) == 1
        return self._write(vectors[0 if first else draw.bits(Purpose.CAPTION) % len(vectors)], out)

    def evaluate(self, sample: Sample, out: Rows) -> Shown:
        """See `Field`. Raises as `train` does."""
        return self._write(self._vectors(sample)[0], out)

    def finish(self, rows: Rows, shown: Sequence[Shown], micro_batch: int | None) -> Rows:
        """See `Field`."""
        return rows

    def identity(self, rows: Rows, shown: Sequence[Shown]) -> torch.Tensor:
        """Hashes of the vectors."""
        hashes = [xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows["values"].numpy()]
        return torch.from_numpy(np.array(hashes, np.uint64).view(np.int64))

    def lacks(self, sample: Sample) -> str | None:
        """See `Field`."""
        return None if holds(sample, self.place) else f"embedding ({self.place})"

    def _vectors(self, sample: Sample) -> np.ndarray:
        """Those of a sample, finite, `[1, size]` or `[captions, size]`."""
        found = found_at(sample, self.place)
        if found is None:
            raise BadSampleError("no_embedding", f"nothing at {self.place}; {describe(sample)}")
        values = array_of_npy(found) if isinstance(found, bytes) else array_of_list(found)
        vectors = values[None] if values.ndim == 1 else values
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise _bad(f"{self.place} has the shape {values.shape}, expected ({self.size},) or (captions, {self.size})")
        if not np.isfinite(vectors).all():
            raise _bad(f"{self.place} has numbers that are not finite")
        if len(vectors) > 1 and len(vectors) != (captions := len(self.mapping.all_captions(sample))):
            raise _bad(f"{self.place} has {len(vectors)} vectors for {captions} captions")
        return vectors

    def _write(self, vector: np.ndarray, out: Rows) -> Shown:
        if self.normalise:
            exact = vector.astype(np.float64)
            norm = np.sqrt(np.square(exact).sum())
            if norm == 0:
                raise _bad(f"{self.place} is a vector of zeros, which has no direction")
            vector = exact / norm
        out["values"].numpy()[:] = vector
        return Shown()


def array_of_npy(data: bytes) -> np.ndarray:
    """The array of a `.npy`, float16 or float32, in the bytes themselves. Raises BadSampleError `bad_embedding`."""
    if len(data) > _MAX_BYTES:
        raise _bad(f"{len(data)} bytes, at most {_MAX_BYTES} are read")
    file = io.BytesIO(data)
    try:
        read_header = _HEADERS[np.lib.format.read_magic(file)]
        shape, column_major, kind = read_header(file, max_header_size=_MAX_HEADER)
    except Exception as error:  # errors of the parser of headers share no class
        raise _bad(f"no .npy file: {type(error).__name__}") from error
    if kind.newbyteorder("=") not in (np.float16, np.float32):
        raise _bad(f"a .npy of {str(kind)[:30]!r}, expected float16 or float32")
    if not 1 <= len(shape) <= 2 or min(shape) < 1:  # others NumPy may refuse to make, each by another error
        raise _bad(f"a .npy of the shape {str(shape)[:60]}, expected one vector or some of one size")
    body = data[file.tell() :]
    if len(body) != math.prod(shape) * kind.itemsize:
        raise _bad(f"a .npy of {len(body)} bytes beside its header, which says {str(shape)[:60]} of {kind}")
    return np.frombuffer(body, kind).reshape(shape, order="F" if column_major else "C")


def array_of_list(value: Any) -> np.ndarray:
    """The array of a json's list of numbers, or of its list of such lists, fp32. Raises BadSampleError
    `bad_embedding`."""
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    if not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        raise _bad(f"expected a list of numbers, or lists of one length, got {str(value)[:60]!r}")
    if not all(type(one) in (int, float) for row in rows for one in row):
        raise _bad(f"expected numbers alone, got {str(value)[:60]!r}")
    with np.errstate(over="ignore"):  # what fp32 cannot hold is then not finite
        try:
            found = np.array(rows, np.float64).astype(np.float32)
        except OverflowError as error:
            raise _bad("an integer beyond any float") from error
    return found if rows is value else found[0]


def _bad(reason: str) -> BadSampleError:
    return BadSampleError("bad_embedding", reason)
