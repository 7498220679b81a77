"""The column `hash`: of every sample the hashes of its picture, and what tells the better of two copies."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pyarrow

from data_tools.corpus import Sample
from data_tools.hashing.perceptual import perceptual_hash
from data_tools.media.bad import BadSampleError
from data_tools.media.image import jpeg_size, opened
from data_tools.media.members import Fields

NAME = "hash"
_VERSION = 1  # of the rule
SCHEMA = pyarrow.schema(
    [
        ("sha256", pyarrow.binary(32)),  # of the picture's bytes
        ("phash", pyarrow.uint64()),  # see `perceptual`; null where the picture has one colour
        ("width", pyarrow.int32()),  # stored pixels, not turned upright
        ("height", pyarrow.int32()),
        ("caption_length", pyarrow.int32()),  # characters of the longest caption; 0: none
    ]
)


@dataclass(frozen=True)
class HashMaker:
    """See `columns.make.Maker`. `fields`: where pictures and captions lie."""

    fields: Fields
    name: str = NAME
    schema: pyarrow.Schema = SCHEMA

    @property
    def made_by(self) -> dict[str, object]:
        """Decoders differ by a shade between versions, so theirs are told."""
        libraries = {name: version(name) for name in ("pillow", "simplejpeg")}
        places = {"image": list(self.fields.image), "captions": list(self.fields.captions)}
        return {"rule": _VERSION, **places, **libraries}

    def values(self, sample: Sample) -> dict[str, Any]:
        """Raises BadSampleError `no_image`; of a picture that does not decode the bytes have a hash still."""
        data = self.fields.image_bytes(sample)
        found: dict[str, Any] = {"sha256": hashlib.sha256(data).digest(), "caption_length": self._caption(sample)}
        try:
            found["phash"] = perceptual_hash(data)
            found["width"], found["height"] = _size(data)
        except BadSampleError as error:
            found["error"] = error.kind
        return found

    def _caption(self, sample: Sample) -> int:
        try:
            return max(map(len, self.fields.all_captions(sample)))
        except BadSampleError:  # captions are judged elsewhere; a copy without one is the worse
            return 0


def _size(data: bytes) -> tuple[int, int]:
    size = jpeg_size(data)
    if size is not None:
        return size
    with opened(data) as image:
        return image.size
