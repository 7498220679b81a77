"""Learning from a stored teacher, as CLIP-KD does (arXiv 2307.12732): from its features one by one, from how alike it
finds all pairs of the global batch, and by telling its features apart.

The teacher's similarities are computed tile by tile beside the student's: a rank holds a few tiles of either, and the
features of all ranks. The teacher gets no gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pretrain.objectives import (
    FeatureDistillationConfig,
    InteractiveContrastiveConfig,
    RelationalDistillationConfig,
    projection_of,
)
from pretrain.objectives.infonce import log_sum_exps, softmax_weights
from pretrain.objectives.objective import SCALE, Facts, Inputs, Tensors, present_of
from pretrain.objectives.tiles import (
    gather_rows,
    of_pairs,
    own_columns,
    pull_back,
    similarity_tiles,
    through_scale,
)


class FeatureDistillation:
    """The objective of the setting `fields`: what learns, through a head that brings it to the teacher's size, and the
    teacher's."""

    def __init__(self, settings: FeatureDistillationConfig):
        self.settings = settings
        self._head = projection_of(*settings.fields)
        self.wants = frozenset({self._head})

    def count(self, inputs: Inputs) -> torch.Tensor | int:
        """Samples that have both: see `PerSample`."""
        present = present_of(inputs, self.settings.fields)
        return len(inputs[self.settings.fields[1]]["values"]) if present is None else present.sum()

    def loss(self, outputs: Mapping[str, Any], inputs: Inputs) -> torch.Tensor:
        """See `PerSample`: of each sample the mean squared difference."""
        present = present_of(inputs, self.settings.fields)
        student, teacher = outputs["rows"][self._head], outputs["rows"][self.settings.fields[1]]
        if present is not None:  # whatever stands in the place of an absent one, zeros or not a number
            student, teacher = (torch.where(present[:, None], rows, 0) for rows in (student, teacher))
        return (student - teacher).square().mean(dim=1).sum()


class RelationalDistillation:
    """The objective of the settings `fields`, `teachers` and `teacher_temperature`."""

    def __init__(self, settings: RelationalDistillationConfig):
        self.settings = settings
        self.reads = frozenset(settings.fields + settings.teachers)

    def loss(self, rows: Tensors, shared: Tensors, facts: Facts) -> torch.Tensor:
        """See `OverBatch`."""
        names = *self.settings.fields, *self.settings.teachers
        image, text, teacher_image, teacher_text = (rows[name] for name in names)
        return relational_distillation(
            image,
            text,
            shared[SCALE],
            teacher_image,
            teacher_text,
            1 / self.settings.teacher_temperature,
            present=present_of(facts, names),
        )


class InteractiveContrastive:
    """The objective of the settings `fields` and `teachers`."""

    def __init__(self, settings: InteractiveContrastiveConfig):
        (image, text), (teacher_image, teacher_text) = settings.fields, settings.teachers
        self._ways = (
            (image, projection_of(image, teacher_image), teacher_text),
            (text, projection_of(text, teacher_text), teacher_image),
        )
        self.wants = frozenset(head for _, head, _ in self._ways)
        self.reads = frozenset(settings.fields + settings.teachers)

    def loss(self, rows: Tensors, shared: Tensors, facts: Facts) -> torch.Tensor:
        """See `OverBatch`."""
        first, second = (
            one_way_infonce(rows[head], rows[key], shared[SCALE], present=present_of(facts, (field, key)))
            for field, head, key in self._ways
        )
        return (first + second) / 2


