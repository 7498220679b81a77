"""What the loss costs: FLOPs counted, memory bounded by its tiles."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pretrain.losses import tiles
from pretrain.losses.contrastive import infonce


def features(pairs, dim):
    g = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(pairs, dim, generator=g), dim=-1).requires_grad_() for _ in range(2)]


def test_eight_b2d_flops():
    pairs, dim = 512, 64
    image, text = features(pairs, dim)
    with FlopCounterMode(display=False) as counter:
        infonce(image, text, torch.tensor([14.0])).backward()
    assert counter.get_total_flops() == 8 * pairs**2 * dim


def test_tiles_cover_all_columns_once_and_stay_small():
    for rows, columns in ((1, 1), (3, 700), (4096, 4096), (2**20, 2**20)):
        slices = list(tiles.column_tiles(rows, columns))
        assert [s.start for s in slices[1:]] == [s.stop for s in slices[:-1]]
        assert (slices[0].start, slices[-1].stop) == (0, columns)
        assert all((s.stop - s.start) <= max(64, tiles.TILE_ELEMENTS // rows) for s in slices)


def test_identical_pairs_give_the_log_of_the_batch():
    """A collapsed model knows nothing: its loss is ln B."""
    same = F.normalize(torch.ones(32, 8), dim=-1)
    loss = infonce(same, same, torch.tensor([50.0]))
    assert abs(loss.item() - torch.log(torch.tensor(32.0)).item()) < 1e-5
