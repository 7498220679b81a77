"""The rules that settings must keep, and what follows from them: durations in steps, the batch of a rank."""

from __future__ import annotations

import difflib
import re

from data_tools.errors import UsageError
from pretrain.config import FinetuneConfig, PretrainConfig

_UNITS = ("epochs", "steps", "samples")
_DURATION = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(epochs|steps|samples)\s*$")


def parse_duration(text: str, where: str) -> tuple[float, str]:
    """`"3 epochs"` -> (3.0, "epochs"); units are epochs, steps and samples."""
    match = _DURATION.match(str(text))
    if not match:
        raise UsageError(
            f"{where} is not a duration", got=repr(text), expected="a number and one of " + ", ".join(_UNITS)
        )
    return float(match[1]), match[2]


def duration_steps(text: str, where: str, steps_per_epoch: int, global_batch: int) -> int:
    """A duration in optimizer steps, rounded up to a whole step."""
    number, unit = parse_duration(text, where)
    scale = {"epochs": steps_per_epoch, "steps": 1, "samples": 1 / global_batch}[unit]
    steps = number * scale
    return int(steps) if steps == int(steps) else int(steps) + 1


def validate(config: PretrainConfig | FinetuneConfig) -> None:
    """Check every rule that needs no data and no ranks; raises UsageError naming field, value, rule and remedy."""

    def require(ok: bool, name: str, value: object, rule: str, remedy: str | None = None) -> None:
        if not ok:
            raise UsageError(f"config value {name} breaks its rule", got=repr(value), expected=rule, remedy=remedy)

    def choice(name: str, value: object, allowed: tuple) -> None:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], 1)
        require(
            value in allowed,
            name,
            value,
            "one of " + ", ".join(map(str, allowed)),
            f"did you mean {near[0]!r}?" if near else None,
        )

    train, optim, data = config.train, config.optim, config.data
    require(len(data.train) > 0, "data.train", data.train, "at least one source", "data.train.0.urls=FOLDER")
    choice("run.resume", config.run.resume, ("auto", "never"))
    choice("train.precision", train.precision, ("fp32", "bf16"))
    choice("train.zero_stage", train.zero_stage, (0, 1, 2, 3))
    choice("optim.schedule", optim.schedule, ("cosine", "constant"))
    if isinstance(config, PretrainConfig):
        choice("loss.name", config.loss.name, ("infonce",))
        require(config.model.text_buckets > 0, "model.text_buckets", config.model.text_buckets, "> 0")
    else:
        choice("mode", config.mode, ("linear", "full"))
    low, high = data.crop_scale
    require(0 < low <= high <= 1, "data.crop_scale", data.crop_scale, "0 < low <= high <= 1")
    require(0 <= data.max_bad_ratio < 1, "data.max_bad_ratio", data.max_bad_ratio, "0 <= ratio < 1")
    require(data.workers >= 0, "data.workers", data.workers, ">= 0")
    require(data.window > 0, "data.window", data.window, "> 0")
    require(train.global_batch > 0, "train.global_batch", train.global_batch, "> 0")
    require(train.micro_batch is None or train.micro_batch > 0, "train.micro_batch", train.micro_batch, "> 0 or null")
    require(optim.lr > 0, "optim.lr", optim.lr, "> 0")
    require(optim.weight_decay >= 0, "optim.weight_decay", optim.weight_decay, ">= 0")
    require(
        optim.grad_clip is None or optim.grad_clip > 0,
        "optim.grad_clip",
        optim.grad_clip,
        "> 0 or null",
        "null switches clipping off",
    )
    require(
        config.checkpoint.keep >= 2,
        "checkpoint.keep",
        config.checkpoint.keep,
        ">= 2",
        "one spare is needed to fall back on when the newest is damaged",
    )
    require(config.eval.batch > 0, "eval.batch", config.eval.batch, "> 0")
    for name, text in (
        ("train.duration", train.duration),
        ("optim.warmup", optim.warmup),
        ("log.every", config.log.every),
        ("eval.every", config.eval.every),
        ("checkpoint.every", config.checkpoint.every),
    ):
        if text is not None:
            parse_duration(text, name)


def local_batch(config: PretrainConfig | FinetuneConfig, world_size: int) -> int:
    """Pairs per rank and step; raises UsageError where the world size or the micro-batch does not fit."""
    total = config.train.global_batch
    if total % world_size:
        fits = next(w for w in range(world_size, 0, -1) if total % w == 0)
        raise UsageError(
            "train.global_batch does not divide among the ranks",
            got=f"{total} pairs for {world_size} ranks",
            expected="a multiple of the world size",
            remedy=f"use {fits} ranks or train.global_batch={(total // world_size + 1) * world_size}",
        )
    local = total // world_size
    micro = config.train.micro_batch
    if micro is not None and local % micro:
        raise UsageError(
            "train.micro_batch does not divide the rank's share of the batch",
            got=f"{micro} for {local} pairs",
            expected="a divisor",
            remedy="train.micro_batch=null does it in one forward",
        )
    return local
