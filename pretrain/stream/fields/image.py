"""The image of a sample: a square picture of bytes, and what its kept patches are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from data_tools.corpus import Sample
from data_tools.media.members import DEFAULT_FIELDS, Fields
from pretrain.config.tree import ImageDataConfig
from pretrain.stream.draw import Draw, Purpose
from pretrain.stream.fields.field import Shown
from pretrain.stream.transform import ImageSettings, ImageTransform
from pretrain.towers.cut import Rows

if TYPE_CHECKING:  # it imports open_clip, which loader processes of images do without
    from pretrain.towers.spec import ModelSpec


@dataclass(frozen=True)
class Image:
    """`pixels` uint8 `[n, 3, size, size]`. Where patches are left out also `patch_bits` int64 `[n]`, from which it
    follows which, and of each micro-batch in training `patch_dropout`, float64 `[]`, how many.

    Args:
        settings: of the picture.
        mapping: where the image is in a sample.
        patch_dropout: share of the patches that training leaves out; None where the tower never does.
        optional: see `Field`.
    """

    settings: ImageSettings
    mapping: Fields = DEFAULT_FIELDS
    patch_dropout: float | None = None
    optional: bool = False

    @cached_property
    def transform(self) -> ImageTransform:
        """Bytes -> picture."""
        return ImageTransform(self.settings)

    def rows(self, n: int) -> Rows:
        """See `Field`."""
        size = self.settings.size
        rows = {"pixels": torch.zeros((n, 3, size, size), dtype=torch.uint8)}
        return rows | {"patch_bits": torch.zeros(n, dtype=torch.int64)} if self.patch_dropout is not None else rows

    def train(self, sample: Sample, draw: Draw, out: Rows) -> Shown:
        """See `Field`. Raises BadSampleError `no_image`, or what decoding raises."""
        data = self.mapping.image_bytes(sample)
        out["pixels"].numpy()[:] = self.transform.train(data, draw).transpose(2, 0, 1)
        if self.patch_dropout is not None:
            out["patch_bits"].fill_(draw.signed(Purpose.PATCHES))
        return Shown(content=xxhash.xxh3_64_intdigest(data))

    def evaluate(self, sample: Sample, out: Rows) -> Shown:
        """See `Field`. Raises as `train` does."""
        data = self.mapping.image_bytes(sample)
        out["pixels"].numpy()[:] = self.transform.evaluate(data).transpose(2, 0, 1)
        return Shown(content=xxhash.xxh3_64_intdigest(data))

    def finish(self, rows: Rows, shown: Sequence[Shown], micro_batch: int | None) -> Rows:
        """See `Field`."""
        if micro_batch is None or self.patch_dropout is None:
            return rows
        share, parts = torch.tensor(self.patch_dropout, dtype=torch.float64), range(-(-len(shown) // micro_batch))
        return rows | {f"part{number}.patch_dropout": share for number in parts}

    def identity(self, rows: Rows, shown: Sequence[Shown]) -> torch.Tensor:
        """Hashes of the stored bytes."""
        return torch.from_numpy(np.array([one.content for one in shown], np.uint64).view(np.int64))

    def lacks(self, sample: Sample) -> str | None:
        """See `Field`."""
        return self.mapping.lacks_image(sample)


def image_settings(spec: ModelSpec, data: ImageDataConfig | None = None, size: int | None = None) -> ImageSettings:
    """Picture size (unless given), interpolation and evaluation resize as the architecture has them; training as `data`
    says."""
    data = data or ImageDataConfig()
    low, high = data.crop_scale
    return ImageSettings(
        size=size or spec.image_size,
        crop_scale=(low, high),
        interpolation=spec.preprocess_cfg["interpolation"],
        resize_mode=spec.preprocess_cfg["resize_mode"],
        flip=data.flip,
        color_jitter=data.color_jitter,
        scaled_decode=data.scaled_decode,
    )
