"""What an objective is. It keeps no state and owns no parameters: what must survive a crash is the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from pretrain.objectives import OBJECTIVES, ObjectiveConfig

SCALE, BIAS = "logit_scale", "logit_bias"  # of the model's scalars: on cosines, and added to them

Tensors = dict[str, torch.Tensor]
Inputs = Mapping[str, Tensors]  # a micro-batch: by field, by name, one row a sample
# Of a rank's whole batch, by field: `identity` int64 [b], `present` bool [b], where known.
Facts = Mapping[str, Tensors]
Draw = Callable[[int], torch.Tensor]  # n -> float64 [b, n], uniform in [0, 1), the same at any world size


class OverBatch(Protocol):
    """A loss over the rows of the whole global batch. Where it asks for rows that heads give, these stand in its
    `wants`, a frozenset of their names."""

    reads: frozenset[str]  # the fields whose rows it compares: a gradient cache's first pass encodes no others

    def loss(self, rows: Tensors, shared: Tensors, facts: Facts) -> torch.Tensor:
        """This rank's share, 0-dim, whose mean over ranks is the global batch's.

        All ranks must call it, forward and backward. With gradients averaged over ranks, as DeepSpeed does, those of
        rows and shared scalars are those of the global batch.

        Args:
            rows: this rank's, `[b, d]` by field, unit norm, fp32 or fp64.
            shared: the model's scalars, `[1]` each.
            facts: see `Facts`; where a field has `present`, pairs without it do not count.
        """


@runtime_checkable
class PerSample(Protocol):
    """A loss that is a sum over samples, or over what samples have; `count` says of how many."""

    wants: frozenset[str]  # the heads that it reads

    def count(self, inputs: Inputs) -> torch.Tensor | int:
        """What the loss is divided by, of one micro-batch on the host. An int says that it is the same for every
        micro-batch of every rank; a tensor, 0-dim, is summed over ranks, before any backward."""

    def loss(self, outputs: Mapping[str, Any], inputs: Inputs) -> torch.Tensor:
        """The sum over one micro-batch, 0-dim, of the model's outputs (rows, shared, local) and inputs."""


@runtime_checkable
class Mining(Protocol):
    """What a loss of single samples has as well to get hard negatives. It is made with its own name, `NAME`."""

    reads: frozenset[str]  # the fields whose rows it mines by

    def mine(self, rows: Tensors, facts: Facts, draw: Draw) -> Tensors:
        """`{field: int64 [b]}`, numbers of rows of the global batch; collective.

        The inputs of these rows, from whatever rank, become the field `FIELD#NAME` of the model's inputs.

        Args:
            rows: this rank's, detached, in fp32.
            facts: see `Facts`.
            draw: see `Draw`.
        """


@dataclass(frozen=True)
class Weighted:
    """An objective and its factor in the loss that trains."""

    objective: OverBatch | PerSample
    weight: float = 1.0


def compares(objective: OverBatch | PerSample) -> bool:
    """Whether it looks at several samples at once, and asks of them for `Facts`."""
    return not isinstance(objective, PerSample) or isinstance(objective, Mining)


def wanted(objectives: Mapping[str, Weighted]) -> frozenset[str]:
    """The heads that any of them reads."""
    return frozenset().union(*(getattr(one.objective, "wants", ()) for one in objectives.values()))


def rows_of(values: Tensors, fields: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of a pair of fields."""
    first, second = fields
    return values[first], values[second]


def present_of(facts: Facts, fields: Iterable[str]) -> torch.Tensor | None:
    """Which of this rank's samples have all of `fields`, bool `[b]`; None: all have."""
    found = [facts[field]["present"] for field in fields if "present" in facts.get(field, {})]
    return torch.stack(found).all(dim=0) if found else None


def build(settings: Mapping[str, ObjectiveConfig]) -> dict[str, Weighted]:
    """The objectives of these settings, by name."""
    return {name: Weighted(_made(own, name), own.weight) for name, own in settings.items()}


def _made(settings: ObjectiveConfig, name: str) -> OverBatch | PerSample:
    make = OBJECTIVES[settings.type].load()
    return make(settings, name) if hasattr(make, "mine") else make(settings)
