"""What every job puts together before its loop: run folder, corpora, stream, and what a checkpoint says of them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from data_tools.corpus import Corpus, open_corpus
from data_tools.errors import UserError, shown
from data_tools.format.commit import atomic_write
from data_tools.media.members import fitting, parse_fields
from data_tools.remote.settings import CacheSettings, default_settings
from pretrain.config.batch import local_batch
from pretrain.config.reading import dump_config
from pretrain.config.recorded import changes, recorded_precision
from pretrain.config.tree import Config, ImageDataConfig, ImageSource
from pretrain.engine.checkpoint import Checkpoints
from pretrain.engine.committed import FOLDER, SETTINGS, committed
from pretrain.engine.state import TrainState
from pretrain.engine.weights import CheckpointReader
from pretrain.process.agree import gather, raise_on_all_ranks
from pretrain.process.precision import settle
from pretrain.process.runtime import Runtime
from pretrain.process.status import Status
from pretrain.report.provenance import git_commit, package_versions
from pretrain.stream.eval_reader import EvalReader, eval_fields
from pretrain.stream.fields import FIELDS
from pretrain.stream.fields.field import Field, FieldContext
from pretrain.stream.fields.image import Image, image_settings
from pretrain.stream.fields.label import Label
from pretrain.stream.fields.text import Text
from pretrain.stream.loader import FieldsOf, StreamSettings, StreamSource, TrainStream
from pretrain.stream.position import Position
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from pretrain.tasks.needs import Needs
from pretrain.towers.cut import TextRule
from pretrain.towers.dropout import without_dropout
from pretrain.towers.heads.equip import Equipment
from pretrain.towers.spec import ModelSpec, tokenizer_of

_Config = TypeVar("_Config", bound=Config)


def train_sources(data: ImageDataConfig) -> list[StreamSource]:
    """The sources of `data.train` with their shares of a global batch: `weight`, or else size times `repeat`."""
    return [_source(source, open_corpus(source.urls, cache_settings(data))) for source in data.train]


def eval_corpus(urls: str, data: ImageDataConfig) -> Corpus:
    """A corpus to evaluate on; remote shards share the cache of the training ones."""
    return open_corpus(urls, cache_settings(data))


def cache_settings(data: ImageDataConfig) -> CacheSettings:
    """Where remote shards are kept."""
    return default_settings(data.cache_dir, data.cache_gib)


def _source(source: ImageSource, corpus: Corpus) -> StreamSource:
    mapping = fitting(parse_fields(source.image, source.captions), corpus)
    weight = corpus.num_samples * source.repeat if source.weight is None else source.weight
    return StreamSource(corpus, mapping, source.choose, weight, source.repeat)


def pair_fields(
    config: ContrastiveConfig, spec: ModelSpec, rule: TextRule | None = None, dropped: Sequence[float] = ()
) -> FieldsOf:
    """The fields of pairs: a caption, cut by `rule`, a picture, and what objectives need beside them. `dropped`: the
    share of patches that each phase and the time after them leaves out; none where it is empty."""
    sizes = [phase.image_size for phase in config.model.phases]
    tokenize = tokenizer_of(spec)

    def fields(source: StreamSource, phase: int) -> dict[str, Field]:
        settings = image_settings(spec, config.data, [*sizes, None][phase])
        share, optional = dropped[phase] if dropped else 0.0, config.data.optional
        text = Text(tokenize, source.mapping, source.choose, config.data.word_dropout, rule, "text" in optional)
        found: dict[str, Field] = {"text": text, "image": Image(settings, source.mapping, share, "image" in optional)}
        for name, own in config.needs.fields.items():
            context = FieldContext(name, source.mapping, source.choose, text, name in optional)
            found[name] = FIELDS[own.type].load().of(own, context)
        return found

    return fields


def equipment_of(needs: Needs) -> Equipment:
    """What a dual encoder has beside its towers for objectives with these needs."""
    encoder_of = {name: one.ENCODER for name, one in needs.fields.items() if one.ENCODER is not None}
    sizes = {name: one.width for name, one in needs.fields.items() if one.width is not None}
    return Equipment(encoder_of, sizes, needs.heads)


def label_fields(config: ClassifyConfig, spec: ModelSpec, classes: int, dropped: float = 0.0) -> FieldsOf:
    """The fields of labelled images: a number below `classes`, and a picture. `dropped`: the share of patches left
    out."""
    settings = image_settings(spec, config.data)
    return lambda source, _: {"label": Label(classes), "image": Image(settings, source.mapping, dropped)}


def train_stream(
    config: Config, sources: Sequence[StreamSource], fields: FieldsOf, runtime: Runtime, inspect_only: bool = False
) -> TrainStream:
    """This rank's stream. `inspect_only`: read in this process and write down no bad samples."""
    share, folder = local_batch(config, runtime.world_size), Path(config.run.dir)
    settings = StreamSettings(
        fields=fields,
        seed=config.seed,
        global_batch=config.train.global_batch,
        window=config.data.window,
        micro_batch=config.train.micro_batch or share,
        phases=config.model.phases if isinstance(config, ContrastiveConfig) else (),
        rank=runtime.rank,
        world_size=runtime.world_size,
        workers=0 if inspect_only else config.data.workers,
        max_bad_ratio=config.data.max_bad_ratio,
        quarantine=None if inspect_only else folder / f"quarantine-{runtime.rank}.jsonl",
        node_ranks=runtime.node_ranks if runtime.local_rank == 0 and not inspect_only else None,
        changed_shards=folder / f"changed-shards-{runtime.rank}.jsonl" if config.data.verify_shards else None,
    )
    return TrainStream(sources, settings)