def relational_distillation(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    teacher_image: torch.Tensor,
    teacher_text: torch.Tensor,
    teacher_scale: float,
    *,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """Kullback-Leibler divergence of the student's softmax over all texts of all ranks from the teacher's, for each
    image, and over all images for each text; the mean of both directions.

    The arguments, ranks and gradients are `infonce`'s; of the result only the mean over ranks has a meaning. It costs
    8 B^2 d / world FLOPs for the student and 6 B^2 d / world for the teacher, d being the size of each.

    Args:
        teacher_image: the teacher's unit-norm features `[b, e]`, finite; they get no gradient.
        teacher_text: likewise, `[b, e]`.
        teacher_scale: the factor on the teacher's similarities.
    """
    teacher = teacher_image.to(image.dtype), teacher_text.to(image.dtype), teacher_scale
    return of_pairs(_Relational, image, text, scale, *teacher, present=present)


class _Relational(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, teacher_image, teacher_text, teacher_scale, pairs):
        texts, teacher_texts = gather_rows(text), gather_rows(teacher_text)  # [B, d], [B, e]
        teacher_row, teacher_column = log_sum_exps(teacher_image, teacher_texts, teacher_scale, pairs)  # [b], [B]
        expected = image.new_zeros(len(image))  # by the teacher: by how much its logits exceed the student's

        def visit(tile, similarity):
            logits = pairs.hide((teacher_image @ teacher_texts[tile].T).mul_(teacher_scale), tile)
            share = (logits - teacher_row[:, None]).exp_() + (logits - teacher_column[tile]).exp_()
            expected.add_(share.mul_(logits.sub_(similarity)).sum(dim=1))

        row, column = log_sum_exps(image, texts, scale, pairs, visit)
        ctx.save_for_backward(image, texts, scale, row, column)
        ctx.teacher = teacher_image, teacher_texts, teacher_scale, teacher_row, teacher_column
        ctx.pairs = pairs
        return pairs.mean(expected + row - teacher_row + own_columns(column - teacher_column, len(image))) / 2

    @staticmethod
    def backward(ctx, grad):
        image, texts, scale, row, column = ctx.saved_tensors
        teacher_image, teacher_texts, *teacher = ctx.teacher
        student, teacher = softmax_weights(scale, row, column, ctx.pairs), softmax_weights(*teacher, ctx.pairs)

        def weigh(tile, similarity):
            return student(tile, similarity).sub_(teacher(tile, teacher_image @ teacher_texts[tile].T))

        grad_image, grad_text = pull_back(image, texts, weigh)
        grads = through_scale(image, scale, grad_image, grad_text, grad / (2 * ctx.pairs.count))
        return *grads, None, None, None, None


def one_way_infonce(
    anchor: torch.Tensor, key: torch.Tensor, scale: torch.Tensor, *, present: torch.Tensor | None = None
) -> torch.Tensor:
    """InfoNCE of this rank's anchors, each to be told its own key among all keys of all ranks, but not the reverse.

    The arguments, result and ranks are `infonce`'s; `key` gets no gradient. It costs 6 B^2 d / world FLOPs.
    """
    return of_pairs(_OneWay, anchor, key.to(anchor.dtype), scale, present=present)


class _OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, key, scale, pairs):
        keys = gather_rows(key)  # [B, d]
        row = anchor.new_full((len(anchor),), -torch.inf)
        for tile, similarity in similarity_tiles(anchor, keys):
            row = torch.logaddexp(row, pairs.hide(similarity.mul_(scale), tile).logsumexp(dim=1))
        row = pairs.keep_own(row)
        ctx.save_for_backward(anchor, key, keys, scale, row)
        ctx.pairs = pairs
        return pairs.mean(row - scale * (anchor * key).sum(dim=1))

    @staticmethod
    def backward(ctx, grad):
        anchor, key, keys, scale, row = ctx.saved_tensors
        grad_anchor = key.neg()
        for tile, similarity in similarity_tiles(anchor, keys):
            weight = ctx.pairs.hide(similarity.mul_(scale), tile).sub_(row[:, None]).exp_()
            torch.addmm(grad_anchor, weight, keys[tile], out=grad_anchor)
        factor = grad / ctx.pairs.count
        grad_scale = (grad_anchor * anchor).sum().reshape(scale.shape) * factor
        return grad_anchor.mul_(scale * factor), None, grad_scale, None
