"""One training step on DeepSpeed: forward, exact accumulation, an update that a non-finite gradient cannot reach."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from data_tools.errors import UserError
from pretrain.config.tree import PlainOptimConfig, TrainConfig
from pretrain.engine.ema import Ema
from pretrain.engine.groups import parameter_groups
from pretrain.engine.optimizers import make_optimizer
from pretrain.process.precision import is_bf16
from pretrain.process.runtime import Runtime
from pretrain.process.watchdog import beat
from pretrain.report.profiling import part
from pretrain.towers.build import MAX_LOGIT_SCALE, attention_kernel

_LARGEST_BUCKET = 5 * 10**8  # elements of a buffer that gradients are reduced in; DeepSpeed's default


class NonFiniteError(UserError):
    """A gradient is not finite. Raised on all ranks, before the update."""


class Engine:
    """A DeepSpeed engine around `model`, with the optimizer, at one ZeRO stage. All ranks must call every method.

    `model` maps its inputs to outputs in one `forward`; the loss is computed outside and handed to `backward`.
    """

    def __init__(self, model: nn.Module, optim: PlainOptimConfig, train: TrainConfig, runtime: Runtime):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        config = deepspeed_config(optim, train, runtime.world_size, learning)
        self.stage, self.optimizer_name = train.zero_stage, optim.name
        self.device = runtime.device
        self._grad_norm: float | torch.Tensor = 0.0
        self._clip = optim.grad_clip
        self.optimizer = make_optimizer(parameter_groups(model, optim), optim, runtime.device)
        if self.stage == 3:
            _shard(model, config, runtime.device)
        else:
            model.to(runtime.device)
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        self.module = model
        self.ema: Ema | None = None  # fragments ask for it while it is being made
        if optim.ema is not None:
            self.ema = Ema(self, optim.ema, runtime.rank, runtime.world_size)
        parameters = dict(model.named_parameters())
        self._scale, self._bias = (parameters.get(f"clip.logit_{name}") for name in ("scale", "bias"))

    def __call__(self, *inputs):
        """The model's forward, under the configured precision. Each one counts as progress of the run."""
        beat()
        with part("forward"):
            return self.deepspeed(*inputs)

    def accumulate(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run `parts`, a `backward` each, with one reduction at the end: gradients add up as they are, undivided."""
        if self.stage > 0:
            with part("backward"), self.deepspeed.coalesce_grad_reduction():  # which reduces as it ends
                for backward in parts:
                    backward()
            return
        with self.deepspeed.no_sync():  # stage 0 does not know coalescing
            for backward in parts[:-1]:
                backward()
        parts[-1]()

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a rank-local mean; the mean over ranks is taken when they are reduced."""
        with part("backward"), attention_kernel(self.device):
            self.deepspeed.backward(loss, scale_wrt_gas=False)

    def update(self, lr: float) -> None:
        """Clip, step, and clamp the logit scale where the fp32 master sees it.

        Raises:
            NonFiniteError: on all ranks; parameters and optimizer states are untouched, the gradients are gone, and
                training can go on with another batch.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.stage == 0:
            self._before_plain_update()
        self.deepspeed.step()
        if self.stage > 0:
            if self.deepspeed.optimizer.overflow:  # agreed by DeepSpeed over the norms of all partitions
                raise NonFiniteError("a gradient is not finite")
            self._grad_norm = self.deepspeed.get_global_grad_norm()
        self._clamp_logit_scale()
        if self.ema is not None:
            self.ema.update()

    def _before_plain_update(self) -> None:
        """What the ZeRO optimizers do within their step; the gradients are those of all ranks already."""
        trained = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        if not math.isfinite(norm):
            self.deepspeed.zero_grad()
            raise NonFiniteError("a gradient is not finite")
        self._grad_norm = norm
        if self._clip is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self._clip, norm)

    @torch.no_grad()
    def _clamp_logit_scale(self) -> None:
        """Keep log(scale) in [0, ln 100], in the fp32 master and in every copy that a forward may read.

        A clamp of the module's parameter alone would be overwritten by its master at the next step.
        """
        scale = self._scale
        if scale is None or not scale.requires_grad:
            return
        copies = [scale.data]  # stage 0: the master itself; stage 3: empty, or kept whole because it is small
        if self.stage == 3:
            zero = self.deepspeed.optimizer
            group, offset, numel = zero.grad_position[zero.get_param_id(scale)]
            copies += [scale.ds_tensor.data, zero.fp32_partitioned_groups_flat[group].data.narrow(0, offset, numel)]
        elif self.stage > 0 and scale._hp_mapping is not None:
            copies.append(scale._hp_mapping.hp_fragment)
        for copy in copies:
            copy.clamp_(0.0, MAX_LOGIT_SCALE)

    @property
    def grad_norm(self) -> float:
        """Global norm of the last update's gradients, before clipping. Waits for the device."""
        return float(self._grad_norm)

    def logit_scale(self) -> float | None:
        """exp(logit_scale); all ranks must call it. None where the model has none."""
        value = self._whole(self._scale)
        return None if value is None else math.exp(value)

    def logit_bias(self) -> float | None:
        """logit_bias; all ranks must call it. None where the model has none."""
        return self._whole(self._bias)

    def _whole(self, scalar: nn.Parameter | None) -> float | None:
        if scalar is None:
            return None
        if self.stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters([scalar]):
                return float(scalar.detach())
        return float(scalar.detach())


def _shard(model: nn.Module, config: dict, device: torch.device) -> None:
    """Bring a model to the device one parameter at a time, each cut to this rank's share before the next, so that the
    model may be larger than the device. The host holds it whole until then."""
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


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