def eval_reader(config: Config, corpus: Corpus, spec: ModelSpec, captions: bool, runtime: Runtime) -> EvalReader:
    """This rank's evaluation reader, with or without captions."""
    tokenize = tokenizer_of(spec) if captions else None
    fields = eval_fields(corpus, spec, tokenize, parse_fields(None, config.eval.captions if captions else None))
    return EvalReader(corpus, fields, config.eval.batch, runtime.rank, runtime.world_size, config.data.workers)


def settle_precision(config: _Config, runtime: Runtime) -> _Config:
    """`config` with the precision that all ranks compute in, that of the run's newest checkpoint where `auto` leaves it
    open; it is printed, and a warning where it is slow here. All ranks must call it."""
    saved = reversed(committed(Path(config.run.dir) / FOLDER))
    recorded = next(filter(None, (recorded_precision(folder / SETTINGS) for folder in saved)), None)
    settled = settle(config.train.precision, runtime.device, recorded)
    if runtime.is_main:
        print("\n".join(settled.lines), flush=True)
    return replace(config, train=replace(config.train, precision=settled.precision))


def claim_run_dir(status: Status, runtime: Runtime) -> None:
    """See that run.dir is this run's and that all ranks share it; from then on any of them may write its status. All
    ranks must call it, once."""
    folder = status.folder
    token = gather(secrets.token_hex(8))[0]
    probe = folder / f".shared-{token}"

    def own() -> None:
        status.own()
        probe.touch()

    def look() -> None:
        if not probe.exists():
            raise UserError(
                f"run.dir {folder.absolute()} is not shared by all hosts",
                got="a folder that rank 0 wrote to and this rank cannot see",
                remedy="set run.dir to a shared file system",
            )

    raise_on_all_ranks(own if runtime.is_main else lambda: None, f"preparing run.dir {folder}")
    raise_on_all_ranks(look, "checking run.dir")
    raise_on_all_ranks(probe.unlink if runtime.is_main else lambda: None, "checking run.dir")
    status.share()


def keep_settings(config: Config, text: str, runtime: Runtime) -> None:
    """Write the resolved settings into run.dir, once a checkpoint there was found to fit them. All ranks must call
    it."""

    def write() -> None:
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / SETTINGS) as file:
            file.write(text.encode())

    raise_on_all_ranks(write if runtime.is_main else lambda: None, f"writing the settings to run.dir {config.run.dir}")


def resolved(config: Config) -> str:
    """The settings as YAML, with the code's commit and the packages' versions as comments."""
    versions = [f"{name} {version}" for name, version in package_versions().items()]
    return f"# commit {git_commit()}\n# {', '.join(versions)}\n{dump_config(config)}"


def find_checkpoint(config: Config, runtime: Runtime) -> CheckpointReader | None:
    """The checkpoint that the run goes on from; None: it starts afresh. To be asked first, for what only a start reads
    may be gone when a run goes on. All ranks must call it.

    Raises:
        UserError: run.resume=never in a folder that holds one; checkpoints of which none is intact.
    """
    found = Checkpoints(config.run.dir, runtime).find()
    if found is not None and config.run.resume == "never":
        raise UserError(
            f"run.dir {config.run.dir} already holds {found.name}",
            expected="an empty folder, because run.resume=never",
            remedy="choose another run.dir, or run.resume=auto to go on from it",
        )
    return None if found is None else CheckpointReader(found)


def start_state(
    reader: CheckpointReader | None, config: Config, description: dict, stream: TrainStream, runtime: Runtime
) -> TrainState:
    """The state that the run starts from, that of `find_checkpoint`'s; `stream` is set to go on from there.

    Raises:
        UserError: another model, corpus, seed or window; a global batch that C does not divide.
    """
    if reader is None:
        return TrainState(position=stream.position(0).to_dict())
    found, state = reader.folder, reader.state()
    refuse_another_model(found, reader.model(), description)
    stream.go_on_from(Position.from_dict(state.position))
    if runtime.is_main:
        print(f"resuming from {found} (step {state.step}, {state.samples_seen} samples)", flush=True)
        if lines := changes((found / SETTINGS).read_text(errors="replace"), resolved(config)):
            print("settings changed since that checkpoint:\n  " + "\n  ".join(lines), flush=True)
    return state


def refuse_another_model(checkpoint: Path, saved: dict, now: dict) -> None:
    """Raises UserError where two descriptions, of the model of `checkpoint` and of the settings', differ."""
    saved, now = without_dropout(saved), without_dropout(now)
    if saved != now:
        raise UserError(
            f"{checkpoint} was written by another model",
            got=_first_difference(saved, now),
            remedy="choose another run.dir, or set the model and the loss it was trained with",
        )


def _first_difference(saved: object, now: object, path: str = "model") -> str:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(set(saved) | set(now)):
            if saved.get(key) != now.get(key):
                return _first_difference(saved.get(key), now.get(key), f"{path}.{key}")
    if isinstance(saved, list) and isinstance(now, list):
        if len(saved) != len(now):
            return f"{path}: {len(now)} of them where the checkpoint has {len(saved)}"
        place = next(place for place, pair in enumerate(zip(saved, now, strict=True)) if pair[0] != pair[1])
        return _first_difference(saved[place], now[place], f"{path}.{place}")
    return f"{path}: {shown(repr(now))} where the checkpoint has {shown(repr(saved))}"


def non_finite_rows(features: Sequence[torch.Tensor]) -> list[int]:
    """Rows of which any of the feature matrices `[b, d]` is not finite."""
    finite = torch.stack([matrix.isfinite().all(dim=1) for matrix in features]).all(dim=0)
    return torch.nonzero(~finite).flatten().tolist()
