"""One training step on DeepSpeed: forward, exact accumulation, an update that a non-finite gradient cannot reach."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from data_tools.errors import UserError
from pretrain.config.tree import PlainOptimConfig, TrainConfig
from pretrain.engine.ema import Ema
from pretrain.engine.fragments import Fragment, local_fragments
from pretrain.engine.groups import parameter_groups
from pretrain.engine.optimizers import make_optimizer
from pretrain.engine.zero import shard, view_of
from pretrain.process.precision import is_bf16
from pretrain.process.runtime import Runtime
from pretrain.process.watchdog import heartbeat
from pretrain.report.profiling import profiled
from pretrain.towers.build import attention_kernel

_LARGEST_BUCKET = 5 * 10**8  # elements of a buffer that gradients are reduced in; DeepSpeed's default


class NonFiniteError(UserError):
    """A gradient is not finite. Raised on all ranks, before the update."""


class Engine:
    """A DeepSpeed engine around `model`, with the optimizer, at one ZeRO stage. All ranks must call every method.

    `model` maps its inputs to outputs in one `forward`; the loss is computed outside and handed to `backward`. Two
    attributes it may have: `bounded`, {name of a parameter: (low, high)}, on any module within it, and `scalars`, {name
    in the log: (name of a parameter of one element, what to make of its value)}.
    """

    def __init__(self, model: nn.Module, optim: PlainOptimConfig, train: TrainConfig, runtime: Runtime):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        config = deepspeed_config(optim, train, runtime.world_size, learning)
        self.optimizer_name, self.device, self._runtime = optim.name, runtime.device, runtime
        self._grad_norm: float | torch.Tensor = 0.0
        self.optimizer = make_optimizer(parameter_groups(model, optim), optim, runtime.device)
        if train.zero_stage == 3:
            shard(model, config, runtime.device)
        else:
            model.to(runtime.device)
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        self.module = model
        self.zero = view_of(
            train.zero_stage, model, self.optimizer, self.deepspeed, clip=optim.grad_clip, rank=runtime.rank
        )
        self.ema = None if optim.ema is None else Ema(self.zero, optim.ema, runtime)
        self._bounds = bounds(model)
        self._scalars = {
            name: (model.get_parameter(of), convert) for name, (of, convert) in getattr(model, "scalars", {}).items()
        }

    def __call__(self, *inputs):
        """The model's forward, under the configured precision. Each one counts as progress of the run."""
        heartbeat()
        with profiled("forward"):
            return self.deepspeed(*inputs)

    def accumulate(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run `parts`, a `backward` each, with one reduction at the end: gradients add up as they are, undivided."""
        with profiled("backward"):
            self.zero.accumulate(parts)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a rank-local mean; the mean over ranks is taken when they are reduced."""
        with profiled("backward"), attention_kernel(self.device):
            self.deepspeed.backward(loss, scale_wrt_gas=False)

    def update(self, lr: float) -> None:
        """Clip, step, and clamp what the model gives bounds to.

        Raises:
            NonFiniteError: on all ranks; parameters and optimizer states are untouched, the gradients are gone, and
                training can go on with another batch.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        norm = self.zero.step()
        if norm is None:
            raise NonFiniteError("a gradient is not finite")
        self._grad_norm = norm
        self._clamp()
        if self.ema is not None:
            self.ema.update()

    @torch.no_grad()
    def _clamp(self) -> None:
        """In the fp32 master and in every copy that a forward may read: of a clamped copy alone nothing would be left
        at the next step."""
        for parameter, low, high in self._bounds:
            for copy in self.zero.copies(parameter):
                copy.clamp_(low, high)

    def fragments(self, every: bool = False) -> Iterator[Fragment]:
        """The fragments that this rank is the one to save, or `every` one that it holds."""
        rank, world_size = (0, 1) if every else (self._runtime.rank, self._runtime.world_size)
        return local_fragments(self.zero, rank, world_size, None if self.ema is None else self.ema.values)

    @property
    def grad_norm(self) -> float:
        """Global norm of the last update's gradients, before clipping. Waits for the device."""
        return float(self._grad_norm)

    def scalars(self) -> dict[str, float]:
        """What the model wants to be logged of itself, by name. All ranks must call it."""
        return {name: convert(self.zero.read(parameter)) for name, (parameter, convert) in self._scalars.items()}


def bounds(model: nn.Module) -> list[tuple[nn.Parameter, float, float]]:
    """The parameters that learn and have bounds, with these, wherever in `model` the module is that names them."""
    named = [
        (module.get_parameter(name), low, high)
        for module in model.modules()
        for name, (low, high) in getattr(module, "bounded", {}).items()
    ]
    return [found for found in named if found[0].requires_grad]


def deepspeed_config(optim: PlainOptimConfig, train: TrainConfig, world_size: int, learning: int) -> dict:
    """DeepSpeed's settings for a model of so many parameters that are `learning`, derived: never written by hand, so
    the batch triangle cannot disagree.

    Gradients communicate and accumulate in fp32 unless autocast asks otherwise, in buffers no larger than the model has
    use for (DeepSpeed's own take gigabytes from any GPU); clipping is explicit, because DeepSpeed clips at 1.0 by
    default; its throughput timer, which waits for the device at every forward, elasticity, schedulers and saving stay
    off, the house has its own.
    """
    bucket = min(max(learning, 1), _LARGEST_BUCKET)
    zero: dict[str, object] = {"stage": train.zero_stage, "reduce_bucket_size": bucket}
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.global_batch // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.grad_clip if optim.grad_clip and train.zero_stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded too it is torch's: bit for bit the same, and no compiler
        "torch_autocast": {"enabled": is_bf16(train.precision), "dtype": "bfloat16"},
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},
    }
