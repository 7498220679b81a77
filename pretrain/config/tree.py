"""The one tree of settings, as frozen dataclasses. Read from YAML by `reading.py`, checked by `check.py`.

A setting is declared with its default and its rule; what must hold between settings stands in the `check()` of the
smallest section that has them. Values that follow from others (steps, the rank's batch, the DeepSpeed JSON) are never
stored: they are computed where they are used. Nothing here imports torch, so `--help` and config errors answer at once.
The comment beside or above a setting is its text in configs/README.md (`python -m pretrain.config.page`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

from data_tools.remote.settings import DEFAULT_GIB
from pretrain.config.declare import (
    Fault,
    Parsed,
    PartNames,
    Section,
    break_rule,
    choice,
    number,
    setting,
    span,
    unknown_parts,
)
from pretrain.config.durations import FOREVER, parse_duration
from pretrain.config.running import CheckpointConfig, GuardConfig, LogConfig, ProfileConfig, RunConfig

PRECISIONS = ("auto", "fp32", "bf16")
LOSS_NAMES = ("infonce", "multi_positive", "sigmoid", "margin")  # of pretrain/objectives
TEMPLATE_NAMES = ("photo", "simple", "openai")  # of pretrain/evaluate/templates.py


@dataclass(frozen=True)
class Source(Section):
    """One corpus of shards: a packed folder, its manifest.json, a folder of tars, a tar, or a brace or glob pattern of
    these; or the URL of a folder, manifest or tars (braces only).

    Several sources are mixed in every global batch: by `weight`, or else by size times `repeat`."""

    urls: str = "???"  # where the shards are
    # Share of every global batch, relative to the other sources'; null: by size.
    weight: float | None = number(None, ge=1e-6, le=1e12, remedy="take the source out to switch it off")
    repeat: float = number(1.0, ge=1e-6, le=1e6)  # how often an epoch counts the source
    image: str | None = None  # extensions of the image member, `;` between; null: any known one
    # Where the texts are, `;` between; the first place that has any is taken: `txt` is a member, whose lines are one
    # caption; `lines` takes each of its lines for one; `json:FIELD` is a field (dots go deeper) with a text or a list.
    captions: str = "json:captions;txt"
    # Which of several captions is used: random (a hash of seed, epoch and sample id) | first.
    choose: str = choice("random", "first")

    def check(self) -> Iterator[Fault]:
        """A share is given in one way."""
        if self.weight is not None and self.repeat != 1:
            yield Fault("repeat", "1 beside a weight", "set one of the two")


@dataclass(frozen=True)
class DataConfig(Section):
    """The training stream. The crop, `flip`, `color_jitter` and `word_dropout` are drawn by a hash of seed, epoch and
    sample id."""

    train: list[Source] = field(default_factory=list)  # at least one: a path, a list of paths, or of sources as below
    # Loader processes per rank; 0 decodes in the training process.
    workers: int = number(1, ge=0, le=512, remedy="0 decodes in the training process; it is per rank")
    window: int = number(16384, ge=1, le=2**31 - 1)  # samples of one canonical stream that are shuffled together
    # Share of the image area that the random crop keeps, from and to.
    crop_scale: tuple[float, float] = number((0.9, 1.0), gt=0, le=1, remedy="two numbers: 0 < low <= high <= 1")
    # Share of the pictures that are mirrored.
    flip: float = number(0.0, ge=0, le=1, remedy="0.5 mirrors every other picture")
    # Brightness, contrast and saturation times factors up to this far from 1.
    color_jitter: float = number(0.0, ge=0, le=1, remedy="0.4 is usual")
    word_dropout: float = number(0.0, ge=0, lt=1)  # share of a caption's words that are left out (pretraining)
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


# Settings that some losses alone know, and those losses.
_OF_SOME_LOSSES = {
    "label_smoothing": ("infonce", "multi_positive"),
    "margin": ("margin",),
    "negatives": ("margin",),
    "temperature": ("infonce", "multi_positive", "sigmoid"),
    "learn_temperature": ("infonce", "multi_positive", "sigmoid"),
    "logit_bias": ("sigmoid",),
}


@dataclass(frozen=True)
class LossConfig(Section):
    """The contrastive loss of pretraining. A setting that belongs to some losses alone names them first."""

    # infonce (CLIP) | multi_positive (InfoNCE in which pairs that share an image or a text, by hash, are no negatives)
    # | sigmoid (SigLIP) | margin (VSE++).
    name: str = choice(*LOSS_NAMES)
    # infonce, multi_positive: share of the target that is spread over the batch.
    label_smoothing: float = number(0.0, ge=0, lt=1)
    # margin: by how much the cosine of a pair must exceed that of its negatives.
    margin: float = number(0.2, gt=0, le=2, remedy="cosines lie between -1 and 1")
    negatives: str = choice("sum", "hardest")  # margin: of all negatives | the hardest of each image and of each text
    # 1 / logit_scale at the start; null: model.init's, else 0.07 (sigmoid: 0.1).
    temperature: float | None = number(None, ge=0.01, le=1, remedy="the logit scale stays below 100")
    learn_temperature: bool = True  # all but margin: whether the temperature is trained
    # sigmoid: at the start; null: model.init's, else -ln(global batch).
    logit_bias: float | None = number(None, ge=-100, le=0, remedy="null: -ln(global batch)")

    def check(self) -> Iterator[Fault]:
        """What the loss does not know is left as it is."""
        for name, losses in _OF_SOME_LOSSES.items():
            silent = getattr(LossConfig, name)
            if self.name not in losses and getattr(self, name) != silent:
                yield Fault(name, f"{'null' if silent is None else silent} at loss.name={self.name}")


@dataclass(frozen=True)
class PartConfig(Section):
    """How one part of the model learns where it differs from the others: `optim.parts.text.lr=1e-4`."""

    # Rate of the part; null: optim.lr.
    lr: float | None = number(None, ge=1e-12, le=100, remedy="model.locked stops a part")
    weight_decay: float | None = number(None, ge=0, le=100)  # of the part; null: optim.weight_decay


@dataclass(frozen=True)
class OptimConfig(Section):
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
    # Decay of a moving average of the weights, evaluated and saved too; null: none.
    ema: float | None = number(None, gt=0, lt=1, remedy="0.9999 averages some 10,000 updates")
    # Global norm that gradients are cut to; null: no clipping.
    grad_clip: float | None = number(None, ge=1e-12, le=1e12, remedy="null switches clipping off")


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
    """Evaluation during training."""

    every: str | None = span(None)  # how often; null: only at the end
    retrieval: str | None = None  # a corpus with captions, like data.train.0.urls: recall and loss; null: none
    classification: str | None = None  # a corpus with labels: accuracies; null: none
    captions: str = "json:captions;txt"  # where the texts of `retrieval` are, as in data.train
    templates: str = "photo"  # zero-shot prompts: photo | simple | openai | a file, {c} for the class in each line
    batch: int = number(128, ge=1, le=2**20)  # images per rank and forward


@dataclass(frozen=True)
class Config(Section):
    """What every training has."""

    seed: int = number(0, ge=0, le=2**64 - 1)  # of the order of the samples, their augmentation and random weights
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    PARTS: ClassVar[tuple[str, ...]] = ()  # what optim.parts may name
    TOWERS: ClassVar[tuple[str, ...]] = ()  # those of them that can checkpoint their activations

    def check(self) -> Iterator[Fault]:
        """The schedule fits the run, the optimizer the ZeRO stage, parts are the model's, and the best checkpoint is
        told by something."""
        yield from unknown_parts("optim.parts", self.optim.parts, self.PARTS)
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
        if self.checkpoint.keep_best is not None and self.eval.retrieval is None and self.eval.classification is None:
            yield Fault("checkpoint.keep_best", "an evaluation", "set eval.retrieval or eval.classification")


@dataclass(frozen=True)
class PretrainConfig(Config):
    """Settings of `launch/pretrain.py`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    PARTS = TOWERS = ("image", "text")

    def check(self) -> Iterator[Fault]:
        """Something learns, and what is locked has no rate."""
        yield from super().check()
        yield from unknown_parts("model.locked", self.model.locked, self.TOWERS)
        if set(self.TOWERS) <= set(self.model.locked):
            yield Fault("model.locked", "a list that leaves a part to learn")
        if locked := [name for name in self.optim.parts if name in self.model.locked]:
            yield Fault("optim.parts", f"parts that learn, and {', '.join(locked)} is locked", "leave it out")


