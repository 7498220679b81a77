"""What the losses share: walking the similarity matrix in tiles, and the collectives around it.

A rank owns the rows of its own images; the columns are the texts of all ranks. Only texts are gathered. Without a
process group (or at world size 1) every collective here is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

HIDDEN = -1e30  # finite: a row of nothing else must not become infinity less infinity
TILE_ELEMENTS = 4 * 2**20  # similarities held at once: 16 MiB of fp32, large enough to keep a GEMM busy


class Pairs:
    """Which pairs of the global batch count. All ranks must make it, each with as many `rows`.

    `present`, bool `[rows]`: of this rank's; None: all count, and nothing here costs anything. Pairs that are absent
    must have features of zeros.
    """

    def __init__(self, rows: int, present: torch.Tensor | None, like: torch.Tensor):
        self.own, self._all = present, None
        self.count: int | torch.Tensor = rows  # of a rank, if the pairs that count lay evenly on all
        if present is not None:
            self._all = gather_rows(present.to(torch.uint8)).bool()  # [B]
            self.count = self._all.sum().clamp(min=1).to(like.dtype) / world()[1]

    def hide(self, similarity: torch.Tensor, tile: slice) -> torch.Tensor:
        """A tile of logits, in which those of absent pairs are made so low that they count for nothing."""
        both = self._both(tile)
        return similarity if both is None else similarity.masked_fill_(~both, HIDDEN)

    def strike(self, marks: torch.Tensor, tile: slice) -> torch.Tensor:
        """Marks of a tile, bool `[b, n]`, without those of absent pairs."""
        both = self._both(tile)
        return marks if both is None else marks.logical_and_(both)

    def _both(self, tile: slice) -> torch.Tensor | None:
        """Where image and text of a tile count, bool `[b, n]`; None: everywhere."""
        return None if self.own is None or self._all is None else self.own[:, None] & self._all[tile]

    def keep_own(self, values: torch.Tensor) -> torch.Tensor:
        """`values` `[b]`, 0 where this rank's pairs are absent."""
        return values if self.own is None else torch.where(self.own, values, 0)

    def keep_all(self, values: torch.Tensor) -> torch.Tensor:
        """`values` `[B]`, 0 where pairs are absent."""
        return values if self._all is None else torch.where(self._all, values, 0)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's share of the mean of `values` `[b]` over all pairs that count: the mean over ranks is that."""
        return values.mean() if self.own is None else self.keep_own(values).sum() / self.count


