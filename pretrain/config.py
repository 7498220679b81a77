"""The one tree of settings, as frozen dataclasses. Read from YAML by `settings.py`, checked by `rules.py`.

Values that follow from others (steps, the rank's batch, the DeepSpeed JSON) are never stored: they are computed where
they are used. Nothing here imports torch, so `--help` and config errors answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_tools.remote.settings import DEFAULT_GIB


@dataclass(frozen=True)
class Source:
    """One corpus of shards: a packed folder, its manifest.json, a folder of tars, a tar, or a brace or glob pattern of
    these; or the URL of a folder, manifest or tars (braces only).

    Several sources are mixed in every global batch: by `weight` (relative to the others'), or else by size times
    `repeat`, which makes an epoch count a source so often. `image`: extensions of the image member, `;` between; null:
    any known one. `captions`: where the texts are, the first place that has any: `txt` is a member, whose lines are one
    caption, `lines` takes each of its lines for one, `json:FIELD` is a field (dots go deeper) with one text or a list.
    `choose`: which of several is used: random (by a hash of seed, epoch and sample id) | first.
    """

    urls: str = "???"
    weight: float | None = None
    repeat: float = 1.0
    image: str | None = None
    captions: str = "json:captions;txt"
    choose: str = "random"


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives. On several hosts `dir` must be on a file system that all of them share."""

    dir: str = "???"
    resume: str = (
        "auto"  # auto: continue from the newest intact checkpoint in dir | never: refuse a folder that holds one
    )


@dataclass(frozen=True)
class DataConfig:
    """The training stream. `window`: samples of one canonical stream that are shuffled together. The crop, `flip`,
    `color_jitter` and `word_dropout` are drawn by a hash of seed, epoch and sample id."""

    train: list[Source] = field(default_factory=list)
    workers: int = 1  # loader processes per rank; 0 decodes in the training process
    window: int = 16384
    crop_scale: tuple[float, float] = (0.9, 1.0)  # share of the image area kept by the random crop
    flip: float = 0.0  # share of the pictures that are mirrored
    color_jitter: float = 0.0  # brightness, contrast and saturation times factors up to this far from 1
    word_dropout: float = 0.0  # share of a caption's words that are left out (pretraining)
    scaled_decode: bool = True  # decode JPEGs no larger than the crop needs; false: full size, bit for bit
    max_bad_ratio: float = 0.01
    cache_dir: str | None = None  # on a disk of the node, for remote shards in dualstream/shards; null: ~/.cache
    cache_gib: float = DEFAULT_GIB  # at most; what was used least recently makes room


@dataclass(frozen=True)
class Phase:
    """A cheaper beginning of a run, up to `until` (epochs | steps | samples, counted from its start): smaller pictures,
    or patches left out (FLIP, arXiv 2212.00794). null: as the architecture has it, and so are all that comes after the
    last phase, and every evaluation.
    """

    until: str = "???"
    image_size: int | None = None  # pixels, whole patches; position embeddings are interpolated to them
    patch_dropout: float | None = None  # share of an image's patches


@dataclass(frozen=True)
class ModelConfig:
    """The towers. `name`: an open_clip architecture or the path of its JSON; `init`: weights to start from: a run,
    checkpoint or export folder, a folder of open_clip or of transformers' CLIP, or an open_clip weights file."""

    name: str = "ViT-B-32"
    phases: list[Phase] = field(default_factory=list)
    init: str | None = None
    locked: str = "none"  # none | image | text: this tower keeps its weights, those of `init`, which may lack the other
    text_buckets: int = 4  # captions of a micro-batch sorted by length and cut to the longest of each bucket (exact)


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss, by its name in pretrain/losses: infonce (CLIP), multi_positive (InfoNCE in which pairs that
    share an image or a text, by hash, are no negatives), sigmoid (SigLIP) or margin (VSE++).
    """

    name: str = "infonce"
    label_smoothing: float = 0.0  # infonce, multi_positive: share of the target that is spread over the batch
    margin: float = 0.2  # margin: by how much the cosine of a pair must exceed that of its negatives
    negatives: str = "sum"  # margin: of all negatives | the hardest of each image and of each text
    temperature: float | None = None  # 1 / logit_scale at the start; null: model.init's, else 0.07 (sigmoid: 0.1)
    learn_temperature: bool = True
    logit_bias: float | None = None  # sigmoid: at the start; null: model.init's, else -ln(global batch)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, and a schedule keyed on samples seen, so that a change of world size or batch does not move it.
    Lion wants betas of about 0.9 and 0.99, a rate 3 to 10 times lower than AdamW's, and as much more weight decay."""

    name: str = "adamw"  # adamw | lion (one tensor a parameter where AdamW keeps two) | lamb, muon (train.zero_stage=0)
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6  # adamw, lamb
    weight_decay: float = 0.2
    image_lr: float | None = None  # of the image tower; null: lr
    text_lr: float | None = None
    image_weight_decay: float | None = None  # of the image tower; null: weight_decay
    text_weight_decay: float | None = None
    layer_decay: float = 1.0  # each layer of a tower learns at this share of the rate of the one above (BEiT)
    decay_embeddings: bool = False  # whether position embeddings decay too, as they do in open_clip 3.3
    schedule: str = "cosine"  # cosine | constant
    warmup: str = "0 steps"
    cooldown: str = "0 steps"  # constant: how long the rate falls to zero at the end (warmup-stable-decay)
    ema: float | None = None  # decay of a moving average of the weights, evaluated and saved too; null: none
    grad_clip: float | None = None  # global gradient norm; null: no clipping


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, how precise. `micro_batch`: pairs per forward; smaller than the rank's share turns on the
    gradient cache (GradCache, arXiv 2101.06983): same gradients, less memory. null: the rank's share in one forward.
    `grad_checkpointing`: towers whose layers keep their input alone and run again in the backward: same gradients, less
    memory, up to a third more work. `offload_optimizer`: the optimizer's states, its fp32 master and its update live on
    the host (ZeRO-Offload, arXiv 2101.06840), which frees the memory of GPUs; without GPUs it changes nothing.
    `compile`: train the towers through torch.compile; the first steps take minutes, and on CPUs it gains nothing.
    """

    duration: str = "1 epoch"  # epochs | steps | samples, or forever with optim.schedule=constant
    global_batch: int = 256
    micro_batch: int | None = None
    precision: str = (
        "auto"  # bf16 (autocast over fp32 parameters) | fp32 | auto: bf16 where all devices have units for it
    )
    zero_stage: int = 1
    grad_checkpointing: str = "none"  # none | image | text | both
    offload_optimizer: bool = False  # from stage 1
    compile: bool = False  # to stage 2


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training. `retrieval` and `classification` are corpora like `data.train`'s; null skips them."""

    every: str | None = None  # null: only at the end
    retrieval: str | None = None
    classification: str | None = None
    captions: str = "json:captions;txt"  # where the texts of `retrieval` are, as in data.train
    templates: str = "photo"  # photo | simple | openai | a file with one template a line, {c} for the class
    batch: int = 128  # images per rank and forward


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save (besides the end and a signal) and which committed checkpoints stay: the newest `keep`, and those
    that the other two rules name."""

    every: str | None = "1 epoch"
    keep: int = 2
    keep_every: str | None = None  # save at every multiple of this duration too, and never delete those
    keep_best: str | None = None  # metric of the evaluation, -NAME where lower is better: save and keep the best one


@dataclass(frozen=True)
class LogConfig:
    """Scalars go to metrics.jsonl and TensorBoard every `every`; `images` captioned pictures at every evaluation."""

    every: str = "10 steps"
    images: int = 4


@dataclass(frozen=True)
class GuardConfig:
    """What a run does about faults.

    `max_skipped`: steps of the whole run whose loss or gradient is not finite that are left out on all ranks and listed
    in skipped.jsonl; one more ends the run. `spike`: a loss this many deviations above the recent ones is listed in
    spikes.jsonl and changes nothing (pretrain/guard.py); null: no watch. `hang_timeout`: a rank that makes no progress
    for so long (pretrain/watchdog.py) prints its stacks and ends the run; null: never.
    """

    max_skipped: int = 0
    spike: float | None = 6.0
    hang_timeout: str | None = "20 minutes"


@dataclass(frozen=True)
class ProfileConfig:
    """`steps`: FIRST-LAST, counted from 1: a profiler trace of these steps on rank 0, and a page on where their time
    went, in the run folder. null: none."""

    steps: str | None = None


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `launch/pretrain.py`."""

    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `launch/finetune.py`. `init`: what `model.init` takes, or an architecture with
    `random: true` for the baseline that starts from nothing. `classes`: names of the labels 0, 1, ... where the shards
    carry none (tars of other tools), or other names: a list, a file with one a line, or a count; null: as packed."""

    seed: int = 0
    init: str = "???"
    architecture: str | None = None  # of a bare weights file in `init`: an open_clip name or the path of its JSON
    random: bool = False
    init_ema: bool = False  # from the moving average of its weights (optim.ema)
    mode: str = "full"  # linear: only the head learns | full: the image tower too
    image_size: int | None = None  # pixels; null: as pretrained, else position embeddings are interpolated
    zero_shot_head: bool = True  # start the head from the text tower's class weights; false: from zeros
    templates: str = "photo"
    classes: Any = None  # [cat, dog] | FILE | COUNT | null
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
