"""The model card of an export: what it is, what it was trained on, what it scores, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pretrain.towers.spec import ModelSpec

_LOAD = {
    "open_clip": """\
### open_clip (3.0 or newer)
```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:PATH_OF_THIS_FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:PATH_OF_THIS_FOLDER")
model.eval()
image_features = model.encode_image(preprocess(image).unsqueeze(0), normalize=True)
text_features = model.encode_text(tokenizer(["a photo of a dog."]), normalize=True)
```
""",
    "transformers": """\
### transformers
```python
from transformers import CLIPModel, CLIPProcessor
model = CLIPModel.from_pretrained("PATH_OF_THIS_FOLDER")
processor = CLIPProcessor.from_pretrained("PATH_OF_THIS_FOLDER")
inputs = processor(text=["a photo of a dog."], images=image, return_tensors="pt", padding=True, truncation=True)
logits_per_image = model(**inputs).logits_per_image
```
transformers does not unescape HTML entities as open_clip does, and resizes images with slightly other rounding.
""",
}


def model_card(
    spec: ModelSpec,
    formats: Sequence[str],
    training: Mapping,
    metrics: Mapping[str, float],
    differences: Mapping[str, float],
) -> str:
    """Markdown with the front matter of a model hub.

    Args:
        training: fact -> value, as printed; empty: not known.
        metrics: name -> value of an evaluation of these weights; empty: none known.
        differences: of `verify_export`; empty: not verified.
    """
    library = "open_clip" if "open_clip" in formats else "transformers"
    head = ["---", f"library_name: {library}", "pipeline_tag: zero-shot-image-classification", "tags:", "- clip", "---"]
    parts = [
        "\n".join(head),
        f"# {spec.name}\n\nA dual encoder for images and text, trained with dualstream.",
        "## Architecture\n" + _table(_architecture(spec)),
        "## Training\n" + (_table(training) if training else "Not known."),
        "## Results\n" + (_numbers(metrics) if metrics else "None recorded."),
        "## Loading\n" + "\n".join(_LOAD[name] for name in _LOAD if name in formats),
        "## Verification\n" + _verification(differences),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _architecture(spec: ModelSpec) -> dict:
    vision, text = spec.model_cfg["vision_cfg"], spec.model_cfg["text_cfg"]
    return {
        "embedding": spec.model_cfg["embed_dim"],
        "image": f"{spec.image_size} px, {spec.preprocess_cfg['interpolation']}, {spec.preprocess_cfg['resize_mode']}",
        "image tower": _tower(vision, "timm_model_name"),
        "text tower": _tower(text, "hf_model_name"),
        "context": f"{spec.context_length} tokens",
        "activation": "QuickGELU" if spec.model_cfg.get("quick_gelu", False) else "GELU",
    }


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
    return "Largest difference from the trainer's features:\n" + _table(
        {name: f"{value:.1e}" for name, value in differences.items()}
    )


def _table(rows: Mapping) -> str:
    return "\n".join(["| | |", "|-|-|", *(f"| {name} | {value} |" for name, value in rows.items())])
