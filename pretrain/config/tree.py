"""The one tree of settings, as frozen dataclasses. Read from YAML by `reading.py`, checked by `check.py`.

A setting is declared with its default and its rule; what must hold between settings stands in the `check()` of the
smallest section that has them. Values that follow from others (steps, the rank's batch, the DeepSpeed JSON) are never
stored: they are computed where they are used. Nothing here imports torch, so `--help` and config errors answer at once.
The comment beside or above a setting is its text in configs/README.md (`python -m pretrain.tasks.page`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from data_tools.remote.settings import DEFAULT_GIB
from pretrain.config.declare import (
    Fault,
    PartNames,
    Section,
    choice,
    number,
    setting,
    span,
    unknown_parts,
)
from pretrain.config.durations import FOREVER, parse_duration
from pretrain.config.running import CheckpointConfig, GuardConfig, LogConfig, ProfileConfig, RunConfig

PRECISIONS = ("auto", "fp32", "bf16")
CAPTION_CHOICES = ("random", "first")
TEMPLATE_NAMES = ("photo", "simple", "openai")  # of pretrain/evaluate/templates.py


@dataclass(frozen=True)
class ImageSource(Section):
    """One corpus of shards: a packed folder, its manifest.json, a folder of tars, a tar, or a brace or glob pattern of
    these; or the URL of a folder, manifest or tars (braces only).

    Several sources are mixed in every global batch: by `weight`, or else by size times `repeat`."""

    urls: str = "???"  # where the shards are
    # Share of every global batch, relative to the other sources'; null: by size.
    weight: float | None = number(None, ge=1e-6, le=1e12, remedy="take the source out to switch it off")
    repeat: float = number(1.0, ge=1e-6, le=1e6)  # how often an epoch counts the source
    image: str | None = None  # extensions of the image member, `;` between; null: any known one

    @property
    def captions(self) -> str | None:
        """Where the texts are; None: where they usually are."""
        return None

    @property
    def choose(self) -> str:
        """Which of several captions is used."""
        return CAPTION_CHOICES[0]

    def check(self) -> Iterator[Fault]:
        """A share is given in one way."""
        if self.weight is not None and self.repeat != 1:
            yield Fault("repeat", "1 beside a weight", "set one of the two")


@dataclass(frozen=True)
class Source(ImageSource):
    """Of a corpus of images and their texts."""

    # Where the texts are, `;` between; the first place that has any is taken: `txt` is a member, whose lines are one
    # caption; `lines` takes each of its lines for one; `json:FIELD` is a field (dots go deeper) with a text or a list.
    captions: str = "json:captions;txt"
    # Which of several captions is used: random (a hash of seed, epoch and sample id) | first.
    choose: str = choice(*CAPTION_CHOICES)


@dataclass(frozen=True)
class ImageDataConfig(Section):
    """The training stream. What is random in it is drawn by a hash of seed, epoch and sample id."""

    train: list[ImageSource] = field(default_factory=list)  # at least one: a path, a list of paths, or of sources
    # Loader processes per rank; 0 decodes in the training process.
    workers: int = number(1, ge=0, le=512, remedy="0 decodes in the training process; it is per rank")
    window: int = number(16384, ge=1, le=2**31 - 1)  # samples of one canonical stream that are shuffled together
    # Share of the image area that the random crop keeps, from and to.
    crop_scale: tuple[float, float] = number((0.9, 1.0), gt=0, le=1, remedy="two numbers: 0 < low <= high <= 1")
    # Share of the pictures that are mirrored.
    flip: float = number(0.0, ge=0, le=1, remedy="0.5 mirrors every other picture")
    # Brightness, contrast and saturation times factors up to this far from 1.
    color_jitter: float = number(0.0, ge=0, le=1, remedy="0.4 is usual")
    scaled_decode: bool = True  # decode JPEGs no larger than the crop needs; false: full size, bit for bit
    # Share of samples that may be bad (replaced and listed); more end the run.
    max_bad_ratio: float = number(0.01, ge=0, lt=1)
    verify_shards: bool = False  # hash each shard once a node as its reading begins; changed-shards-RANK.jsonl has them
    cache_dir: str | None = None  # on a disk of the node, for remote shards in dualstream/shards; null: ~/.cache
    # GiB of that cache at most; what was used least recently makes room.
    cache_gib: float = number(
        DEFAULT_GIB, gt=0, le=1e6, remedy="the shards that the ranks of a node read at a time must fit"
    )

    def check(self) -> Iterator[Fault]:
        """There are sources, all weighted or none, and no corpus stands there twice."""
        if not self.train:
            yield Fault("train", "at least one source", "data.train=FOLDER")
        if self.crop_scale[0] > self.crop_scale[1]:
            yield Fault("crop_scale", "0 < low <= high <= 1")
        weighted = [source.weight is not None for source in self.train]
        if any(weighted) and not all(weighted):
            rule = "a weight for every source or for none"
            yield Fault(f"train.{weighted.index(False)}.weight", rule, "without weights sizes and `repeat` decide")
        read = [(source.urls, source.image, source.captions) for source in self.train]
        for place, one in enumerate(read):
            if one in read[:place]:
                rule = "not the corpus of a source before it"
                yield Fault(f"train.{place}.urls", rule, "repeat: 2 counts one twice")

    @property
    def word_dropout(self) -> float:
        """Share of a caption's words that are left out."""
        return 0.0


