"""The model card of an export: what it is, what it was trained on, what it scores, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from pretrain.export import how
from pretrain.export.probes import Divergence
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import Classifier
from pretrain.towers.spec import ModelSpec


def model_card(
    model: DualEncoder | Classifier,
    formats: Mapping[str, str],
    training: Mapping,
    metrics: Mapping[str, float],
    differences: Mapping[str, float],
    divergences: Sequence[Divergence] = (),
) -> str:
    """Markdown with the front matter of a model hub.

    Args:
        formats: name of each layout that the folder has -> how to load it.
        training: fact -> value, as printed; empty: not known.
        metrics: name -> value of an evaluation of these weights; empty: none known.
        differences, divergences: of `verify_export`; without differences it was not verified.
    """
    classifier = isinstance(model, Classifier)
    task = "image-classification" if classifier else "zero-shot-image-classification"
    head = ["---", f"library_name: {next(iter(formats))}", f"pipeline_tag: {task}", "tags:", "- clip", "---"]
    spec = model.spec
    kind = "An image classifier" if classifier else "A dual encoder for images and text"
    parts = [
        "\n".join(head),
        f"# {spec.name}\n\n{kind}, trained with dualstream.",
        *([f"## Classes\n{_classes(model.classes)}"] if isinstance(model, Classifier) else []),
        "## Architecture\n" + _table(_architecture(spec, classifier)),
        *([f"## Heads\n{left}"] if (left := left_behind(model)) else []),
        "## Training\n" + (_table(training) if training else "Not known."),
        "## Results\n" + (_numbers(metrics) if metrics else "None recorded."),
        "## Loading\n" + "\n".join(formats.values()),
        "## Verification\n" + _verification(differences),
        "## Awkward inputs\n" + _trust(classifier) + _divergences(divergences),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def left_behind(model: DualEncoder | Classifier) -> str:
    """A line that names the heads of `model`, for which no layout has a form, and where they are of use; empty where it
    has none."""
    heads = ", ".join(getattr(model, "heads", {}))
    where = "the run and its checkpoints keep them, and another pretraining takes them along by model.init"
    return f"Heads that stay behind: {heads}. No client has a form for them; {where}." if heads else ""


def _classes(names: Sequence[str]) -> str:
    return "\n".join(f"- {number}: {json.dumps(name, ensure_ascii=False)}" for number, name in enumerate(names))


def _architecture(spec: ModelSpec, classifier: bool) -> dict:
    vision, text = spec.model_cfg["vision_cfg"], spec.model_cfg["text_cfg"]
    rows = {
        "embedding": spec.model_cfg["embed_dim"],
        "image": f"{spec.image_size} px, {spec.preprocess_cfg['interpolation']}, {spec.preprocess_cfg['resize_mode']}",
        "image tower": _tower(vision, "timm_model_name"),
        "activation": "QuickGELU" if spec.model_cfg.get("quick_gelu", False) else "GELU",
    }
    texts = {"text tower": _tower(text, "hf_model_name"), "context": f"{spec.context_length} tokens"}
    return rows if classifier else rows | texts


def _tower(cfg: Mapping, named: str) -> str:
    if cfg.get(named):
        return str(cfg[named])
    shape = [f"{key} {cfg[key]}" for key in ("patch_size", "width", "heads", "head_width", "layers") if key in cfg]
    return ", ".join(shape) or "open_clip's default"


def _numbers(metrics: Mapping[str, float]) -> str:
    return _table({name: f"{value:.4g}" for name, value in metrics.items()})


def _verification(differences: Mapping[str, float]) -> str:
    if not differences:
        return "Not verified."
    return "Largest difference from what the trainer's model computes:\n" + _table(
        {name: f"{value:.1e}" for name, value in differences.items()}
    )


def _trust(classifier: bool) -> str:
    return how.PICTURES if classifier else how.PICTURES + how.TEXTS


def _divergences(found: Sequence[Divergence]) -> str:
    if not found:
        return ""
    rows = {f"{one.client}, {one.kind}": f"{one.cosine:.3f}" for one in found}
    return "Lowest cosine of a client's features with the trainer's, for such inputs as they are:\n" + _table(rows)


def _table(rows: Mapping) -> str:
    return "\n".join(["| | |", "|-|-|", *(f"| {name} | {value} |" for name, value in rows.items())])
