"""The one tree of settings, as frozen dataclasses. Read from YAML by `reading.py`, checked by `rules.py`.

Values that follow from others (steps, the rank's batch, the DeepSpeed JSON) are never stored: they are computed where
they are used. Nothing here imports torch, so `--help` and config errors answer at once. The comment beside a setting,
or above it, is what configs/README.md says of it: `python -m pretrain.config.page` writes that page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_tools.remote.settings import DEFAULT_GIB


@dataclass(frozen=True)
class Source:
    """One corpus of shards: a packed folder, its manifest.json, a folder of tars, a tar, or a brace or glob pattern of
    these; or the URL of a folder, manifest or tars (braces only).

    Several sources are mixed in every global batch: by `weight`, or else by size times `repeat`."""

    urls: str = "???"  # where the shards are
    weight: float | None = None  # share of every global batch, relative to the other sources'; null: by size
    repeat: float = 1.0  # how often an epoch counts the source
    image: str | None = None  # extensions of the image member, `;` between; null: any known one
    # Where the texts are, `;` between; the first place that has any is taken: `txt` is a member, whose lines are one
    # caption; `lines` takes each of its lines for one; `json:FIELD` is a field (dots go deeper) with a text or a list.
    captions: str = "json:captions;txt"
    choose: str = "random"  # which of several captions is used: random (a hash of seed, epoch and sample id) | first


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives."""

    dir: str = "???"  # folder of checkpoints, metrics and status; hosts must share its file system
    # auto: continue from the newest intact checkpoint in run.dir | never: refuse a folder that holds one.
    resume: str = "auto"


@dataclass(frozen=True)
class DataConfig:
    """The training stream. The crop, `flip`, `color_jitter` and `word_dropout` are drawn by a hash of seed, epoch and
    sample id."""

    train: list[Source] = field(default_factory=list)  # at least one: a path, a list of paths, or of sources as below
    workers: int = 1  # loader processes per rank; 0 decodes in the training process
    window: int = 16384  # samples of one canonical stream that are shuffled together
    crop_scale: tuple[float, float] = (0.9, 1.0)  # share of the image area that the random crop keeps, from and to
    flip: float = 0.0  # share of the pictures that are mirrored
    color_jitter: float = 0.0  # brightness, contrast and saturation times factors up to this far from 1
    word_dropout: float = 0.0  # share of a caption's words that are left out (pretraining)
    scaled_decode: bool = True  # decode JPEGs no larger than the crop needs; false: full size, bit for bit
    max_bad_ratio: float = 0.01  # share of samples that may be bad (replaced and listed); more end the run
    verify_shards: bool = False  # hash each shard once a node as its reading begins; changed-shards-RANK.jsonl has them
    cache_dir: str | None = None  # on a disk of the node, for remote shards in dualstream/shards; null: ~/.cache
    cache_gib: float = DEFAULT_GIB  # GiB of that cache at most; what was used least recently makes room


@dataclass(frozen=True)
class Phase:
    """A cheaper beginning of a run: smaller pictures, or patches left out (FLIP, arXiv 2212.00794). null: as the
    architecture has it, and so are all that comes after the last phase, and every evaluation."""

    until: str = "???"  # where the phase ends, counted from the run's start
    image_size: int | None = None  # pixels, whole patches; position embeddings are interpolated to them
    patch_dropout: float | None = None  # share of an image's patches


