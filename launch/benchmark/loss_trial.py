"""One measurement of `benchmark.py loss`, a process of its own: `python -m launch.benchmark.loss_trial JSON FILE`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from launch.benchmark.peak import peak, reset_peak
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.objective import build

PEERS = {"infonce": "ClipLoss", "sigmoid": "SigLipLoss"}  # open_clip's, by ours
_WARM_PAIRS = 256
_SCALE = 1 / 0.07


class Features(NamedTuple):
    """Unit-norm features of pairs, `[b, d]`, the scale and the bias `[1]`, and who is who, int64 `[b, 2]`."""

    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    identity: torch.Tensor


@dataclass(frozen=True)
class LossTrial:
    """A loss to measure, forward and backward, at world size 1. `who`: dualstream or open_clip."""

    who: str
    loss: str
    pairs: int
    dim: int


def measure(trial: LossTrial) -> dict:
    """FLOPs by B^2 d, peak bytes above the features, seconds; and the loss, so that both can be seen to agree."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = OURS_AND_THEIRS[trial.who](trial.loss)
    with FlopCounterMode(display=False) as counter:
        _step(loss, _features(_WARM_PAIRS, trial.dim, device))
    features = _features(trial.pairs, trial.dim, device)
    before = reset_peak(device)
    started = time.perf_counter()
    value = _step(loss, features)
    seconds = time.perf_counter() - started
    return {
        "flops_by_b2d": counter.get_total_flops() / (_WARM_PAIRS**2 * trial.dim),
        "peak": peak(device) - before,
        "seconds": seconds,
        "loss_value": value,
    }


def _features(pairs: int, dim: int, device: torch.device) -> Features:
    """Unit-norm features of pairs that are a little alike, with scale and bias, as leaves."""
    g = torch.Generator().manual_seed(0)
    image = torch.randn(pairs, dim, generator=g)
    text = torch.randn(pairs, dim, generator=g).add_(image, alpha=0.3)
    scalars = torch.tensor([_SCALE]), torch.tensor([-math.log(pairs)])
    leaves = [F.normalize(image, dim=-1), F.normalize(text, dim=-1), *scalars]
    identity = torch.arange(2 * pairs, device=device).view(pairs, 2)
    return Features(*(leaf.to(device).requires_grad_() for leaf in leaves), identity=identity)


def _step(loss: Callable[[Features], torch.Tensor], features: Features) -> float:
    value = loss(features)
    value.backward()
    return value.item()


def _ours(name: str) -> Callable[[Features], torch.Tensor]:
    (ours,) = build({name: OBJECTIVES[name].settings()}).values()

    def loss(f: Features) -> torch.Tensor:
        facts = {field: {"identity": f.identity[:, side]} for side, field in enumerate(("image", "text"))}
        shared = {"logit_scale": f.scale, "logit_bias": f.bias}
        return ours.objective.loss({"image": f.image, "text": f.text}, shared, facts)

    return loss


def _theirs(name: str) -> Callable[[Features], torch.Tensor]:
    import open_clip.loss

    loss = getattr(open_clip.loss, PEERS[name])()
    if name == "sigmoid":
        return lambda f: loss(f.image, f.text, f.scale, f.bias)
    return lambda f: loss(f.image, f.text, f.scale)


OURS_AND_THEIRS = {"dualstream": _ours, "open_clip": _theirs}


def main() -> None:
    """Measure the trial of the command line and write its result into the file named there."""
    Path(sys.argv[2]).write_text(json.dumps(measure(LossTrial(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