def of_pairs(
    function: type[torch.autograd.Function],
    image: torch.Tensor,
    text: torch.Tensor,
    *more,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """`function` of features `[b, d]`, in their own precision, of `more` and of `Pairs`. Raises ValueError where they
    do not come in pairs."""
    if image.shape != text.shape:
        raise ValueError(
            f"image features {tuple(image.shape)} and text features {tuple(text.shape)} must have one shape"
        )
    with torch.autocast(image.device.type, enabled=False):
        pairs = Pairs(len(image), present, image)
        if present is not None:  # whatever stands in the place of an absent one, zeros or not a number
            image, text = (torch.where(present[:, None], features, 0) for features in (image, text))
        return function.apply(image, text, *more, pairs)


def column_tiles(rows: int, columns: int) -> Iterator[slice]:
    """Slices over `columns`, each with about TILE_ELEMENTS / `rows` of them."""
    width = max(64, TILE_ELEMENTS // max(rows, 1))
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


def similarity_tiles(image: torch.Tensor, texts: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each tile of columns with its cosine similarities `[b, n]`, the caller's to overwrite."""
    for tile in column_tiles(len(image), len(texts)):
        yield tile, image @ texts[tile].T


def sharing(own: torch.Tensor, everyone: torch.Tensor, tile: slice) -> torch.Tensor:
    """Which of a tile's pairs share their image or their text, bool `[b, n]`; a pair does with itself.

    `own`, `everyone`: int64 `[b, 2]` and `[B, 2]`, equal in the first column where two images are one, in the second
    where two texts are.
    """
    same = own[:, None, 0] == everyone[tile, 0]
    same |= own[:, None, 1] == everyone[tile, 1]
    return same


def own_pairs(values: torch.Tensor, tile: slice) -> torch.Tensor:
    """View of a tile's entries that belong to this rank's pairs (its diagonal, where the tile has any of it), 1-dim."""
    first = world()[0] * len(values)
    start, stop = max(tile.start, first), min(tile.stop, first + len(values))
    if start >= stop:
        return values.flatten()[:0]
    return values[start - first : stop - first, start - tile.start : stop - tile.start].diagonal()


def own_columns(columns: torch.Tensor, rows: int) -> torch.Tensor:
    """Of one value for every column `[B]` those of this rank's `rows` pairs."""
    first = world()[0] * rows
    return columns[first : first + rows]


def pull_back(
    image: torch.Tensor, texts: torch.Tensor, weigh: Callable[[slice, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a sum over similarities: of this rank's images `[b, d]`, and of its texts `[b, d]` from all ranks.

    `weigh(tile, similarities)` turns a tile, computed once more, into its entries' gradients. All ranks must call it.
    """
    grad_image = torch.zeros_like(image)
    grad_texts = torch.empty_like(texts)  # this rank's rows' share
    for tile, similarity in similarity_tiles(image, texts):
        weight = weigh(tile, similarity)
        torch.addmm(grad_image, weight, texts[tile], out=grad_image)
        torch.mm(weight.T, image, out=grad_texts[tile])
    return grad_image, scatter_sum(grad_texts)


def through_scale(
    image: torch.Tensor, scale: torch.Tensor, grad_image: torch.Tensor, grad_text: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`factor` times the gradients of images, texts and scale; given are those of images and texts by their products
    with the other side, already scaled. Overwrites them: each is as large as the features."""
    grad_scale = (grad_image * image).sum().reshape(scale.shape) * factor
    return grad_image.mul_(scale * factor), grad_text.mul_(scale * factor), grad_scale


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within it a loss is that of this process's pairs and calls no collective, whatever the other ranks do."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world() -> tuple[int, int]:
    """(rank, world size) of the default process group; (0, 1) within `alone`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not _alone else (0, 1)


def gather_rows(local: torch.Tensor) -> torch.Tensor:
    """`[b, ...]` of every rank, stacked in rank order to `[world * b, ...]`. All ranks must call it, with equal `b`."""
    _, size = world()
    if size == 1:
        return local
    out = local.new_empty(size * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(out, local.contiguous())
    return out


def scatter_sum(total: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of `total` `[world * b, ...]`, of which a rank gets its own `[b, ...]`. All ranks must call
    it."""
    _, size = world()
    if size == 1:
        return total
    out = total.new_empty(total.shape[0] // size, *total.shape[1:])
    dist.reduce_scatter_tensor(out, total)
    return out


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of `value` over ranks. All ranks must call it."""
    _, size = world()
    if size > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= size
    return value


def merge_log_sum_exp(maximum: torch.Tensor, exp_sum: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp over ranks `[n]` of partial sums `exp_sum` relative to `maximum`. All ranks must call it."""
    _, size = world()
    if size > 1:
        shared = maximum.clone()
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        exp_sum = exp_sum * (maximum - shared).exp()
        dist.all_reduce(exp_sum)
        maximum = shared
    return maximum + exp_sum.log()


def merge_arg_max(maximum: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """The row `[n]` of all ranks' where each column is largest, from this rank's largest and its row; among equals the
    first. All ranks must call it."""
    _, size = world()
    if size > 1:
        shared = maximum.clone()
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        row = torch.where(maximum == shared, row, torch.iinfo(row.dtype).max)
        dist.all_reduce(row, op=dist.ReduceOp.MIN)
    return row
