"""`launch/finetune.py`: image classification from a run or an export. Imports torch once the settings are good."""

from __future__ import annotations

from pretrain.cli import parser, read_settings
from pretrain.config import FinetuneConfig
from pretrain.entry import refuse_bare_world, run_entry
from pretrain.lifeline import Lifeline
from pretrain.places import check_settings
from pretrain.settings import load_config

_EXAMPLES = """examples:
  deepspeed launch/finetune.py --config configs/finetune/scenes.yaml init=runs/quickstart
  deepspeed --num_accelerators 2 launch/finetune.py --config configs/finetune/flowers.yaml init=EXPORT_DIR mode=linear
  deepspeed launch/finetune.py --config my.yaml init=EXPORT_DIR data.train.0.urls='s-{000..009}.tar' classes=names.txt
  python launch/finetune.py --config configs/finetune/flowers.yaml init=EXPORT_DIR --dry-run

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
    if options.dry_run:
        config = load_config(FinetuneConfig, options.config, options.overrides)
        check_settings(config)
        from pretrain.finetune.plan import dry_run

        return dry_run(config)
    refuse_bare_world()
    config = read_settings(FinetuneConfig, options)
    with Lifeline(config.run.dir) as life:
        check_settings(config)
        from pretrain.finetune.job import FinetuneJob
        from pretrain.train import launch

        return launch(life, lambda runtime: FinetuneJob(config, runtime))
