"""The short trainings that `compare.py` runs on both sides, as settings of each side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

STEPS, GLOBAL_BATCH = 10, 16


@dataclass(frozen=True)
class Case:
    """A training by `launch/JOB.py`. `settings`: as commit c1b74ca spells them, over those of `before`."""

    settings: dict = field(default_factory=dict)
    job: str = "pretrain"
    ranks: int = 1


_AUGMENTED = {"crop_scale": [0.4, 1.0], "flip": 0.5, "color_jitter": 0.3}
CASES = {
    "infonce": Case(),
    "infonce-cached": Case({"train.micro_batch": 4}),
    "infonce-bf16": Case({"train.precision": "bf16"}),
    "sigmoid": Case({"loss.name": "sigmoid"}),
    "sigmoid-cached": Case({"loss.name": "sigmoid", "train.micro_batch": 4}),
    "multi_positive": Case({"loss.name": "multi_positive", "loss.label_smoothing": 0.1}),
    "multi_positive-cached": Case({"loss.name": "multi_positive", "train.micro_batch": 4}),
    "margin": Case({"loss.name": "margin"}),
    "margin-hardest-cached": Case({"loss.name": "margin", "loss.negatives": "hardest", "train.micro_batch": 8}),
    "everything": Case(
        {
            **{f"data.{name}": value for name, value in _AUGMENTED.items()},
            "data.word_dropout": 0.2,
            "model.phases": [{"until": "4 steps", "patch_dropout": 0.5}, {"until": "8 steps", "image_size": 16}],
            "loss.label_smoothing": 0.1,
            "optim.layer_decay": 0.8,
            "optim.text_lr": 3e-4,
            "optim.ema": 0.9,
            "optim.grad_clip": 1.0,
            "train.micro_batch": 8,
            "train.grad_checkpointing": "both",
            "data.mixed": True,
        }
    ),
    "locked": Case({"model.locked": "image", "model.init": "WEIGHTS"}),
    "zero0": Case({"train.zero_stage": 0}),
    "zero3": Case({"train.zero_stage": 3}),
    "two-ranks": Case(ranks=2),
    "two-ranks-zero2-cached": Case({"train.zero_stage": 2, "train.micro_batch": 4}, ranks=2),
    "two-ranks-zero3-sigmoid": Case({"train.zero_stage": 3, "loss.name": "sigmoid"}, ranks=2),
    "finetune": Case(job="finetune"),
    "finetune-parts": Case(
        {"train.micro_batch": 4, **{f"data.{name}": value for name, value in _AUGMENTED.items()}}, job="finetune"
    ),
    "finetune-linear": Case({"mode": "linear", "zero_shot_head": False}, job="finetune"),
    "finetune-two-ranks": Case({"train.zero_stage": 2, "train.micro_batch": 4}, job="finetune", ranks=2),
}


@dataclass(frozen=True)
class Places:
    """What both sides read: shards that commit c1b74ca packed, the towers' JSON, weights of theirs as open_clip names
    them, and a run of that commit to start from."""

    shards: Path
    model: Path
    weights: Path
    trained: Path


def before(case: Case, places: Places, run_dir: Path) -> dict:
    """The settings as commit c1b74ca takes them."""
    tree: dict = {
        "seed": 3,
        "run": {"dir": str(run_dir)},
        "data": {"train": [{"urls": str(places.shards)}], "workers": 1, "window": 8},
        "optim": {"lr": 1e-3, "warmup": "2 steps"},
        "train": {"duration": f"{STEPS} steps", "global_batch": GLOBAL_BATCH, "precision": "fp32", "zero_stage": 1},
        "checkpoint": {"every": None},
        "log": {"every": "1 steps"},
    }
    if case.job == "pretrain":
        tree |= {"model": {"name": str(places.model)}, "loss": {"name": "infonce"}}
    else:
        tree |= {"init": str(places.trained), "mode": "full"}
    for name, value in case.settings.items():
        if name == "data.mixed":
            one = {"urls": str(places.shards)}
            tree["data"]["train"] = [one | {"weight": 2.0}, one | {"weight": 1.0, "captions": "txt"}]
            continue
        section, _, key = name.rpartition(".")
        (tree[section] if section else tree)[key] = str(places.weights) if value == "WEIGHTS" else value
    return tree


def now(case: Case, places: Places, run_dir: Path) -> dict:
    """The same settings as this tree takes them. Whoever renames a setting translates it here."""
    tree = before(case, places, run_dir)
    if "loss" in tree:
        loss = tree.pop("loss")
        tree["objectives"] = {loss.pop("name"): loss}
    if "text_lr" in tree["optim"]:
        tree["optim"]["parts"] = {"text": {"lr": tree["optim"].pop("text_lr")}}
    if tree["train"].get("grad_checkpointing") == "both":
        tree["train"]["grad_checkpointing"] = ["image", "text"]
    if "locked" in tree.get("model", {}):
        tree["model"]["locked"] = [tree["model"]["locked"]]
    return tree
