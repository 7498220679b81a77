"""An image classifier on the image tower, its head started from the text tower's class weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from pretrain.config import FinetuneConfig
from pretrain.engine.weights import load_trained
from pretrain.evaluate.classification import class_embeddings
from pretrain.evaluate.templates import load_templates
from pretrain.runtime import Runtime
from pretrain.towers.build import DualEncoder, build_model
from pretrain.towers.initialise import InitReport, initialise


class Classifier(nn.Module):
    """Class scores of images: scale * (unit-norm feature) @ head, as the zero-shot classifier computes them.

    `scale` is the pretrained exp(logit_scale), held fixed; `head.weight` is `[classes, d]`, without a bias.
    """

    def __init__(self, towers: DualEncoder, head: torch.Tensor, scale: float, train_tower: bool):
        super().__init__()
        self.towers = towers
        self.head = nn.Linear(head.shape[1], head.shape[0], bias=False)
        with torch.no_grad():
            self.head.weight.copy_(head)
        self.scale = scale
        visual = {id(p) for p in towers.clip.visual.parameters()}
        for parameter in towers.parameters():
            parameter.requires_grad_(train_tower and id(parameter) in visual)

    def forward(self, images: torch.Tensor, bits: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 logits `[n, classes]` of uint8 images `[n, 3, h, w]`. `bits`: see `DualEncoder.forward`."""
        features = self.towers(images, None, bits)[0]
        with torch.autocast(features.device.type, enabled=False):
            return self.scale * self.head(features)


def build_classifier(
    config: FinetuneConfig, classes: tuple[str, ...], runtime: Runtime
) -> tuple[Classifier, list[str]]:
    """The classifier of the settings and lines that say how it was initialised. All ranks must call it."""
    towers, lines = _towers(config)
    towers.set_grad_checkpointing(config.train.grad_checkpointing)
    towers = towers.to(runtime.device).eval()
    scale = float(towers._scale().detach())
    if config.zero_shot_head and not config.random:
        head = class_embeddings(
            lambda _, texts: (None, towers.encode_text(texts)),
            towers.tokenize,
            classes,
            load_templates(config.templates),
            runtime,
        )
        lines.append(f"head of {len(classes)} classes from zero-shot text weights, templates {config.templates!r}")
    else:
        head = torch.zeros(len(classes), towers.spec.model_cfg["embed_dim"])
        lines.append(f"head of {len(classes)} classes from zeros")
    classifier = Classifier(towers, head.cpu(), scale, config.mode == "full")
    trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    lines.append(f"mode {config.mode}: {trained} parameters learn")
    return classifier.train(), lines  # the towers gave class weights in evaluation mode


def _towers(config: FinetuneConfig) -> tuple[DualEncoder, list[str]]:
    if config.random:
        return build_model(config.init, config.seed), [f"random initialisation of {config.init}, seed {config.seed}"]
    trained = load_trained(config.init, config.init_ema)
    if config.image_size is None or config.image_size == trained.spec.image_size:
        return trained, [str(InitReport(config.init, list(trained.clip.state_dict())))]
    resized = DualEncoder(_with_size(trained.spec, config.image_size))
    return resized, [str(initialise(resized, trained.export_state(), config.init))]


def _with_size(spec, size: int):
    model_cfg = {**spec.model_cfg, "vision_cfg": {**spec.model_cfg["vision_cfg"], "image_size": size}}
    return replace(spec, model_cfg=model_cfg, preprocess_cfg={**spec.preprocess_cfg, "size": size})
