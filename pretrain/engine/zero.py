"""DeepSpeed's privates, all of them: where a rank keeps each parameter at a ZeRO stage, and how a step ends there.

A view for each way of keeping them: `Whole` (stage 0), `Partitioned` (1 and 2) and `Sharded` (3). The engine, fragments
and the moving average know the interface `Zero` alone, so a new DeepSpeed is looked at here and nowhere else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Place:
    """Elements `start` .. `start + numel` of a flattened parameter, kept by this rank in `master` from `offset` on.

    `master`: in fp32 what the optimizer updates, and the key of its states; of what does not learn, the weights.
    """

    start: int
    numel: int
    master: torch.Tensor
    offset: int = 0


class Zero(ABC):
    """How one ZeRO stage keeps the parameters of `module`, which `optimizer` updates, on this rank."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer):
        self.module, self.optimizer = module, optimizer

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        return tuple(parameter.shape)

    @abstractmethod
    def is_whole(self, parameter: nn.Parameter) -> bool:
        """Whether every rank keeps all of it, so that one of them is enough to save it."""

    @abstractmethod
    def place(self, parameter: nn.Parameter) -> Place | None:
        """Which elements this rank keeps and where; None where it keeps none."""

    @abstractmethod
    def copies(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        """Every tensor in which this rank holds values of it: what a forward reads and what the next update changes."""

    @abstractmethod
    def masters(self) -> Iterator[tuple[torch.Tensor, dict]]:
        """Each tensor that the optimizer keeps states of on this rank, with what of its parameter group decides which
        states these are."""

    @abstractmethod
    def accumulate(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run `parts`, a backward each, with one reduction of their summed gradients. All ranks must call it."""

    @abstractmethod
    def step(self) -> float | torch.Tensor | None:
        """Clip and update; the norm of all gradients before clipping. None on all ranks where that is not finite: then
        nothing was updated, and the gradients are gone. All ranks must call it."""

    def read(self, scalar: nn.Parameter) -> float:
        """The value of a parameter of one element. All ranks must call it."""
        return float(scalar.detach())


class Whole(Zero):
    """Stage 0: every rank keeps everything, and the module's parameters are the masters. `engine` may be missing where
    nothing is trained through it."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, engine: Any = None, clip: float | None = None
    ):
        super().__init__(module, optimizer)
        self._engine, self._clip = engine, clip

    def is_whole(self, parameter: nn.Parameter) -> bool:
        """Always."""
        return True

    def place(self, parameter: nn.Parameter) -> Place:
        """All of it."""
        return Place(0, parameter.numel(), parameter)

    def copies(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        """The parameter, which is its own master."""
        return [parameter.data]

    def masters(self) -> Iterator[tuple[torch.Tensor, dict]]:
        """The parameters that learn."""
        return ((parameter, group) for group in self.optimizer.param_groups for parameter in group["params"])

    def accumulate(self, parts: Sequence[Callable[[], None]]) -> None:
        """The last part reduces for all: stage 0 does not know coalescing."""
        with self._engine.no_sync():
            for backward in parts[:-1]:
                backward()
        parts[-1]()

    def step(self) -> float | torch.Tensor | None:
        """Does what the ZeRO optimizers do within their step; the gradients are those of all ranks already."""
        trained = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if not math.isfinite(norm):
            self._engine.zero_grad()
            return None
        if self._clip is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self._clip, norm)
        self._engine.step()
        return norm


class _Reduced(Zero):
    """What stages 1 to 3 have in common: DeepSpeed reduces, clips and looks for overflow by itself."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, engine: Any):
        super().__init__(module, optimizer)
        self._engine, self._zero = engine, engine.optimizer

    def masters(self) -> Iterator[tuple[torch.Tensor, dict]]:
        """The flat partitions: a large group has several. Optimizers whose states differ by group need stage 0."""
        return ((flat, {}) for flat in self._flat_groups())

    def accumulate(self, parts: Sequence[Callable[[], None]]) -> None:
        """Reduces as the coalescing ends."""
        with self._engine.coalesce_grad_reduction():
            for backward in parts:
                backward()

    def step(self) -> float | torch.Tensor | None:
        """An overflow is agreed by DeepSpeed over the norms of all partitions."""
        self._engine.step()
        return None if self._zero.overflow else self._engine.get_global_grad_norm()

    @abstractmethod
    def _flat_groups(self) -> list[torch.Tensor]:
        """This rank's fp32 partitions, by the number that DeepSpeed gives a group."""


class Partitioned(_Reduced):
    """Stages 1 and 2: parameters are whole on every rank; the masters of what learns are laid end to end by group, and
    each rank keeps an equal stretch of that line, whose ends may fall inside a parameter."""

    def is_whole(self, parameter: nn.Parameter) -> bool:
        """What does not learn has no master."""
        return not parameter.requires_grad

    def place(self, parameter: nn.Parameter) -> Place | None:
        """Its part of this rank's stretch."""
        if self.is_whole(parameter):
            return Place(0, parameter.numel(), parameter)
        link = parameter._hp_mapping  # type: ignore[attr-defined]
        if link is None:
            return None
        flat, within = self._flat_groups()[link.param_group_index], link.get_hp_fragment_address()
        return Place(link.lp_fragment_address.start, within.numel, flat, within.start)

    def copies(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        """The parameter and its part of the master."""
        link = getattr(parameter, "_hp_mapping", None)  # what does not learn has no such attribute
        return [parameter.data] if link is None else [parameter.data, link.hp_fragment]

    def _flat_groups(self) -> list[torch.Tensor]:
        return self._zero.single_partition_of_fp32_groups


class Sharded(_Reduced):
    """Stage 3: each rank keeps an equal share of every parameter, the last one padded; a parameter is whole in a
    forward alone, unless it is small."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, engine: Any, rank: int):
        super().__init__(module, optimizer, engine)
        self._rank = rank

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """That from before it was cut."""
        return tuple(parameter.ds_shape)  # type: ignore[attr-defined]

    def is_whole(self, parameter: nn.Parameter) -> bool:
        """Never: what does not learn is cut too."""
        return False

    def place(self, parameter: nn.Parameter) -> Place | None:
        """Its share, without the padding."""
        share, whole = parameter.ds_tensor, parameter.ds_numel  # type: ignore[attr-defined]
        start = self._rank * share.ds_numel
        numel = min(share.ds_numel, whole - start)
        if numel <= 0:
            return None
        if not parameter.requires_grad:
            return Place(start, numel, share)
        group, offset, _ = self._position(parameter)
        return Place(start, numel, self._flat_groups()[group], offset)

    def copies(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        """What is whole of it (nothing, unless it is small), its share, and the master of its share."""
        copies = [parameter.data, parameter.ds_tensor.data]  # type: ignore[attr-defined]
        if parameter.requires_grad:
            group, offset, numel = self._position(parameter)
            copies.append(self._flat_groups()[group].data.narrow(0, offset, numel))
        return copies

    def read(self, scalar: nn.Parameter) -> float:
        """Gathers it first."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([scalar]):
            return super().read(scalar)

    def _position(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        group, offset, numel = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return group, offset, numel

    def _flat_groups(self) -> list[torch.Tensor]:
        return self._zero.fp32_partitioned_groups_flat


def view_of(
    stage: int, module: nn.Module, optimizer: torch.optim.Optimizer, engine: Any, clip: float | None, rank: int
) -> Zero:
    """The view of a DeepSpeed `engine` at `stage`. `clip`: the largest gradient norm, which from stage 1 on stands in
    DeepSpeed's settings instead."""
    if stage == 0:
        return Whole(module, optimizer, engine, clip)
    return Sharded(module, optimizer, engine, rank) if stage == 3 else Partitioned(module, optimizer, engine)


def shard(model: nn.Module, config: dict, device: torch.device) -> None:
    """Bring a model to the device one parameter at a time, each cut to this rank's share before the next, so that the
    model may be larger than the device. The host holds it whole until then. All ranks must call it."""
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