# Settings that fine-tuning shares with pretraining and would not heed, and their values where nothing is said.
_NOT_OF_FINETUNING = {
    "optim.ema": None,
    "eval.retrieval": None,
    "eval.captions": EvalConfig.captions,
    "eval.templates": EvalConfig.templates,
    "data.word_dropout": 0.0,
}


def _check_classes(value: Any, name: str) -> None:
    """YAML reads yes, no and null as other things than names."""
    many = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int) and not isinstance(one, bool) and str(one).strip() for one in many):
        remedy = "put quotes around names that YAML takes for something else (yes, no, null)"
        break_rule(name, value, "a list of names, a file with one a line, a count, or null", remedy)


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """Settings of `launch/finetune.py`."""

    # What model.init takes, or an architecture with `random: true`.
    init: str = "???"
    architecture: str | None = None  # of a bare weights file in `init`: an open_clip name or the path of its JSON
    random: bool = False  # start from nothing, for a baseline
    init_ema: bool = False  # from the moving average of its weights (optim.ema)
    mode: str = choice("linear", "full", default="full")  # linear: only the head learns | full: the image tower too
    # Pixels; null: as pretrained, else position embeddings are interpolated.
    image_size: int | None = number(None, ge=1, le=16384)
    zero_shot_head: bool = True  # start the head from the text tower's class weights; false: from zeros
    templates: str = "photo"  # prompts of those class weights: photo | simple | openai | a file
    # Names of the labels 0, 1, ... where the shards carry none (tars of other tools), or other names: a list, a file
    # with one a line, or a count; null: as packed.
    classes: Any = setting(None, Parsed(_check_classes, ""))

    PARTS, TOWERS = ("image", "head"), ("image",)

    def check(self) -> Iterator[Fault]:
        """What fine-tuning would not heed is left as it is."""
        yield from super().check()
        where = "in fine-tuning: labels, one tower, no average"
        for name, silent in _NOT_OF_FINETUNING.items():
            if attrgetter(name)(self) != silent:
                yield Fault(name, f"{'null' if silent is None else silent} {where}")
        if self.mode == "linear" and "image" in self.optim.parts:
            yield Fault("optim.parts", "head alone at mode=linear")