@dataclass(frozen=True)
class DataConfig(ImageDataConfig):
    """Images with their texts."""

    train: list[Source] = field(default_factory=list)  # type: ignore[assignment]
    word_dropout: float = number(0.0, ge=0, lt=1)  # share of a caption's words that are left out
    # What samples may lack (image, text, or a field of an objective): such a one counts where it has what is compared,
    # so that corpora of pairs and of texts alone can be mixed. Else a sample that lacks something is a bad one.
    optional: list[str] = setting([], PartNames())


@dataclass(frozen=True)
class Phase(Section):
    """A cheaper beginning of a run: smaller pictures, or patches left out (FLIP, arXiv 2212.00794). null: as the
    architecture has it, and so are all that comes after the last phase, and every evaluation."""

    until: str = span("???")  # where the phase ends, counted from the run's start
    # Pixels, whole patches; position embeddings are interpolated to them.
    image_size: int | None = number(None, ge=1, le=16384)
    patch_dropout: float | None = number(None, ge=0, lt=1)  # share of an image's patches

    def check(self) -> Iterator[Fault]:
        """It differs from what comes after it."""
        if self.image_size is None and self.patch_dropout is None:
            yield Fault("image_size", "an image_size or a patch_dropout of its own", "take the phase out")


@dataclass(frozen=True)
class ModelConfig(Section):
    """The towers of pretraining."""

    name: str = "ViT-B-32"  # an open_clip architecture, or the path of its JSON
    phases: list[Phase] = field(default_factory=list)  # cheaper beginnings of the run, in order
    # Weights to start from: a run, checkpoint or export folder, a folder of open_clip or of transformers' CLIP, or an
    # open_clip weights file; null: random ones, by the seed.
    init: str | None = None
    # Parts (image, text) that keep their weights, those of model.init, which may lack the rest (LiT, arXiv 2111.07991).
    locked: list[str] = setting([], PartNames())
    # Captions of a micro-batch sorted by length and cut to the longest of each bucket (exact).
    text_buckets: int = number(4, ge=1, le=1024)

    def check(self) -> Iterator[Fault]:
        """A part that never learns has weights from somewhere."""
        if self.locked and self.init is None:
            yield Fault("locked", "none without model.init", "set model.init")


@dataclass(frozen=True)
class PartConfig(Section):
    """How one part of the model learns where it differs from the others: `optim.parts.text.lr=1e-4`."""

    # Rate of the part; null: optim.lr.
    lr: float | None = number(None, ge=1e-12, le=100, remedy="model.locked stops a part")
    weight_decay: float | None = number(None, ge=0, le=100)  # of the part; null: optim.weight_decay


@dataclass(frozen=True)
class PlainOptimConfig(Section):
    """The optimizer, and a schedule keyed on samples seen, so that a change of world size or batch does not move it."""

    # adamw | lion (one tensor a parameter where AdamW keeps two; wants betas of about 0.9 and 0.99, a rate 3 to 10
    # times lower than AdamW's and as much more weight decay) | lamb, muon (train.zero_stage=0).
    name: str = choice("adamw", "lion", "lamb", "muon")
    lr: float = number(5e-4, ge=1e-12, le=100)  # peak learning rate
    # Decay of the averages of gradients and of their squares.
    betas: tuple[float, float] = number((0.9, 0.98), ge=0, lt=1, remedy="two numbers, such as [0.9, 0.98]")
    eps: float = number(1e-6, ge=1e-30, le=1)  # adamw, lamb: added to the denominator
    # Of matrices, times the rate; vectors and scalars do not decay.
    weight_decay: float = number(0.2, ge=0, le=100)
    # What single parts have of their own: image and text, or image and head in fine-tuning.
    parts: dict[str, PartConfig] = field(default_factory=dict)
    # Each layer of a tower learns at this share of the rate of the one above (BEiT).
    layer_decay: float = number(1.0, gt=0, le=1, remedy="1.0 gives all layers one rate")
    decay_embeddings: bool = False  # whether position embeddings decay too, as they do in open_clip 3.3
    # Of the rate, after the warmup: cosine (to zero at the end) | constant.
    schedule: str = choice("cosine", "constant")
    warmup: str = span("0 steps", zero=True)  # how long the rate rises from zero at the start
    # constant: how long the rate falls to zero at the end (warmup-stable-decay).
    cooldown: str = span("0 steps", zero=True)
    # Global norm that gradients are cut to; null: no clipping.
    grad_clip: float | None = number(None, ge=1e-12, le=1e12, remedy="null switches clipping off")

    @property
    def ema(self) -> float | None:
        """Decay of a moving average of the weights; None: there is none."""
        return None


