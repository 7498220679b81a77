"""Small corpora for tests of the stream, written with the project's own shard writer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_tools.corpus import Corpus, open_corpus
from data_tools.format.writer import write_shard

CONTEXT = 12


def characters(texts: list[str]) -> torch.Tensor:
    """A tokenizer: the code points of the first characters, int64 [n, CONTEXT]."""
    rows = [[ord(c) for c in text[:CONTEXT].ljust(CONTEXT)] for text in texts]
    return torch.tensor(rows, dtype=torch.int64)


def picture(number: int, format: str = "JPEG") -> bytes:
    """A noisy picture of its own size and content for each number."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((24 + number % 9, 20 + number % 7), Image.Resampling.BILINEAR).save(buffer, format)
    return buffer.getvalue()


def members(number: int) -> dict[str, bytes]:
    """Image, first caption, three captions and a label."""
    captions = [f"{word} {number}" for word in ("one", "two", "three")]
    return {
        "jpg": picture(number),
        "txt": captions[0].encode(),
        "json": json.dumps({"captions": captions}).encode(),
        "cls": str(number % 3).encode(),
    }


def write_corpus(folder: Path, counts: list[int], change: dict[int, dict[str, bytes | None]] | None = None) -> Corpus:
    """Shards of `counts` samples. `change`: sample number -> members to replace (None: to leave out)."""
    number, names = 0, []
    for shard, count in enumerate(counts):
        samples = []
        for n in range(number, number + count):
            changed = members(n) | (change or {}).get(n, {})
            samples.append((f"{n:06d}", {name: data for name, data in changed.items() if data is not None}))
        number += count
        names.append(folder / f"s-{shard:06d}.tar")
        write_shard(names[-1], samples)
    return open_corpus(names)
