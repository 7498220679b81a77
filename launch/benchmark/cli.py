"""`launch/benchmark.py`: this project and its peers on the same work, side by side, in one run."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.arguments import Parser
from data_tools.errors import UsageError
from data_tools.parallel import available_cores
from pretrain.config.reading import load_config
from pretrain.config.tree import PRECISIONS
from pretrain.engine.places import check_architecture, check_corpus, check_output
from pretrain.objectives import OF_PAIRS
from pretrain.process.entry import run_entry
from pretrain.tasks import ContrastiveConfig
from pretrain.tasks.paths import check_settings

_SPEED_STEPS, _CURVE_STEPS = 20, 100  # a curve within the warmup says little: the updates are small there
_MODEL = "the towers: an open_clip architecture name, or a JSON file of one"
_PRECISION = "bf16: autocast over fp32 weights; auto: where the device has units for it, else fp32 (default auto)"
_TRAIN_PRECISION = f"of both; {_PRECISION}; with auto a probe picks the peer's faster one"
_EXAMPLES = """examples:
  samples per second of both trainers, five alternating pairs, and the FLOPs of a step
    python launch/benchmark.py train --shards data/photos/pairs --model configs/models/vit_micro_32.json
  recall of both after the same samples, the mean over three seeds
    python launch/benchmark.py train --recall --shards data/photos/pairs --val data/photos/val \\
        --model configs/models/vit_micro_32.json --epochs 3 --seeds 0 1 2
  the loss curves of both from the same weights on the same batches, fp32
    python launch/benchmark.py train --loss-curve --shards data/photos/pairs --model configs/models/vit_micro_32.json
  the loss curve of a run through random kills and changes of world size, laid over that of an undisturbed run
    python launch/benchmark.py chaos --config configs/quickstart.yaml --zero-stage 3 --steps 200 --kills 8
  the peak memory of a training step by ZeRO stage, ranks, micro-batch and checkpointed towers, and what --dry-run says
    python launch/benchmark.py memory --model configs/models/vit_micro_32.json
  one step: with and without the engine at each ZeRO stage, with each lever, and open_clip's; on a GPU its MFU
    python launch/benchmark.py step --model ViT-B-32 --batch 256
  FLOPs, peak memory and time of the losses beside open_clip's
    python launch/benchmark.py loss
  seconds and memory of the search for near-copies of pictures
    python launch/benchmark.py dedup --hashes 1000000 10000000 --radii 2 3 4 5
  which planted copies of a folder's pictures are found, by kind and radius
    python launch/benchmark.py copies --pictures PHOTOS/images

open_clip's trainer runs in an environment of its own, made on first use in .peers/open_clip. It reads one caption per
sample: pack the shards with `--pairs`."""
_LOADER_EXAMPLES = """examples:
  one worker on one core, five rounds, against open_clip's loader and plain webdataset
    python -m data_tools pack PHOTOS/captions.csv data/photos/pairs --pairs
    python launch/benchmark.py loader --shards data/photos/pairs
  without scaled decoding, two workers, against open_clip alone
    python launch/benchmark.py loader --shards data/photos/pairs --exact --workers 2 --peers open_clip

The peers read one caption per sample: pack the shards with `--pairs`. A corpus smaller than --images is read again.
open_clip's loader runs in an environment of its own, made on first use in .peers/open_clip."""


# zero*: our engine at a stage; the next ones: at stage 1 with one lever; bare: our towers and loss without an engine.
VARIANTS = (
    *("bare", "zero0", "zero1", "zero2", "zero3", "one-bucket", "cached", "checkpointed", "open_clip"),
    "compiled",  # takes minutes to start
)