@dataclass(frozen=True)
class ModelConfig:
    """The towers of pretraining."""

    name: str = "ViT-B-32"  # an open_clip architecture, or the path of its JSON
    phases: list[Phase] = field(default_factory=list)  # cheaper beginnings of the run, in order
    # Weights to start from: a run, checkpoint or export folder, a folder of open_clip or of transformers' CLIP, or an
    # open_clip weights file; null: random ones, by the seed.
    init: str | None = None
    locked: str = "none"  # this tower keeps its weights, those of model.init, which may lack the other tower's
    text_buckets: int = 4  # captions of a micro-batch sorted by length and cut to the longest of each bucket (exact)


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss of pretraining. A setting that belongs to some losses alone names them first."""

    # infonce (CLIP) | multi_positive (InfoNCE in which pairs that share an image or a text, by hash, are no negatives)
    # | sigmoid (SigLIP) | margin (VSE++).
    name: str = "infonce"
    label_smoothing: float = 0.0  # infonce, multi_positive: share of the target that is spread over the batch
    margin: float = 0.2  # margin: by how much the cosine of a pair must exceed that of its negatives
    negatives: str = "sum"  # margin: of all negatives | the hardest of each image and of each text
    temperature: float | None = None  # 1 / logit_scale at the start; null: model.init's, else 0.07 (sigmoid: 0.1)
    learn_temperature: bool = True  # all but margin: whether the temperature is trained
    logit_bias: float | None = None  # sigmoid: at the start; null: model.init's, else -ln(global batch)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, and a schedule keyed on samples seen, so that a change of world size or batch does not move it."""

    # adamw | lion (one tensor a parameter where AdamW keeps two; wants betas of about 0.9 and 0.99, a rate 3 to 10
    # times lower than AdamW's and as much more weight decay) | lamb, muon (train.zero_stage=0).
    name: str = "adamw"
    lr: float = 5e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.98)  # decay of the averages of gradients and of their squares
    eps: float = 1e-6  # adamw, lamb: added to the denominator
    weight_decay: float = 0.2  # of matrices, times the rate; vectors and scalars do not decay
    image_lr: float | None = None  # rate of the image tower; null: optim.lr
    text_lr: float | None = None  # rate of the text tower; null: optim.lr
    image_weight_decay: float | None = None  # of the image tower; null: optim.weight_decay
    text_weight_decay: float | None = None  # of the text tower; null: optim.weight_decay
    layer_decay: float = 1.0  # each layer of a tower learns at this share of the rate of the one above (BEiT)
    decay_embeddings: bool = False  # whether position embeddings decay too, as they do in open_clip 3.3
    schedule: str = "cosine"  # of the rate, after the warmup: cosine (to zero at the end) | constant
    warmup: str = "0 steps"  # how long the rate rises from zero at the start
    cooldown: str = "0 steps"  # constant: how long the rate falls to zero at the end (warmup-stable-decay)
    ema: float | None = None  # decay of a moving average of the weights, evaluated and saved too; null: none
    grad_clip: float | None = None  # global norm that gradients are cut to; null: no clipping


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, how precise."""

    duration: str = "1 epoch"  # of the run; or forever, with optim.schedule=constant
    global_batch: int = 256  # pairs (pictures in fine-tuning) of a step over all ranks, which must divide it
    # Pairs of a forward; fewer than the rank's share turn on the gradient cache (GradCache, arXiv 2101.06983): same
    # gradients, less memory. null: the rank's share in one forward.
    micro_batch: int | None = None
    # bf16 (autocast over fp32 parameters) | fp32 | auto: as the checkpoint that the run goes on from, else bf16 where
    # all ranks' devices have it in hardware. It is said at the start.
    precision: str = "auto"
    # ZeRO (arXiv 1910.02054): 0 shares nothing among ranks, 1 optimizer states, 2 gradients too, 3 parameters too.
    zero_stage: int = 1
    # Towers whose layers keep their input alone and run again in the backward: same gradients, less memory, up to a
    # third more work.
    grad_checkpointing: str = "none"
    # From stage 1: the optimizer's states, its fp32 master and its update live on the host (ZeRO-Offload, arXiv
    # 2101.06840), which frees the memory of GPUs; without GPUs it changes nothing.
    offload_optimizer: bool = False
    # To stage 2: the towers run through torch.compile; the first steps take minutes, and on CPUs it gains nothing.
    compile: bool = False


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training."""

    every: str | None = None  # how often; null: only at the end
    retrieval: str | None = None  # a corpus with captions, like data.train.0.urls: recall and loss; null: none
    classification: str | None = None  # a corpus with labels: accuracies; null: none
    captions: str = "json:captions;txt"  # where the texts of `retrieval` are, as in data.train
    templates: str = "photo"  # zero-shot prompts: photo | simple | openai | a file, {c} for the class in each line
    batch: int = 128  # images per rank and forward


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, besides the end and a signal, and which committed checkpoints stay."""

    every: str | None = "1 epoch"  # how often to save; null: only at the end
    keep: int = 2  # newest checkpoints that stay
    keep_every: str | None = None  # save at every multiple of this duration too, and never delete those
    keep_best: str | None = None  # metric of the evaluation, -NAME where lower is better: save and keep the best one


@dataclass(frozen=True)
class LogConfig:
    """What is written while a run goes on."""

    every: str = "10 steps"  # how often scalars go to metrics.jsonl and TensorBoard
    images: int = 4  # captioned pictures in TensorBoard at every evaluation


@dataclass(frozen=True)
class GuardConfig:
    """What a run does about faults."""

    # Steps of the whole run whose loss or gradient is not finite that are left out on all ranks and listed in
    # skipped.jsonl; one more ends the run.
    max_skipped: int = 0
    # A loss this many deviations above the recent ones is listed in spikes.jsonl and changes nothing; null: no watch.
    spike: float | None = 6.0
    # A rank that makes no progress for so long (seconds, minutes, hours) prints its stacks and ends the run; null:
    # never.
    hang_timeout: str | None = "20 minutes"


@dataclass(frozen=True)
class ProfileConfig:
    """A look at single steps."""

    # FIRST-LAST, counted from 1: a profiler trace of these steps on rank 0, and a page on where their time went, in the
    # run folder; null: none.
    steps: str | None = None


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `launch/pretrain.py`."""

    seed: int = 0  # of the order of the samples, their augmentation and random weights
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
    """Settings of `launch/finetune.py`."""

    seed: int = 0  # of the order of the samples, their augmentation and random weights
    # What model.init takes, or an architecture with `random: true`.
    init: str = "???"
    architecture: str | None = None  # of a bare weights file in `init`: an open_clip name or the path of its JSON
    random: bool = False  # start from nothing, for a baseline
    init_ema: bool = False  # from the moving average of its weights (optim.ema)
    mode: str = "full"  # linear: only the head learns | full: the image tower too
    image_size: int | None = None  # pixels; null: as pretrained, else position embeddings are interpolated
    zero_shot_head: bool = True  # start the head from the text tower's class weights; false: from zeros
    templates: str = "photo"  # prompts of those class weights: photo | simple | openai | a file
    # Names of the labels 0, 1, ... where the shards carry none (tars of other tools), or other names: a list, a file
    # with one a line, or a count; null: as packed.
    classes: Any = None
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
