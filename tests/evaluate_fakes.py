"""An evaluation bench and towers without files or weights: features are functions of the position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from pretrain.evaluate.bench import Bench
from pretrain.towers.cut import TextRule, parts_of

CONTEXT, DIM = 4, 33
HEADS = frozenset({"fusion"})


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
        self.labelled = classes is not None

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
        self.shared = {"logit_scale": torch.tensor([20.0])}

    def __call__(self, inputs, want):
        rows, sizes = {}, {"image": None, "text": None}
        if "image" in inputs:
            rows["image"] = self.image[inputs["image"]["pixels"][:, 0, 0, 0].long()]
        if "text" in inputs:
            tokens = torch.cat([part[:, 0] for part in parts_of(inputs["text"])])[inputs["text"]["restore"]]
            rows["text"] = self.text[tokens]
        sizes |= {field: len(values) for field, values in rows.items()}
        self.forwards.append(tuple(sizes.values()))
        return {"rows": rows, "shared": dict(self.shared), "local": {}}


class Judging(FakeTowers):
    """With a head that says `sure` of the right pairs, and of all the cosine."""

    def __init__(self, sure=0.0):
        super().__init__()
        self.sure, self.judged = sure, 0

    def __call__(self, inputs, want):
        outputs = super().__call__(inputs, want)
        if want:
            assert want == HEADS
            image, text = (inputs["pairs"][field] for field in ("image", "text"))
            pixels = inputs["image"]["pixels"][image, 0, 0, 0].long()
            rows = outputs["rows"]["image"][image], outputs["rows"]["text"][text]
            tokens = inputs["text"]["tokens.0"][inputs["text"]["restore"]][text, 0]
            right = tokens // 4 == pixels
            outputs["local"]["fusion"] = {"image+text": (rows[0] * rows[1]).sum(dim=1) + self.sure * right}
            self.judged += len(image)
        return outputs


def fake_tokenize(texts: list[str]) -> torch.Tensor:
    """Tokens whose first is a hash of the text that does not change between processes."""
    return torch.tensor([[sum(text.encode()) * 7 % 1024, 9, 9, 9] for text in texts])


def ranks(rank: int = 0, world_size: int = 1) -> SimpleNamespace:
    """The part of Runtime that evaluation uses, on the CPU."""
    return SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"), is_main=rank == 0)


class FakeBench(Bench):
    """A bench whose corpora are `FakeReader`s of so many images, with the labels and class names asked for."""

    def __init__(self, images=40, batch=8, place=None, labels=None, names=(), **others):
        super().__init__(place or ranks(), None, TextRule(), batch, 0, **others)
        object.__setattr__(self, "fakes", (images, labels, names))

    @property
    def tokenize(self):
        """Instead of the architecture's."""
        return fake_tokenize

    def corpus(self, urls):
        """What evaluators read of a corpus."""
        images, _, names = self.fakes
        return SimpleNamespace(num_samples=images, classes=names, digest="d" * 32, paths=["a"], hashes=b"h" * 16)

    def reader(self, corpus, texts=False, captions=None):
        """This rank's."""
        images, labels, _ = self.fakes
        return FakeReader(images, self.batch, self.runtime.rank, self.runtime.world_size, labels)


class LabelledBench(FakeBench):
    """A bench of labelled corpora by name, each a list of (number of the image, label); the same number is the same
    image, also as far as hashes tell."""

    def __init__(self, corpora, names=None, batch=4, place=None, **others):
        super().__init__(0, batch, place, **others)
        object.__setattr__(self, "labelled", (corpora, names or {}))

    def corpus(self, urls):
        """The one called `urls`."""
        corpora, names = self.labelled
        rows = corpora[urls]
        return SimpleNamespace(num_samples=len(rows), classes=names.get(urls, ()), digest=urls, rows=rows)

    def reader(self, corpus, texts=False, captions=None):
        """This rank's."""
        return LabelledReader(corpus.rows, self.batch, self.runtime.rank, self.runtime.world_size)


class LabelledReader(FakeReader):
    """The slice of `rank`, without texts: images and labels as they are listed, a label of None is none."""

    def __init__(self, rows, batch, rank, world_size):
        super().__init__(len(rows), batch, rank, world_size)
        self.rows = [*rows, (0, -1)]  # what padding, -1, stands for
        self.labelled = None not in [label for _, label in rows]

    def __iter__(self) -> Iterator[FakeBatch]:
        for step in range(self.steps):
            mine = self.own[step * self.batch : (step + 1) * self.batch]
            positions = torch.tensor(mine + [-1] * (self.batch - len(mine)))
            images, labels = torch.tensor([self.rows[at] for at in positions.tolist()]).T
            pixels = images.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
            inputs = {"image": {"pixels": pixels}, "label": {"class": labels}}
            yield FakeBatch(inputs, positions, torch.tensor([-1]), {"image": images})
