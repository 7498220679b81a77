"""Short trainings of commit c1b74ca and of this tree on one machine with the same packages, laid side by side.

    python tests/golden/compare.py                        # all, some minutes
    python tests/golden/compare.py --only infonce finetune

Loss, gradient norm and logit scale of every step have to be equal bit for bit. Of one step, the operations that reach
torch's dispatcher, the collectives, their bytes and the peak bytes of its tensors may not be more than they were.
Exit codes: 0 all that holds, 1 something does not (it is printed), 2 usage.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import open_clip
import torch
import yaml
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

import tiny  # noqa: E402
from golden_cases import CASES, STEPS, Case, Places, before, now  # noqa: E402
from packing import encoded, picture, write_jsonl  # noqa: E402

BASE, IMAGES = "c1b74ca", 48
EXACT = ("loss", "grad_norm", "logit_scale", "logit_bias", "lr")
COUNTS = ("aten", "collectives", "collective_bytes", "peak_bytes")
SLACK = {"collective_bytes": 64}  # the loop's one agreement may carry some numbers more: now the writes that failed
_ENV = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
Settings = Callable[[Case, Places, Path], dict]


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--json", type=Path, help="write what both sides gave into this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="goldens-") as folder:
        base = Path(folder) / "base"
        _check_out(base)
        places = _places(Path(folder), base)
        sides = {
            BASE: _side(base, Path(folder) / "before", places, args.only, before),
            "now": _side(ROOT, Path(folder) / "now", places, args.only, now),
        }
    if args.json:
        args.json.write_text(json.dumps(sides, indent=1))
    faults = [fault for name in args.only for fault in compare(sides[BASE][name], sides["now"][name], name)]
    print("\n".join(["", *faults] if faults else ["", "equal bit for bit, and nothing takes more"]))
    return 1 if faults else 0


def compare(old: dict, new: dict, name: str) -> list[str]:
    """What of a case does not hold, a line each; prints its row of counts."""
    sides = {BASE: old, "this tree": new}
    faults = [f"{name}: {who} failed: {side['failed']}" for who, side in sides.items() if "failed" in side]
    if faults:
        return faults
    pairs = list(zip_longest(old["steps"], new["steps"]))
    differ = [step for step, (was, found) in enumerate(pairs, 1) if was != found]
    if differ:
        was, found = pairs[differ[0] - 1]
        faults.append(f"{name}: {len(differ)} steps differ, the first is {differ[0]}: {was} at {BASE}, {found} now")
    if len(pairs) != STEPS:
        faults.append(f"{name}: {len(pairs)} steps were logged, expected {STEPS}")
    totals = {key: [_total(side["counts"][key]) for side in (old, new)] for key in COUNTS}
    print(f"{name:26}" + "".join(f"{key} {was} -> {found}  " for key, (was, found) in totals.items()), flush=True)
    for key, (was, found) in totals.items():
        if found > was + SLACK.get(key, 0):
            more = _more(old["counts"][key], new["counts"][key])
            faults.append(f"{name}: {key} {found} of a step, {was} at {BASE}{more}")
    return faults


def _total(count: int | dict) -> int:
    return sum(count.values()) if isinstance(count, dict) else count


def _more(old: int | dict, new: int | dict) -> str:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return ""
    changed = {key: new.get(key, 0) - old.get(key, 0) for key in sorted({*old, *new})}
    return ": " + ", ".join(f"{key} {change:+d}" for key, change in changed.items() if change)


def _check_out(folder: Path) -> None:
    """The files of commit c1b74ca in `folder`."""
    done = subprocess.run(["git", "archive", BASE], cwd=ROOT, capture_output=True)
    if done.returncode:
        sys.exit(f"error: commit {BASE} is not in this clone; remedy: git fetch --unshallow")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(folder, filter="data")


def _places(folder: Path, base: Path) -> Places:
    """Captioned, labelled pictures, packed by the old code, and a run of the old code on them."""
    (folder / "images").mkdir()
    rows = []
    for number in range(IMAGES):
        image = picture(number, 90 + number % 13, 70 + number % 9)
        (folder / "images" / f"{number}.jpg").write_bytes(encoded(image))
        words = [tiny.WORDS[(number * k) % len(tiny.WORDS)] for k in (1, 3, 5, 7)]
        captions = [" ".join(words[: 1 + number % 4]), words[0]]
        rows.append({"image": f"{number}.jpg", "captions": captions, "label": words[0]})
    table = write_jsonl(folder / "table.jsonl", rows)
    words = ["pack", str(table), str(folder / "shards"), "--label-column", "label", "--samples-per-shard", "20"]
    pack = [sys.executable, "-m", "data_tools", *words]
    subprocess.run(pack, cwd=base, check=True, stdout=subprocess.DEVNULL)
    model = folder / "tiny.json"
    model.write_text(json.dumps(tiny.MODEL_CFG))
    torch.manual_seed(5)
    weights = folder / "weights.safetensors"
    save_file(open_clip.CLIP(**tiny.MODEL_CFG).state_dict(), weights)
    places = Places(folder / "shards", model, weights, folder / "start" / "infonce")
    found = _side(base, folder / "start", places, ["infonce"], before)["infonce"]
    if "failed" in found:
        sys.exit(f"error: the run of {BASE} to start from failed: {found['failed']}")
    return places


def _side(root: Path, folder: Path, places: Places, names: list[str], settings: Settings) -> dict[str, dict]:
    """By case: the values of each step and the counts, or how it failed."""
    folder.mkdir()
    jobs = []
    for name in names:
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings(CASES[name], places, folder / name)))
        files = {"config": str(config), "counts": str(folder / f"{name}.json"), "log": str(folder / f"{name}.log")}
        jobs.append({"name": name, "job": CASES[name].job, "ranks": CASES[name].ranks, **files})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(HERE / "side.py"), str(root), str(folder / "jobs.json")]
    done = subprocess.run(command, cwd=folder, env=os.environ | _ENV, stdout=subprocess.PIPE, text=True, check=True)
    failed = done.stdout.split()
    return {name: _failure(folder, name) if name in failed else _found(folder, name) for name in names}


def _failure(folder: Path, name: str) -> dict:
    lines = [line for path in sorted(folder.glob(f"{name}.log-*")) for line in path.read_text().splitlines()]
    return {"failed": next((line for line in reversed(lines) if line.startswith("error")), " | ".join(lines[-3:]))}


def _found(folder: Path, name: str) -> dict:
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [{key: row[key] for key in EXACT if key in row} for row in rows if row["kind"] == "train"]
    return {"steps": steps, "counts": json.loads((folder / f"{name}.json").read_text())}


if __name__ == "__main__":
    sys.exit(main())
