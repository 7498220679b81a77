"""Ranks on unlike devices: one precision, one kind of products, the same weights."""

import torch

from pretrain.config.tree import OptimConfig
from pretrain.engine.optimizers import make_optimizer
from pretrain.process import precision
from pretrain.process.precision import Ability, resolve
from pretrain.process.runtime import start
from ranks import run_ranks


def _rank(rank, world_size):
    device = start(distributed=True).device
    mine = Ability(rank == 0, 90.0 * rank, f"device {rank}")
    precision.ability = lambda device: mine  # of this process, which ends with the test
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(24, 64))
    weight.grad = torch.randn(24, 64)
    make_optimizer([{"params": [weight], "use_muon": True}], OptimConfig(name="muon"), device).step()
    recorded = "bf16" if rank == 0 else None  # a rank that cannot see the run folder
    resolved = [resolve(asked, device, known) for asked, known in (("auto", None), ("bf16", None), ("auto", recorded))]
    return resolved, weight.detach()


def test_ranks_agree_on_what_the_poorest_has():
    (first, moved), (second, moved_too) = run_ranks(2, _rank)
    assert first == second
    assert [one.precision for one in first] == ["fp32", "bf16", "bf16"]
    assert "rank 1, device 1, has no units for bf16" in first[0].lines[0]
    assert all("takes 90 times as long" in one.lines[1] for one in first[1:])
    assert torch.equal(moved, moved_too)
