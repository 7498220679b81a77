"""One loader, timed in a process of its own: ours, open_clip's own, or plain webdataset.

    python -m launch.benchmark.loader_trial JSON_OF_A_TRIAL

It runs in the environment of that loader, so nothing but the standard library is imported before the loader is known.
The last line that it prints is the result, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Batches = Generator[tuple[Any, Any], None, None]  # images [b, 3, size, size], texts [b, 77]
_MODEL = "ViT-B-32"  # its tokenizer: open_clip's own, 77 tokens
_SAMPLE_SHUFFLE = 1000  # samples in the buffer of the plain pipeline


@dataclass(frozen=True)
class LoaderTrial:
    """What one loader shall do. `shards`: tar paths, read again and again; `cores`: the only ones it may use."""

    loader: str  # dualstream | open_clip | webdataset
    shards: tuple[str, ...]
    cores: tuple[int, ...]
    workers: int
    images: int  # timed
    warmup: int  # images before
    batch: int
    size: int
    crop_scale: tuple[float, float]
    scaled_decode: bool = True
    as_float: bool = False  # ours: normalised float32 instead of uint8


def measure(batches: Iterator[tuple[Any, Any]], trial: LoaderTrial) -> dict[str, float]:
    """Seconds, and CPU seconds of this session's processes, for at least `trial.images` images after the warm-up."""
    _take(batches, trial, trial.warmup)
    cpu, started = cpu_seconds(os.getsid(0)), time.perf_counter()
    images = _take(batches, trial, trial.images)
    seconds = time.perf_counter() - started
    # A few images, decoded ahead, may take less than a tick of that clock.
    used = max(cpu_seconds(os.getsid(0)) - cpu, 1 / os.sysconf("SC_CLK_TCK"))
    return {"images": images, "seconds": seconds, "cpu_seconds": used}


def cpu_seconds(session: int) -> float:
    """User and system time of all processes of a session, their ended children included."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(") ")[2].split()  # from the third on: the name may hold blanks
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _take(batches: Iterator[tuple[Any, Any]], trial: LoaderTrial, count: int) -> int:
    taken = 0
    while taken < count:
        images, texts = next(batches)
        if tuple(images.shape[1:]) != (3, trial.size, trial.size) or len(texts) != len(images):
            raise RuntimeError(f"a batch of images {tuple(images.shape)} and texts {tuple(texts.shape)}")
        taken += len(images)
    return taken


def dualstream(trial: LoaderTrial) -> Batches:
    """Batches of this project's stream, uint8 or normalised float32; the latter in this process, as a trainer does."""
    import open_clip
    import torch

    from data_tools.corpus import open_corpus
    from pretrain.config.tree import DataConfig, ModelConfig
    from pretrain.stream.fields.image import Image
    from pretrain.stream.fields.text import Text
    from pretrain.stream.loader import StreamSettings, TrainStream
    from pretrain.stream.transform import ImageSettings
    from pretrain.towers.cut import TextRule
    from pretrain.towers.spec import resolve_spec, tokenizer_of

    mean, std = (
        torch.tensor(values).view(3, 1, 1) * 255
        for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    image = ImageSettings(trial.size, crop_scale=trial.crop_scale, scaled_decode=trial.scaled_decode)
    tokenize, rule = tokenizer_of(resolve_spec(_MODEL)), TextRule(causal=True, buckets=ModelConfig.text_buckets)
    settings = StreamSettings(
        fields=lambda *_: {"text": Text(tokenize, rule=rule), "image": Image(image)},
        seed=0,
        global_batch=trial.batch,
        window=DataConfig.window,
        workers=trial.workers,
    )
    with TrainStream(open_corpus(trial.shards), settings) as stream:
        for batch in stream.iterate():
            images = batch.inputs["image"]["pixels"]
            yield (images - mean) / std if trial.as_float else images, batch.inputs["text"]["tokens"]


def open_clip_pipeline(trial: LoaderTrial) -> Batches:
    """Batches of the loader that open_clip's trainer builds, as float32. Its epoch is long enough never to end."""
    from open_clip_train.data import get_wds_dataset

    preprocess, tokenizer = _preprocessing(trial)
    args = argparse.Namespace(
        train_data=list(trial.shards),
        train_num_samples=2 * (trial.images + trial.warmup + trial.workers * trial.batch),
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=trial.workers,
        batch_size=trial.batch,
        world_size=1,
    )
    yield from get_wds_dataset(args, preprocess, is_train=True, tokenizer=tokenizer).dataloader


def webdataset_pipeline(trial: LoaderTrial) -> Batches:
    """Batches of a pipeline as webdataset's documentation builds it, with open_clip's preprocessing, as float32."""
    import webdataset

    preprocess, tokenizer = _preprocessing(trial)
    dataset = (
        webdataset.WebDataset(list(trial.shards), shardshuffle=100, seed=0)
        .shuffle(_SAMPLE_SHUFFLE)
        .decode("pilrgb")
        .to_tuple("jpg;png;jpeg;webp", "txt")
        .map_tuple(preprocess, lambda text: tokenizer(text)[0])
        .batched(trial.batch, partial=False)
        .repeat()
    )
    yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=trial.workers)


def _preprocessing(trial: LoaderTrial) -> tuple[Any, Any]:
    from open_clip import get_tokenizer
    from open_clip.transform import image_transform

    return image_transform(trial.size, is_train=True, aug_cfg={"scale": trial.crop_scale}), get_tokenizer(_MODEL)


LOADERS = {"dualstream": dualstream, "open_clip": open_clip_pipeline, "webdataset": webdataset_pipeline}


def parse(text: str) -> LoaderTrial:
    """A trial from its JSON."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
    return LoaderTrial(**fields)


def dump(trial: LoaderTrial) -> str:
    """A trial as JSON."""
    return json.dumps(asdict(trial))


def main(argv: list[str]) -> None:
    """Run the trial `argv[0]` on its cores alone."""
    trial = parse(argv[0])
    os.sched_setaffinity(0, trial.cores)
    with closing(LOADERS[trial.loader](trial)) as batches:
        print(json.dumps(measure(batches, trial)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
