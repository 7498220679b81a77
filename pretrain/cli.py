"""`launch/pretrain.py`: contrastive pretraining. Imports torch only once the settings are known to be good."""

from __future__ import annotations

import argparse

from data_tools.arguments import Parser
from pretrain.config import PretrainConfig
from pretrain.entry import run_entry
from pretrain.settings import load_config

_EXAMPLES = """examples:
  deepspeed launch/pretrain.py --config configs/quickstart.yaml
  deepspeed --num_accelerators 2 launch/pretrain.py --config configs/photos_cpu.yaml run.dir=runs/a optim.lr=5e-4
  deepspeed --hostfile hosts launch/pretrain.py --config my.yaml train.zero_stage=2 train.precision=bf16
  python launch/pretrain.py --config my.yaml --dry-run

A run continues by itself from the newest intact checkpoint in run.dir. SIGTERM and SIGUSR1 save a checkpoint and stop.
exit codes: 0 done, 1 failed, 2 usage or config error, 75 stopped on a signal with a checkpoint written.
"""


def parser(job: str, description: str, examples: str) -> Parser:
    """The command line that training jobs share."""
    words = Parser(
        prog=f"python launch/{job}.py",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words.add_argument("--config", required=True, metavar="FILE", help="YAML settings; start from one in configs/")
    words.add_argument("--dry-run", action="store_true", help="check settings, shards and model; say what would run")
    words.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    words.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    return words


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_entry(_run, arguments)


def _run(arguments: list[str]) -> int:
    about = "Contrastive pretraining of an image-text dual encoder under DeepSpeed."
    options = parser("pretrain", about, _EXAMPLES).parse_intermixed_args(arguments)
    config = load_config(PretrainConfig, options.config, options.overrides)
    if options.dry_run:
        from pretrain.plan import dry_run

        return dry_run(config)
    from pretrain.pretraining import PretrainJob
    from pretrain.train import launch

    return launch(lambda runtime: PretrainJob(config, runtime))
