"""Every loss over real ranks against one process in fp64: loss, towers, logit scale and bias; and what ranks send."""

import collections
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from plain_losses import OF_PAIRS, identities, of_pairs, plain
from pretrain.objectives import tiles
from ranks import run_ranks

PAIRS, IN, OUT = 160, 24, 16  # three column tiles of the smallest width, the last one ragged


def problem(dtype):
    """Inputs of both towers, the towers (one matrix each), logit scale and bias; the same on every rank."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    scalars = torch.tensor([3.3], dtype=dtype), torch.tensor([-4.0], dtype=dtype)
    return draw(PAIRS, IN), draw(PAIRS, IN), draw(IN, OUT), draw(IN, OUT), *scalars


PATTERNS = ("all", "some", "none of a rank", "none")


def present(pattern):
    """Which pairs have a text."""
    found = torch.ones(PAIRS, dtype=torch.bool)
    if pattern == "some":
        found[[3, 7, 8, 60, 61, 159]] = False
    if pattern == "none of a rank":
        found[PAIRS // 2 :] = False
        found[1] = False
    if pattern == "none":
        found[:] = False
    return None if pattern == "all" else found


def reference(settings, pattern):
    """Loss and gradients by plain autograd, one process, fp64."""
    x, y, *leaves = problem(torch.float64)
    a, b, log_scale, bias = (leaf.requires_grad_() for leaf in leaves)
    image, text = F.normalize(x @ a, dim=-1), F.normalize(y @ b, dim=-1)
    rest = log_scale.exp(), bias, identities(PAIRS), present(pattern)
    loss = of_pairs(settings, image, text, *rest, by=plain)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach(), *grads]


def averaged(rank, world_size, dtype, tile_elements):
    """What data parallelism with averaged gradients makes of the rank-local losses, for each of PATTERNS
    and OF_PAIRS."""
    tiles.TILE_ELEMENTS = tile_elements
    x, y, *leaves = problem(dtype)
    a, b, log_scale, bias = (leaf.requires_grad_() for leaf in leaves)
    rows = slice(rank * PAIRS // world_size, (rank + 1) * PAIRS // world_size)
    results = {}
    for pattern, (name, settings) in itertools.product(PATTERNS, OF_PAIRS.items()):
        image, text = F.normalize(x[rows] @ a, dim=-1), F.normalize(y[rows] @ b, dim=-1)
        texts = None if pattern == "all" else present(pattern)[rows]
        loss = of_pairs(settings, image, text, log_scale.exp(), bias, identities(PAIRS)[rows], texts)
        out = [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]
        results[pattern, name] = [value if value is None else _mean(value) for value in out]
    return results


def _mean(value):
    dist.all_reduce(value)
    return value / dist.get_world_size()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("tile_elements", [64, 2**20], ids=["many-tiles", "one-tile"])
def test_equals_single_process(world_size, dtype, bound, tile_elements):
    rows = list(itertools.product(PATTERNS, OF_PAIRS))
    wanted = {(pattern, name): reference(OF_PAIRS[name], pattern) for pattern, name in rows}
    for results in run_ranks(world_size, averaged, dtype, tile_elements):
        for pattern, name in rows:
            assert_close(f"{name}, {pattern} present", results[pattern, name], wanted[pattern, name], bound)


def assert_close(name, results, want, bound):
    parts = ("loss", "image tower", "text tower", "logit scale", "bias")
    for part, ours, other in zip(parts, results, want, strict=True):
        assert (ours is None) == (other is None), f"{name}: {part}"
        error = 0.0 if other is None else (ours.double() - other).abs().max() / other.abs().max().clamp(min=1e-30)
        assert error < bound, f"{name}, {part}: relative error {error:.2e}"


def traffic(rank, world_size):
    """For each of OF_PAIRS the collectives of one forward and backward: name -> bytes of each call's larger side."""
    seen = collections.defaultdict(list)

    def counting(name, whole):
        original = getattr(dist, name)

        def call(*args, **options):
            seen[name].append(args[whole].numel() * args[whole].element_size())
            return original(*args, **options)

        setattr(dist, name, call)

    for name, whole in (("all_gather_into_tensor", 0), ("reduce_scatter_tensor", 1), ("all_reduce", 0)):
        counting(name, whole)
    x, y, a, b, log_scale, bias = problem(torch.float32)
    rows = slice(rank * PAIRS // world_size, (rank + 1) * PAIRS // world_size)
    results = {}
    for name, settings in OF_PAIRS.items():
        image, text = (F.normalize(v[rows] @ m, dim=-1).requires_grad_() for v, m in ((x, a), (y, b)))
        of_pairs(settings, image, text, log_scale.exp(), bias, identities(PAIRS)[rows]).backward()
        results[name] = dict(seen)
        seen.clear()
    return results


def test_ranks_send_what_the_formula_says():
    """Texts once, their gradients once, and a few floats for every column; images never."""
    features, column = 4 * PAIRS * OUT, 4 * PAIRS
    sweep = {"all_gather_into_tensor": [features], "reduce_scatter_tensor": [features]}
    gathered = lambda *more: {"all_gather_into_tensor": [features, *more]}  # noqa: E731
    merge, mean = {"all_reduce": [column, column]}, 4 * OUT
    want = {
        "infonce": sweep | merge,
        "infonce, smoothed": sweep | {"all_reduce": [column, column, mean]},
        "multi_positive": sweep | merge | gathered(4 * column, column),
        "multi_positive, smoothed": sweep | {"all_reduce": [column, column, mean]} | gathered(4 * column, column),
        "sigmoid": sweep,
        "margin": sweep | gathered(column) | {"reduce_scatter_tensor": [features, column]},
        "margin, hardest": sweep
        | gathered(column)
        | {"all_reduce": [column, 2 * column], "reduce_scatter_tensor": [column, features]},
    }
    assert run_ranks(2, traffic) == [want, want]


@pytest.mark.parametrize("name", ["infonce", "multi_positive", "sigmoid"])
def test_large_scale_does_not_overflow(name):
    """Cosines near +-1 at scale 100: a fixed shift would underflow fp32; the running maximum must not."""
    g = torch.Generator().manual_seed(2)
    features = F.normalize(torch.randn(64, 8, generator=g), dim=-1)
    image, text = features.clone().requires_grad_(), (-features).clone().requires_grad_()
    rest = torch.tensor([100.0]), torch.zeros(1), identities(64)
    loss = of_pairs(OF_PAIRS[name], image, text, *rest)
    loss.backward()
    want = of_pairs(OF_PAIRS[name], features.double(), -features.double(), *rest, by=plain).item()
    assert abs(loss.item() - want) < 1e-5 * want
    assert image.grad.isfinite().all()
    assert text.grad.isfinite().all()


def tied(rank, world_size):
    """Gradients of images and texts of which many are equally hard, in integers that no rounding disturbs."""
    numbers = torch.tensor([0, 1, 1, 2, 2, 1, 0, 1])
    rows = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    image, text = torch.eye(4)[numbers][rows].requires_grad_(), torch.eye(4)[numbers.roll(1)][rows].requires_grad_()
    of_pairs(OF_PAIRS["margin, hardest"], image, text, torch.ones(1)).backward()
    return torch.cat([image.grad, text.grad], dim=1) / world_size


def test_among_equally_hard_negatives_the_first_counts_on_any_rank():
    (want,) = run_ranks(1, tied)
    for world_size in (2, 4):
        assert torch.equal(torch.cat(run_ranks(world_size, tied)), want)


def test_unequal_shapes_are_refused():
    rest = torch.ones(1), torch.ones(1), torch.ones(2, 2)
    for settings in OF_PAIRS.values():
        with pytest.raises(ValueError, match="one shape"):
            of_pairs(settings, torch.ones(2, 4), torch.ones(3, 4), *rest)
