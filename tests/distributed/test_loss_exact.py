"""InfoNCE over real ranks against one process in fp64: loss, towers and logit scale."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pretrain.losses import tiles
from pretrain.losses.contrastive import infonce
from ranks import run_ranks

PAIRS, IN, OUT = 160, 24, 16  # three column tiles of the smallest width, the last one ragged


def problem(dtype):
    """Inputs of both towers, the towers (one matrix each) and the logit scale; the same on every rank."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(PAIRS, IN), draw(PAIRS, IN), draw(IN, OUT), draw(IN, OUT), torch.tensor([3.3], dtype=dtype)


def reference():
    """Loss and gradients by plain autograd, one process, fp64."""
    x, y, a, b, log_scale = problem(torch.float64)
    leaves = [t.requires_grad_() for t in (a, b, log_scale)]
    logits = log_scale.exp() * F.normalize(x @ a, dim=-1) @ F.normalize(y @ b, dim=-1).T
    target = torch.arange(PAIRS)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def averaged(rank, world_size, dtype, tile_elements):
    """What data parallelism with averaged gradients makes of the rank-local losses."""
    tiles.TILE_ELEMENTS = tile_elements
    torch.set_num_threads(1)
    x, y, a, b, log_scale = problem(dtype)
    leaves = [t.requires_grad_() for t in (a, b, log_scale)]
    rows = slice(rank * PAIRS // world_size, (rank + 1) * PAIRS // world_size)
    loss = infonce(F.normalize(x[rows] @ a, dim=-1), F.normalize(y[rows] @ b, dim=-1), log_scale.exp())
    out = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for value in out:
        dist.all_reduce(value)
    return [value / world_size for value in out]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("tile_elements", [64, 2**20], ids=["many-tiles", "one-tile"])
def test_equals_single_process(world_size, dtype, bound, tile_elements):
    results = run_ranks(world_size, averaged, dtype, tile_elements)
    for name, want, *got in zip(
        ("loss", "image tower", "text tower", "logit scale"), reference(), *results, strict=True
    ):
        for value in got:
            error = (value.double() - want).abs().max() / want.abs().max()
            assert error < bound, f"{name}: relative error {error:.2e}"


def test_large_scale_does_not_overflow():
    """Cosines near +-1 at scale 100: a fixed shift would underflow fp32; the running maximum must not."""
    g = torch.Generator().manual_seed(2)
    features = F.normalize(torch.randn(64, 8, generator=g), dim=-1)
    image, text = features.clone().requires_grad_(), (-features).clone().requires_grad_()
    loss = infonce(image, text, torch.tensor([100.0]))
    loss.backward()
    logits = 100 * features.double() @ -features.double().T
    want = (F.cross_entropy(logits, torch.arange(64)) + F.cross_entropy(logits.T, torch.arange(64))) / 2
    assert abs(loss.item() - want.item()) < 1e-5 * want.item()
    assert image.grad.isfinite().all()


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        infonce(torch.ones(2, 4), torch.ones(3, 4), torch.ones(1))
