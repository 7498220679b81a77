"""The dual encoder: open_clip's two towers behind one forward, as the engine needs it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from open_clip import CLIP, CustomTextCLIP
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_tools.errors import UserError
from pretrain.towers.adapt.adapter import Adapter
from pretrain.towers.adapt.compiling import CompiledTowers
from pretrain.towers.adapt.order import merge
from pretrain.towers.adapt.patch_dropout import replace_patch_dropout
from pretrain.towers.buffers import make_tables_non_persistent
from pretrain.towers.clip import Clip, text_tower
from pretrain.towers.cut import Rows
from pretrain.towers.dropout import refuse_dropout, silence_dropout
from pretrain.towers.fit import check_memory, check_sizes, check_tokenizer
from pretrain.towers.hf_text import allowed_folder, load_text_weights
from pretrain.towers.image import image_tokens, image_width
from pretrain.towers.model import Between, Inputs, Model, Outputs, Tokens
from pretrain.towers.spec import ModelSpec, resolve_spec, tokenizer_of
from pretrain.towers.text import text_features, text_rule, text_tokens, text_width

MAX_LOGIT_SCALE = math.log(100)  # the cap of the CLIP paper (arXiv 2103.00020), in log space
ENCODER_OF = {"image": "image", "text": "text"}


class DualEncoder(Model):
    """Image and text towers with a shared logit scale.

    `clip` holds open_clip's module with its native keys; only `logit_scale` (and `logit_bias`) has shape (1,) instead
    of (), because DeepSpeed 0.19.8 cannot broadcast 0-dim parameters. `texts`: False where nobody encodes any; the
    tokenizer's files may then be gone.
    """

    clip: Clip
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, spec: ModelSpec, text_buckets: int = 1, texts: bool = True):
        super().__init__(ENCODER_OF)
        self.spec = spec
        self.tokenize = tokenizer_of(spec, look=texts)
        self.clip = _build_clip(spec)
        check_sizes(self.clip, spec)
        if texts:
            check_tokenizer(self.clip, self.tokenize, spec)
        self.patch_dropout = replace_patch_dropout(self.clip.visual)
        # The share of patches that is left out in each phase of the run, and after the last one; None where never.
        self.patch_shares: list[float | None] = [self.patch_dropout.prob or None if self.patch_dropout else None]
        self.silenced = silence_dropout(self.clip)  # what was set to 0, for the user
        self.tables = make_tables_non_persistent(self.clip, f"model {spec.name}")
        self.rule = text_rule(self.clip, text_buckets)
        self.started: list[str] = []  # what build_model loaded, for the user
        self.bounded = {"clip.logit_scale": (0.0, MAX_LOGIT_SCALE)}
        self.scalars = {"logit_scale": ("clip.logit_scale", math.exp)}
        if getattr(self.clip, "logit_bias", None) is not None:
            self.scalars["logit_bias"] = ("clip.logit_bias", float)
        self.adapters: Sequence[Adapter] = ()  # those that were applied
        self.compiled: CompiledTowers | None = None  # the towers in training, where an adapter compiled them
        for name in ("mean", "std"):
            value = torch.tensor(spec.preprocess_cfg[name], dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(f"pixel_{name}", value * 255, persistent=False)

    def forward(self, inputs: Inputs, want: frozenset[str] = frozenset(), between: Between | None = None) -> Outputs:
        """Unit-norm fp32 features `[n, d]` of images and texts, the logit scale and, if the model has one, the bias.

        An image has `pixels`, uint8 `[n, 3, h, w]`, and in training what `PatchDropout.take` goes by. A text has
        `tokens`, or is cut (see `cut.TextRule`). See `Model.forward`.
        """
        with attention_kernel(self.pixel_mean.device):
            return super().forward(inputs, want, between)

    def encode(self, encoder: str, rows: Rows) -> torch.Tensor:
        """Unit-norm fp32 features `[n, d]` by the `image` or the `text` tower."""
        compiled = self.compiled if self.training else None
        if encoder == "text":
            return _unit(text_features(self.clip, rows, self.rule, None if compiled is None else compiled.text))
        if self.patch_dropout is not None:
            self.patch_dropout.take(rows)
        encode_image = compiled.image if compiled else self.clip.encode_image
        return _unit(encode_image(self._pixels(rows["pixels"])))

    def encode_tokens(self, encoder: str, rows: Rows) -> tuple[torch.Tensor, Tokens]:
        """See `Model`. These towers run plain, where compiled ones are asked for too."""
        if encoder == "text":
            features, states, mask = text_tokens(self.clip, rows, self.rule)
        else:
            if self.patch_dropout is not None:
                self.patch_dropout.take(rows)
            features, states = image_tokens(self.clip.visual, self._pixels(rows["pixels"]))
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return _unit(features), {"values": states, "mask": mask}

    def width(self, encoder: str) -> int:
        """See `Model`."""
        return text_width(self.clip) if encoder == "text" else image_width(self.clip.visual)

    def size_of(self, field: str) -> int:
        """d of the rows `[n, d]` of a field."""
        return self.sizes.get(field, self.spec.model_cfg["embed_dim"])

    def token_embedding(self, encoder: str) -> nn.Embedding:
        """See `Model`."""
        if encoder != "text":
            return super().token_embedding(encoder)
        tower = text_tower(self.clip)
        return tower.transformer.get_input_embeddings() if hasattr(tower, "pooler") else tower.token_embedding

    def shared(self) -> dict[str, torch.Tensor]:
        """`logit_scale`, the factor on cosine similarities, and `logit_bias` where the model has one."""
        bias = getattr(self.clip, "logit_bias", None)
        return {"logit_scale": self._scale()} | ({} if bias is None else {"logit_bias": bias.float().clone()})

    def remarks(self) -> list[str]:
        """Lines for the user: what was set to 0, and what its heads have to say."""
        of_heads = [remark for head in self.heads.values() for remark in getattr(head, "remarks", ())]
        return [*filter(None, [self.silenced]), *of_heads]

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Unit-norm fp32 features `[n, d]` of uint8 images `[n, 3, h, w]` (or normalised float ones)."""
        return self({"image": {"pixels": images}})["rows"]["image"]

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unit-norm fp32 features `[n, d]` of `tokens` `[n, context]`."""
        return self({"text": self.text_rows(tokens)})["rows"]["text"]

    def text_rows(self, tokens: torch.Tensor) -> Rows:
        """`tokens` `[n, context]` (CPU), sorted into buckets and cut, on the model's device."""
        rows = self.rule(tokens.cpu())
        return {name: value.to(self.pixel_mean.device, non_blocking=True) for name, value in rows.items()}

    def export_state(self, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The towers of `state` (default: this module's) under open_clip's native keys, what adapters added merged,
        logit scale 0-dim and capped."""
        state = merge(self.adapters, self.state_dict() if state is None else state)
        native = {key.removeprefix("clip."): value for key, value in state.items() if key.startswith("clip.")}
        native |= {key: self.clip.get_buffer(key) for key in self.tables}
        for key in ("logit_scale", "logit_bias"):
            if key in native:
                native[key] = native[key].reshape(())
        native["logit_scale"] = native["logit_scale"].clamp(0.0, MAX_LOGIT_SCALE)
        return native

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.pixel_mean).div_(self.pixel_std) if images.dtype == torch.uint8 else images

    def _scale(self) -> torch.Tensor:
        # Straight through: beyond the cap the gradient still flows and can bring the parameter back.
        raw = self.clip.logit_scale.float()
        return (raw + (raw.clamp(0.0, MAX_LOGIT_SCALE) - raw).detach()).exp()


def build_model(
    name: str, seed: int, text_buckets: int = 1, logit_bias: bool = False, fresh: bool = True
) -> DualEncoder:
    """Towers of an open_clip architecture name or JSON path, fp32 on the CPU, initialised from `seed` alone, but for a
    text tower of transformers: it takes the weights that lie in its folder. `model.started` says what was loaded.

    `logit_bias`: with one, also where the architecture has none. `fresh`: False where a checkpoint gives all weights.

    Raises:
        UserError: an architecture that is unknown, cannot be built, or of a JSON that asks for dropout.
    """
    spec = resolve_spec(name)
    if logit_bias and spec.model_cfg.get("init_logit_bias") is None:
        spec.model_cfg["init_logit_bias"] = 0.0  # there is one; where it starts depends on the batch (logits.py)
    torch.manual_seed(seed)
    model = DualEncoder(spec, text_buckets)
    if name.endswith(".json"):
        refuse_dropout(spec, name, hashed=model.patch_dropout is not None)
    model.started = _start_towers(model) if fresh else []
    return model


def _start_towers(model: DualEncoder) -> list[str]:
    """Load the weights that the architecture names for its towers, where they are here; say what was loaded."""
    vision, text = model.spec.model_cfg["vision_cfg"], model.spec.model_cfg["text_cfg"]
    lines = []
    if vision.get("timm_model_pretrained"):
        lines.append(
            f"warning: the image tower {vision['timm_model_name']} starts at random: weights of timm "
            "(timm_model_pretrained) are never fetched; model.init takes a file or folder"
        )
    if text.get("hf_model_name"):
        if text.get("hf_model_pretrained", True):
            lines.append(load_text_weights(model.clip.text, text["hf_model_name"]))
        else:
            lines.append(f"text tower {text['hf_model_name']}: starts at random (hf_model_pretrained: false)")
    return lines


def attention_kernel(device: torch.device) -> AbstractContextManager:
    """On CPUs the plain kernel, in fp32: at these lengths its bf16 step is a quarter faster than the fused one's.

    A backward that runs layers again (`grad_checkpointing`) must stand in it too.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _unit(features: torch.Tensor) -> torch.Tensor:
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.float(), dim=-1)


def _build_clip(spec: ModelSpec) -> Clip:
    cfg = spec.model_cfg.copy()
    hub_text = cfg["text_cfg"].get("hf_model_name")
    kind = CustomTextCLIP if cfg.pop("custom_text", False) or hub_text else CLIP
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"] = {**cfg["vision_cfg"], "timm_model_pretrained": False}
    with allowed_folder(hub_text) if hub_text else nullcontext() as folder:
        if folder:
            cfg["text_cfg"] = {**cfg["text_cfg"], "hf_model_name": folder, "hf_model_pretrained": False}
        check_memory(lambda: kind(**cfg), spec.name)
        try:
            clip = kind(**cfg, nonscalar_logit_scale=True)
        except Exception as error:  # of open_clip, timm or transformers, wherever the settings led them
            got = f"{type(error).__name__}: {error}"
            raise UserError(f"model {spec.name} cannot be built from its settings", got=got) from None
    normed = [name for name, module in clip.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if normed:
        raise UserError(
            f"model {spec.name} has batch normalisation",
            got=f"{len(normed)} layers: {', '.join(normed[:3])}{', ...' if len(normed) > 3 else ''}",
            expected="towers whose features do not depend on the rest of the rank's batch",
            remedy="use a ViT or ConvNeXt",
        )
    return clip
