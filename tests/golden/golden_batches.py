"""The first batches of three small runs, field by field: what the goldens of the data path are taken from.

The pictures are PPM files of bytes from a hash, so that no codec and no random generator of a library enters them: only
the order, the choice of captions, the crop, the colours and the tokenizer decide what a batch holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml

import stream_corpora
import tiny
from pretrain.config.reading import load_config
from pretrain.config.tree import Config
from pretrain.process.runtime import Runtime
from pretrain.stream.sources import train_sources, train_stream
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from pretrain.tasks.classify import label_fields
from pretrain.tasks.contrastive import make_model, pair_fields

STEPS, GLOBAL_BATCH = 6, 16
_CLASSES = ("one", "two", "three")  # of stream_corpora's labels
_AUGMENTED = {"crop_scale": [0.3, 1.0], "flip": 0.5, "color_jitter": 0.4}


@dataclass(frozen=True)
class Case:
    """A run: samples of each shard of each source, the sources' settings, and those of the run."""

    counts: tuple[tuple[int, ...], ...]
    sources: tuple[dict, ...]
    settings: dict
    target: str = "caption"


CASES = {
    # Three epochs are begun; two phases, the first with fewer patches and the second with smaller pictures.
    "single": Case(
        ((13, 17, 9),),
        ({},),
        {
            "data": _AUGMENTED | {"word_dropout": 0.3, "window": 8},
            "model": {"phases": [{"until": "2 steps", "patch_dropout": 0.5}, {"until": "4 steps", "image_size": 16}]},
        },
    ),
    # Sources by weight, of which one names where its captions are and takes the first; patches are left out for good.
    "mixture": Case(
        ((20, 11), (23,), (9, 8)),
        ({"weight": 0.5}, {"weight": 0.3, "captions": "json:meta.alt", "choose": "first"}, {"weight": 0.2}),
        {"data": {"window": 4}, "model": {"phases": [{"until": "9 steps", "patch_dropout": 0.25}]}},
    ),
    "labels": Case(((21, 16),), ({},), {"data": _AUGMENTED | {"window": 16}}, target="label"),
}


def first_batches(case: Case, folder: Path, world_size: int) -> list[dict[str, np.ndarray]]:
    """Of each of the first steps: the global batch, put together from the slices of all ranks. Arrays by name: `keys`
    `[n]`, `pixels` uint8 `[n, 3, h, w]`, `tokens` int64 `[n, context]` and `identity` int64 `[n, 2]` or `class`
    int64 `[n]`, `patch_bits` int64 `[n]` where the phase leaves patches out. `folder` is made new."""
    config = _config(case, folder)
    slices = [_slices(case, config, rank, world_size) for rank in range(world_size)]
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*slices, strict=True)
    ]


def _slices(case: Case, config: Config, rank: int, world_size: int) -> Iterator[dict[str, np.ndarray]]:
    """A rank's slices. Whoever changes what a batch is changes this one function, and no stored hash."""
    runtime = Runtime(rank, world_size, rank, torch.device("cpu"), 1, world_size)
    sources = train_sources(config.data)
    if case.target == "label":
        sources = [replace(source, corpus=replace(source.corpus, classes=_CLASSES)) for source in sources]
    phases = config.model.phases if isinstance(config, ContrastiveConfig) else ()
    model = make_model(config) if phases else None
    if case.target == "label":
        fields = label_fields(config, tiny.SPEC, len(_CLASSES))
    else:
        dropped = model.patch_shares if model else ()
        fields = pair_fields(config, tiny.SPEC, dropped=dropped)
    with train_stream(config, sources, fields, runtime, inspect_only=True) as stream:
        for _, batch in zip(range(STEPS), stream.iterate(), strict=False):
            named = [(name, row) for rows in batch.inputs.values() for name, row in rows.items()]
            arrays = {name: row.numpy() for name, row in named if not name.startswith("part")}
            if "text" in batch.identity:
                arrays["identity"] = np.stack([batch.identity[name].numpy() for name in ("image", "text")], axis=1)
            yield {"keys": np.array(batch.keys), **arrays}


def digest(array: np.ndarray) -> str:
    """A hash of kind, shape and content; of keys, of their lines."""
    if array.dtype.kind == "U":
        content = "\n".join(array.tolist()).encode()
    else:
        plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        content = f"{plain.dtype.str} {plain.shape} ".encode() + plain.tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _config(case: Case, folder: Path) -> Config:
    folder.mkdir(parents=True)
    sources = []
    for number, (counts, settings) in enumerate(zip(case.counts, case.sources, strict=True)):
        place = folder / f"source-{number}"
        place.mkdir()
        stream_corpora.write_corpus(place, list(counts), _members(100 * number, sum(counts)))
        sources.append({"urls": str(place / f"s-{{000000..{len(counts) - 1:06d}}}.tar"), **settings})
    (folder / "tiny.json").write_text(json.dumps(tiny.MODEL_CFG))
    tree = {
        "seed": 7,
        "run": {"dir": str(folder / "run")},
        "train": {"global_batch": GLOBAL_BATCH},
        **case.settings,
        "data": {"train": sources, **case.settings["data"]},
    }
    if case.target == "label":
        kind, tree = ClassifyConfig, tree | {"init": str(folder / "tiny.json"), "random": True}
    else:
        kind, tree["model"] = ContrastiveConfig, {"name": str(folder / "tiny.json"), **case.settings["model"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return load_config(kind, folder / "config.yaml")


def _members(first: int, count: int) -> dict[int, dict[str, bytes | None]]:
    """What replaces the members of a source's samples; every thirteenth picture is cut short, a bad sample."""
    changes: dict[int, dict[str, bytes | None]] = {}
    for number in range(count):
        words = [tiny.WORDS[((first + number) * k) % len(tiny.WORDS)] for k in (1, 3, 5, 7, 11)]
        captions = [" ".join(words[:n]) + f" {first + number}" for n in (5, 3, 4)]
        meta = {"captions": captions, "meta": {"alt": captions[::-1]}}
        picture = _ppm(first + number)
        changes[number] = {
            "jpg": None,
            "ppm": picture[: len(picture) // 2] if number % 13 == 5 else picture,
            "txt": captions[0].encode(),
            "json": json.dumps(meta).encode(),
        }
    return changes


def _ppm(number: int) -> bytes:
    """Noise in a picture of a size of its own, every third as large as the towers take them."""
    width, height = (32, 32) if number % 3 == 0 else (36 + number % 11, 33 + number % 7)
    noise = hashlib.shake_128(str(number).encode()).digest(3 * width * height)
    return f"P6 {width} {height} 255\n".encode() + noise
