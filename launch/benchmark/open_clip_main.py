"""Runs open_clip's own trainer, in its own environment, on an architecture given by name or as a JSON file.

    python open_clip_main.py ARCHITECTURE [arguments of open_clip_train]

open_clip_train takes registered names only, so a file is registered first and its stem passed as `--model`. One
further thing is put right for it: release 3.3.0 hands DistributedDataParallel a CPU as `device_ids`, which torch
refuses, so that without a GPU it could not run on more than one process. Nothing else of it is touched, and nothing
of this project is imported.
"""

import functools
import os
import sys
from pathlib import Path

import open_clip
import torch
from open_clip_train.main import main


def _allow_cpu_ranks() -> None:
    parallel = torch.nn.parallel.DistributedDataParallel

    @functools.wraps(parallel, updated=())
    def build(model, device_ids=None, **options):
        if device_ids and torch.device(device_ids[0]).type == "cpu":
            device_ids = None
        return parallel(model, device_ids=device_ids, **options)

    torch.nn.parallel.DistributedDataParallel = build


def run(argv: list[str]) -> None:
    """Hand the architecture `argv[0]` and the rest to open_clip_train; threads come from OMP_NUM_THREADS."""
    name = argv[0]
    if name.endswith(".json"):
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    _allow_cpu_ranks()
    main(["--model", name, *argv[1:]])


if __name__ == "__main__":
    run(sys.argv[1:])
