"""An evaluation reader and towers without files or weights: features are functions of the position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

CONTEXT, DIM = 4, 33


@dataclass
class FakeBatch:
    """What evaluation reads of an EvalBatch."""

    inputs: dict[str, dict[str, torch.Tensor]]
    positions: torch.Tensor
    text_image: torch.Tensor
    identity: dict[str, torch.Tensor]


class FakeReader:
    """The slice of `rank`: image i is filled with the value i; image i has i % 4 captions, token 0 is their number.
    Images 2i and 2i + 1 are one, as far as hashes tell, and so are the captions whose numbers 50 leaves the same of."""

    def __init__(self, images: int, batch: int, rank: int = 0, world_size: int = 1, classes: int | None = None):
        share = -(-images // world_size)
        self.steps = -(-share // batch)
        self.own = list(range(share * rank, min(share * (rank + 1), images)))
        self.batch, self.classes = batch, classes

    def __iter__(self) -> Iterator[FakeBatch]:
        for step in range(self.steps):
            mine = self.own[step * self.batch : (step + 1) * self.batch]
            positions = torch.tensor(mine + [-1] * (self.batch - len(mine)))
            values = positions.clamp(min=0).to(torch.uint8)[:, None, None, None]
            captions = [(image, index) for image in mine for index in range(image % 4)]
            captions = captions or [(-1, 0)]  # as EvalReader: one padding text where there is none
            tokens = [[max(image, 0) * 4 + index, 9, 9, 9] for image, index in captions]
            inputs = {
                "image": {"pixels": values.expand(-1, 3, 2, 2)},
                "text": {"tokens": torch.tensor(tokens, dtype=torch.int64).reshape(-1, CONTEXT)},
            }
            if self.classes is not None:
                inputs["label"] = {"class": positions % self.classes}
            owners = torch.tensor([image for image, _ in captions], dtype=torch.int64)
            hashes = {"image": positions // 2, "text": torch.tensor([token[0] % 50 for token in tokens])}
            yield FakeBatch(inputs, positions, owners, hashes)


class FakeTowers:
    """Encodes by table; counts forwards and remembers the number of texts in each, as ZeRO-3 would see them."""

    def __init__(self, seed: int = 0, noise: float = 0.8):
        generator = torch.Generator().manual_seed(seed)
        self.image = F.normalize(torch.randn(256, DIM, generator=generator), dim=1)
        text = self.image.repeat_interleave(4, dim=0) + noise * torch.randn(1024, DIM, generator=generator)
        self.text = F.normalize(text, dim=1)
        self.forwards: list[tuple[int | None, int | None]] = []

    def __call__(self, images, texts):
        self.forwards.append(tuple(None if value is None else len(value) for value in (images, texts)))
        image = None if images is None else self.image[images[:, 0, 0, 0].long()]
        return image, None if texts is None else self.text[texts[:, 0]]


def fake_tokenize(texts: list[str]) -> torch.Tensor:
    """Tokens whose first is a hash of the text that does not change between processes."""
    return torch.tensor([[sum(text.encode()) * 7 % 1024, 9, 9, 9] for text in texts])


def ranks(rank: int = 0, world_size: int = 1) -> SimpleNamespace:
    """The part of Runtime that evaluation uses, on the CPU."""
    return SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"), is_main=rank == 0)
