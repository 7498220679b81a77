"""From the settings to the corpora and the stream that a run trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_tools.corpus import Corpus, open_corpus
from data_tools.media.members import fitting, parse_fields
from data_tools.remote.settings import CacheSettings, default_settings
from pretrain.config.batch import local_batch
from pretrain.config.tree import ImageDataConfig, ImageSource
from pretrain.process.runtime import Runtime
from pretrain.stream.loader import FieldsOf, StreamSettings, StreamSource, TrainStream
from pretrain.towers.adapt import AdaptedConfig


def train_sources(data: ImageDataConfig) -> list[StreamSource]:
    """The sources of `data.train` with their shares of a global batch: `weight`, or else size times `repeat`."""
    return [_source(source, open_corpus(source.urls, cache_settings(data))) for source in data.train]


def cache_settings(data: ImageDataConfig) -> CacheSettings:
    """Where remote shards are kept."""
    return default_settings(data.cache_dir, data.cache_gib)


def _source(source: ImageSource, corpus: Corpus) -> StreamSource:
    mapping = fitting(parse_fields(source.image, source.captions), corpus)
    weight = corpus.num_samples * source.repeat if source.weight is None else source.weight
    return StreamSource(corpus, mapping, source.choose, weight, source.repeat)


def train_stream(
    config: AdaptedConfig,
    sources: Sequence[StreamSource],
    fields: FieldsOf,
    runtime: Runtime,
    inspect_only: bool = False,
) -> TrainStream:
    """This rank's stream. `inspect_only`: read in this process and write down no bad samples."""
    share, folder = local_batch(config, runtime.world_size), Path(config.run.dir)
    settings = StreamSettings(
        fields=fields,
        seed=config.seed,
        global_batch=config.train.global_batch,
        window=config.data.window,
        micro_batch=config.train.micro_batch or share,
        phases=config.phases,
        rank=runtime.rank,
        world_size=runtime.world_size,
        workers=0 if inspect_only else config.data.workers,
        max_bad_ratio=config.data.max_bad_ratio,
        quarantine=None if inspect_only else folder / f"quarantine-{runtime.rank}.jsonl",
        node_ranks=runtime.node_ranks if runtime.local_rank == 0 and not inspect_only else None,
        changed_shards=folder / f"changed-shards-{runtime.rank}.jsonl" if config.data.verify_shards else None,
    )
    return TrainStream(sources, settings)