def build_parser() -> Parser:
    """The command line; importing nothing heavy, so that `--help` answers at once."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser("python launch/benchmark.py", description=__doc__, epilog=_EXAMPLES, formatter_class=formatter)
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="train|loader|step|loss|chaos|memory|dedup|copies"
    )
    train = kinds.add_parser(
        "train", help="whole trainings against open_clip's trainer", epilog=_EXAMPLES, formatter_class=formatter
    )
    _add_work(train)
    _add_measure(train)
    loader = kinds.add_parser(
        "loader",
        help="images per second against open_clip's loader and webdataset",
        epilog=_LOADER_EXAMPLES,
        formatter_class=formatter,
    )
    _add_loader(loader)
    for kind in (train, loader):
        _add_places(kind)
    _add_step(kinds.add_parser("step", help="one training step with and without its levers, and open_clip's"))
    _add_loss(kinds.add_parser("loss", help="FLOPs, memory and time of the losses beside open_clip's"))
    _add_chaos(kinds.add_parser("chaos", help="kill a run at random, resume it, compare it with an undisturbed one"))
    _add_memory(kinds.add_parser("memory", help="peak memory of a training step, beside what --dry-run promises"))
    _add_dedup(kinds.add_parser("dedup", help="seconds and memory of the search for near-copies of pictures"))
    _add_copies(kinds.add_parser("copies", help="which planted copies of pictures their hashes tell"))
    return parser


def _add_work(train: argparse.ArgumentParser) -> None:
    add = train.add_argument
    add(
        "--shards",
        required=True,
        help="training corpus: a packed folder, a folder of tars, a tar or a pattern, one caption a sample",
    )
    add("--model", required=True, help=_MODEL)
    add("--precision", choices=PRECISIONS, default="auto", help=_TRAIN_PRECISION)
    add("--global-batch", type=int, default=256, help="pairs per step over all ranks (default 256)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    add("--weight-decay", type=float, default=0.2, help="default 0.2")
    add("--warmup", type=int, default=20, help="steps of linear warmup (default 20)")
    add("--workers", type=int, default=1, help="loader processes per rank, of both (default 1)")
    add("--ranks", type=int, help="our ranks (default: the GPUs, else 2)")
    add("--peer-ranks", type=int, help="open_clip's (default: a probe picks the faster of 1 and ours)")


def _add_measure(train: argparse.ArgumentParser) -> None:
    add = train.add_argument
    what = train.add_mutually_exclusive_group()
    what.add_argument("--recall", action="store_true", help="compare recall after the same samples instead of speed")
    what.add_argument(
        "--loss-curve", action="store_true", help="compare losses from the same weights and batches instead"
    )
    add("--pairs", type=int, default=5, help="speed: alternating pairs of runs (default 5)")
    add(
        "--steps", type=int, help=f"optimizer steps of a run (default: speed {_SPEED_STEPS}, loss curve {_CURVE_STEPS})"
    )
    add("--skip-steps", type=int, default=5, help="speed: steps at the start that do not count (default 5)")
    add("--val", help="recall: held-out corpus, all captions of an image in one sample")
    add("--epochs", type=int, default=3, help="recall: passes over the shards (default 3)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="recall: one training by each for every seed")
    add("--run-minutes", type=int, default=120, help="a run that has not ended by then failed (default 120)")
    add("--curve", action="store_true", help="recall: after every pass, not only after the last")


def _add_loader(loader: argparse.ArgumentParser) -> None:
    add = loader.add_argument
    add(
        "--shards",
        required=True,
        help="corpus: a packed folder, a folder of tars, a tar or a pattern, one caption a sample",
    )
    add("--peers", nargs="*", choices=("open_clip", "webdataset"), default=["open_clip", "webdataset"],
        help="what to measure beside ours (default both)")  # fmt: skip
    add("--workers", type=int, default=1, help="loader processes, and cores, of each (default 1)")
    add("--size", type=int, default=224, help="pixels of the square output (default 224)")
    add("--crop-scale", type=float, nargs=2, default=(0.9, 1.0), metavar=("LOW", "HIGH"),
        help="the random crop's share of the image area (default 0.9 1.0)")  # fmt: skip
    add("--batch", type=int, default=64, help="images of a batch (default 64)")
    add("--images", type=int, default=2000, help="timed images of a trial (default 2000)")
    add("--rounds", type=int, default=5, help="trials of each (default 5)")
    add("--exact", action="store_true", help="data.scaled_decode=false: ours decodes at full size")
    add("--float", action="store_true", help="ours ends in normalised float32 too, not in uint8")


def _add_places(kind: argparse.ArgumentParser) -> None:
    add = kind.add_argument
    add("--work-dir", type=Path, default=Path("runs/benchmark"), help="runs and report.json (default runs/benchmark)")
    add("--peer-env", type=Path, default=Path(".peers/open_clip"), help="environment of open_clip")


def _add_step(step: argparse.ArgumentParser) -> None:
    add = step.add_argument
    add("--model", default="configs/models/vit_micro_32.json", help=_MODEL)
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS[:-1]), help="default all but compiled")
    add("--batch", type=int, default=64, help="pairs (default 64)")
    add("--micro-batch", type=int, default=16, help="pairs of a forward of `cached` (default 16)")
    add("--precision", choices=PRECISIONS, default="auto", help=_PRECISION)
    add("--steps", type=int, default=10, help="timed steps of a process (default 10)")
    add("--rounds", type=int, default=3, help="processes of each, in turn (default 3)")
    add("--peak-tflops", type=float, help="of the device, for the MFU (default: known for some GPUs)")
    add("--work-dir", type=Path, default=Path("runs/benchmark"), help="report.json (default runs/benchmark)")


def _add_loss(loss: argparse.ArgumentParser) -> None:
    add = loss.add_argument
    add("--losses", nargs="+", choices=OF_PAIRS, default=["infonce", "sigmoid"], help="default infonce sigmoid")
    add("--pairs", type=int, nargs="+", default=[4096, 8192, 16384], help="of both (default 4096 8192 16384)")
    add("--alone", type=int, nargs="*", default=[32768, 65536], help="pairs of ours alone (default 32768 65536)")
    add("--dim", type=int, default=512, help="of the features (default 512)")
    add("--rounds", type=int, default=5, help="trials of each, in turn (default 5)")
    add("--work-dir", type=Path, default=Path("runs/benchmark"), help="report.json (default runs/benchmark)")


def _add_chaos(chaos: argparse.ArgumentParser) -> None:
    add = chaos.add_argument
    add("--config", required=True, type=Path, help="YAML settings of a pretraining run; its evaluations are left out")
    add("--zero-stage", type=int, choices=(0, 1, 2, 3), default=1, help="default 1")
    add("--steps", type=int, default=200, help="optimizer steps of the run (default 200)")
    add("--kills", type=int, default=8, help="SIGKILLs of a random rank after a random step (default 8)")
    add("--world-sizes", type=int, nargs="+", default=[2, 4, 1], help="ranks of each start, in turn (default 2 4 1)")
    add("--save-every", type=int, default=10, help="steps between checkpoints (default 10)")
    add("--delay", type=float, default=0.5, help="most seconds from the logged step to its kill (default 0.5)")
    add("--seed", type=int, default=0, help="of the kills (default 0)")
    add("--work-dir", type=Path, default=Path("runs/benchmark"), help="runs, picture, report (default runs/benchmark)")
    add("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value", help="settings over the file's")


def _add_memory(memory: argparse.ArgumentParser) -> None:
    add = memory.add_argument
    add("--model", default="configs/models/vit_micro_32.json", help=_MODEL)
    add("--zero-stages", type=int, nargs="+", choices=(0, 1, 2, 3), default=[0, 1, 2, 3], help="default 0 1 2 3")
    add("--world-sizes", type=int, nargs="+", default=[1, 2], help="ranks (default 1 2)")
    add("--pairs", type=int, default=32, help="pairs of a rank and step (default 32)")
    add("--micro-batch", type=int, default=8, help="pairs of a forward where the gradient cache is on (default 8)")
    add("--precision", choices=PRECISIONS, default="auto", help=_PRECISION)
    add("--work-dir", type=Path, default=Path("runs/benchmark"), help="report.json (default runs/benchmark)")


def _add_dedup(dedup: argparse.ArgumentParser) -> None:
    add = dedup.add_argument
    add("--hashes", type=int, nargs="+", default=[100_000, 1_000_000], help="how many (default 100000 1000000)")
    add("--radii", type=int, nargs="+", default=[3, 8], help="bits (default 3 8)")
    add("--workers", type=int, default=available_cores(), help="processes (default: one per core)")
    add("--work-dir", type=Path, default=Path("runs/benchmark"), help="report.json (default runs/benchmark)")


def _add_copies(copies: argparse.ArgumentParser) -> None:
    add = copies.add_argument
    add("--pictures", type=Path, required=True, metavar="FOLDER", help="pictures without copies among them")
    add("--limit", type=int, default=1000, help="of them, at most (default 1000)")
    add("--radii", type=int, nargs="+", default=[3, 4, 6, 8], help="bits (default 3 4 6 8)")
    add("--work-dir", type=Path, default=Path("runs/benchmark"), help="report.json (default runs/benchmark)")


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    return run_entry(_main, arguments)


def _main(arguments: list[str]) -> int:
    args = build_parser().parse_args(arguments)
    check_output("--work-dir", args.work_dir, folder=True)
    if args.kind == "loader":
        _check_positive(args, "workers", "size", "batch", "images", "rounds")
        check_corpus(args.shards)
        from launch.benchmark.loader import run_loader  # late: it imports torch

        return run_loader(args)
    if args.kind == "chaos":
        check_settings(load_config(ContrastiveConfig, args.config, [*args.overrides, "run.dir=unused"]))
        from launch.benchmark.chaos import check_arguments, run_chaos

        check_arguments(args)
        return run_chaos(args)
    if args.kind == "loss":
        _check_positive(args, "dim", "rounds", "pairs", "alone")
        from launch.benchmark.loss import run_loss

        return run_loss(args)
    if args.kind == "step":
        _check_positive(args, "batch", "micro_batch", "steps", "rounds")
        _check_model(args)
        from launch.benchmark.step import run_step

        return run_step(args)
    if args.kind == "copies":
        _check_positive(args, "limit", "radii")
        from launch.benchmark.copies import run_copies

        return run_copies(args)
    if args.kind == "dedup":
        _check_positive(args, "hashes", "radii", "workers")
        from launch.benchmark.dedup import run_dedup

        return run_dedup(args)
    if args.kind == "memory":
        _check_positive(args, "pairs", "micro_batch")
        _check_model(args)
        from launch.benchmark.memory import run_memory

        return run_memory(args)
    _check(args)
    from launch.benchmark.train import run_train  # late: it imports torch

    return run_train(args)


def _check(args: argparse.Namespace) -> None:
    if args.recall and not args.val:
        raise UsageError("--recall needs a held-out corpus", remedy="--val FOLDER")
    if args.steps is None:
        args.steps = _CURVE_STEPS if args.loss_curve else _SPEED_STEPS
    if not args.loss_curve and not 0 <= args.skip_steps < args.steps:
        raise UsageError(
            "--skip-steps leaves nothing to measure", got=args.skip_steps, expected=f"0 .. {args.steps - 1}"
        )
    _check_positive(args, "pairs", "steps", "epochs", "global_batch", "run_minutes")
    for corpus in filter(None, (args.shards, args.val)):
        check_corpus(corpus)
    _check_model(args)


def _check_model(args: argparse.Namespace) -> None:
    """Refuses what is no architecture; a file's path becomes that from anywhere, since trials run elsewhere."""
    check_architecture(args.model)
    from pretrain.towers.spec import resolve_spec  # late: it imports torch

    resolve_spec(args.model)
    if args.model.endswith(".json"):
        args.model = str(Path(args.model).resolve())


def _check_positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if any(number < 1 for number in (value if isinstance(value, list) else [value])):
            raise UsageError(f"--{name.replace('_', '-')} is not positive", got=value)