@dataclass(frozen=True)
class OptimConfig(PlainOptimConfig):
    """With an average of the weights."""

    # Decay of a moving average of the weights, evaluated and saved too; null: none.
    ema: float | None = number(None, gt=0, lt=1, remedy="0.9999 averages some 10,000 updates")


@dataclass(frozen=True)
class TrainConfig(Section):
    """How long, how large, how precise."""

    duration: str = span("1 epoch", endless=True)  # of the run; or forever, with optim.schedule=constant
    # Pairs (pictures in fine-tuning) of a step over all ranks, which must divide it.
    global_batch: int = number(256, ge=1, le=2**30)
    # Pairs of a forward; fewer than the rank's share turn on the gradient cache (GradCache, arXiv 2101.06983): same
    # gradients, less memory. null: the rank's share in one forward.
    micro_batch: int | None = number(None, ge=1, le=2**30)
    # bf16 (autocast over fp32 parameters) | fp32 | auto: as the checkpoint that the run goes on from, else bf16 where
    # all ranks' devices have it in hardware. It is said at the start.
    precision: str = choice(*PRECISIONS)
    # ZeRO (arXiv 1910.02054): 0 shares nothing among ranks, 1 optimizer states, 2 gradients too, 3 parameters too.
    zero_stage: int = choice(0, 1, 2, 3, default=1)
    # Towers (image, text) whose layers keep their input alone and run again in the backward: same gradients, less
    # memory, up to a third more work.
    grad_checkpointing: list[str] = setting([], PartNames())
    # From stage 1: the optimizer's states, its fp32 master and its update live on the host (ZeRO-Offload, arXiv
    # 2101.06840), which frees the memory of GPUs; without GPUs it changes nothing.
    offload_optimizer: bool = False
    # To stage 2: the towers run through torch.compile; the first steps take minutes, and on CPUs it gains nothing.
    compile: bool = False

    def check(self) -> Iterator[Fault]:
        """The ZeRO stage allows what else is asked for, and there is something to tell a sample apart from."""
        if self.global_batch < 2:
            rule = ">= 2: the other samples of a batch are what one is told apart from"
            yield Fault("global_batch", rule, "without any the loss is 0 and nothing learns")
        if self.offload_optimizer and self.zero_stage == 0:
            yield Fault("offload_optimizer", "false at train.zero_stage=0", "set train.zero_stage=1")
        if self.compile and self.zero_stage == 3:
            rule = (
                "0, 1 or 2 beside train.compile: at 3 a layer's weights come and go in hooks that a graph cannot hold"
            )
            yield Fault("zero_stage", rule)


@dataclass(frozen=True)
class EvalConfig(Section):
    """When `evaluators` run, and how."""

    every: str | None = span(None)  # how often; null: only at the end
    batch: int = number(128, ge=1, le=2**20)  # images per rank and forward


@dataclass(frozen=True)
class Config(Section):
    """What every training has. What the task is adds its own settings, and none that it would not heed."""

    # What is trained. Left out: contrastive by launch/pretrain.py, classify by launch/finetune.py.
    task: str = "???"
    seed: int = number(0, ge=0, le=2**64 - 1)  # of the order of the samples, their augmentation and random weights
    run: RunConfig = field(default_factory=RunConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    optim: PlainOptimConfig = field(default_factory=PlainOptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    PARTS: ClassVar[tuple[str, ...]] = ()  # what optim.parts may name, whatever else is set
    TOWERS: ClassVar[tuple[str, ...]] = ()  # those of them that can checkpoint their activations

    @property
    def parts(self) -> Sequence[str]:
        """What optim.parts may name."""
        return self.PARTS

    def check(self) -> Iterator[Fault]:
        """The schedule fits the run, the optimizer the ZeRO stage, and parts are the model's."""
        yield from unknown_parts("optim.parts", self.optim.parts, self.parts)
        yield from unknown_parts("train.grad_checkpointing", self.train.grad_checkpointing, self.TOWERS)
        optim, forever = self.optim, self.train.duration == FOREVER
        if forever and optim.schedule != "constant":
            yield Fault("optim.schedule", "constant, because train.duration is forever")
        if parse_duration(optim.cooldown, "optim.cooldown")[0] > 0 and (optim.schedule != "constant" or forever):
            rule = "0 steps, unless optim.schedule is constant and train.duration ends"
            remedy = "a run that went on forever cools down when it is resumed with a duration"
            yield Fault("optim.cooldown", rule, remedy)
        if optim.name in ("lamb", "muon") and self.train.zero_stage > 0:
            rule = f"0 at optim.name={optim.name}, which looks at whole matrices"
            yield Fault("train.zero_stage", rule, "adamw and lion work at every stage")
