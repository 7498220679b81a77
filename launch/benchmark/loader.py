"""`benchmark.py loader`: images per second of this project's stream, of open_clip's and of plain webdataset.

All of them read, decode, crop, tokenise and batch the same shards with equally many workers on the same cores, in
alternating rounds. On a busy machine seconds say little; CPU seconds, over all processes of a loader, still do.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_tools.corpus import open_corpus
from data_tools.errors import UsageError, UserError
from launch.benchmark.environment import peer_python, peer_versions
from launch.benchmark.loader_trial import LoaderTrial, dump
from launch.benchmark.report import show_table, spread, write_report
from launch.benchmark.train import announce, check_captions
from launch.benchmark.trainers import REPO_ROOT

OURS = "dualstream"
_WARMUP = 4  # batches of each worker
_LIMIT = 1800.0  # seconds that one trial may take
_DEFINITION = {
    "images_per_second_per_core": "images over seconds and cores; the cores are as many as the workers, and the main "
    "process runs on them too",
    "images_per_cpu_second": "images over user and system time of all processes of the loader",
}
_SPREAD = ("median", "min", "max")
Result = Mapping[str, float]  # images, seconds, cpu_seconds


def run_loader(args: argparse.Namespace) -> int:
    """Measure what `args` (see cli.py) ask for, print a table and write report.json; returns the exit code."""
    folder = args.work_dir.resolve() / time.strftime("loader-%Y%m%d-%H%M%S")
    trial = _trial(args)
    python = {OURS: Path(sys.executable), "webdataset": Path(sys.executable)}
    if "open_clip" in args.peers:
        python["open_clip"] = peer_python(args.peer_env.absolute())
    rounds = alternate(trial, [OURS, *args.peers], args.rounds, python)
    figures = summary(rounds, args.workers)
    _show(args, trial, figures)
    versions: dict[str, object] = {"webdataset": importlib.metadata.version("webdataset")}
    if "open_clip" in args.peers:
        versions["open_clip"] = peer_versions(python["open_clip"])
    report = {"kind": "loader", "definition": _DEFINITION, "figures": figures, "rounds": rounds, "versions": versions}
    write_report(folder / "report.json", report | {"trial": vars(trial)})
    print(f"report: {folder / 'report.json'}")
    return 0


def alternate(
    trial: LoaderTrial, loaders: Sequence[str], rounds: int, python: Mapping[str, Path]
) -> list[dict[str, Result]]:
    """Every loader once in each round, in an order that is reversed from one round to the next."""
    results = []
    for number in range(rounds):
        done: dict[str, Result] = {}
        for loader in loaders if number % 2 == 0 else list(reversed(loaders)):
            announce(f"{loader}, round {number + 1}")
            done[loader] = run_trial(trial, loader, python[loader])
        results.append({loader: done[loader] for loader in loaders})
    return results


def summary(rounds: Sequence[Mapping[str, Result]], workers: int) -> dict:
    """Rates of each loader, and of every round our rate over that of each peer."""
    rates: dict[str, dict[str, list[float]]] = {}
    for loader in rounds[0]:
        results = [done[loader] for done in rounds]
        rates[loader] = {
            "images_per_second_per_core": [r["images"] / r["seconds"] / workers for r in results],
            "images_per_cpu_second": [r["images"] / r["cpu_seconds"] for r in results],
        }
    figures = {loader: {name: spread(values) for name, values in by_name.items()} for loader, by_name in rates.items()}
    ratios = {
        peer: {
            name: spread([ours / theirs for ours, theirs in zip(rates[OURS][name], values, strict=True)])
            for name, values in rates[peer].items()
        }
        for peer in rates
        if peer != OURS
    }
    return {"loaders": figures, "ratio_per_round": ratios}


def run_trial(trial: LoaderTrial, loader: str, python: Path) -> Result:
    """One loader in a session of its own, whose processes are all gone afterwards."""
    fields = vars(trial) | {"loader": loader}
    command = [str(python), "-m", "launch.benchmark.loader_trial", dump(LoaderTrial(**fields))]
    variables = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        raise UserError(f"the loader {loader} did not end", got=f"{_LIMIT:.0f} s", remedy="lower --images") from None
    finally:
        _end_session(process.pid)
        process.wait()
    if process.returncode:
        last = (errors.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the loader {loader} failed", got=f"exit code {process.returncode}, last line: {last}")
    return json.loads(output.strip().splitlines()[-1])


def _end_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _trial(args: argparse.Namespace) -> LoaderTrial:
    corpus = open_corpus(args.shards)
    check_captions(corpus, args.shards)
    cores = sorted(os.sched_getaffinity(0))
    if args.workers > len(cores):
        raise UsageError("more workers than cores", got=args.workers, expected=f"at most {len(cores)}")
    if args.peers and len(corpus.paths) < args.workers:
        raise UserError(
            "the peers need a shard per worker",
            got=f"{len(corpus.paths)} shards",
            expected=f"{args.workers} or more",
            remedy="pack the corpus into smaller shards, or use fewer --workers",
        )
    return LoaderTrial(
        loader=OURS,
        shards=tuple(str(Path(path).absolute()) for path in corpus.paths),
        cores=tuple(cores[-args.workers :]),
        workers=args.workers,
        images=args.images,
        warmup=_WARMUP * args.workers * args.batch,
        batch=args.batch,
        size=args.size,
        crop_scale=tuple(args.crop_scale),
        scaled_decode=not args.exact,
        as_float=args.float,
    )


def _show(args: argparse.Namespace, trial: LoaderTrial, figures: dict) -> None:
    decoding = "" if trial.scaled_decode else ", exact decoding"
    low, high = trial.crop_scale
    print(
        f"{args.shards}: crops of {low} to {high} of the area, bicubic to {trial.size} px{decoding}, captions "
        f"tokenised, {trial.workers} worker(s), {args.rounds} rounds of {trial.images} images"
    )
    for name in _DEFINITION:
        rows = []
        for loader, rates in figures["loaders"].items():
            output = "float32" if loader != OURS or trial.as_float else "uint8"
            ratio = figures["ratio_per_round"].get(loader, {}).get(name, {})
            rate = (f"{rates[name][key]:.0f}" for key in _SPREAD)
            rows.append((f"{loader} ({output})", *rate, *(ratio.get(key, "") for key in _SPREAD)))
        columns = ("loader (output)", "median", "lowest", "highest", "ratio", "lowest", "highest")
        show_table(f"{name.replace('_', ' ')}, and the ratio of ours to it in each round", columns, rows)
