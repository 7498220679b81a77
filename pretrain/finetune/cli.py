"""`launch/finetune.py`: image classification from a run or an export. Imports torch once the settings are good."""

from __future__ import annotations

from pretrain.cli import parser, run_training
from pretrain.process.entry import run_entry

_EXAMPLES = """examples:
  deepspeed launch/finetune.py --config configs/finetune/scenes.yaml init=runs/quickstart
  deepspeed --num_accelerators 2 launch/finetune.py --config configs/finetune/flowers.yaml init=EXPORT_DIR mode=linear
  deepspeed launch/finetune.py --config my.yaml init=EXPORT_DIR data.train.0.urls='s-{000..009}.tar' classes=names.txt
  python launch/finetune.py --config configs/finetune/flowers.yaml init=EXPORT_DIR --dry-run

A run that goes on from its checkpoint reads neither init nor the prompts, and needs no init=.
What was trained is evaluated by launch/evaluate.py, predicts by launch/predict.py, and is exported by launch/export.py.

exit codes: 0 done, 1 failed, 2 usage or config error, 75 stopped on a signal with a checkpoint written, 130 interrupted
twice.
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_entry(_run, arguments)


def _run(arguments: list[str]) -> int:
    about = "Fine-tune the image tower of a dual encoder as a classifier, under DeepSpeed."
    options = parser("finetune", about, _EXAMPLES).parse_intermixed_args(arguments)
    return run_training(options, "classify")
