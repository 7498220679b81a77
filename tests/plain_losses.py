"""The objectives by their definitions, in one process, on the whole batch and by plain autograd: what ours must equal.

`FORMS` has one for every registered objective. Pairs or samples that are absent are left out before anything else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pretrain import objectives
from pretrain.objectives import OBJECTIVES, PairsConfig
from pretrain.objectives.objective import build

SETTINGS = {
    **{name: entry.settings() for name, entry in OBJECTIVES.items()},
    "infonce, smoothed": objectives.InfoNCEConfig(label_smoothing=0.1),
    "multi_positive, smoothed": objectives.MultiPositiveConfig(label_smoothing=0.1),
    "margin": objectives.MarginConfig(margin=0.3),
    "margin, hardest": objectives.MarginConfig(margin=0.3, negatives="hardest"),
}
OF_PAIRS = {name: settings for name, settings in SETTINGS.items() if isinstance(settings, PairsConfig)}


def plain(settings, outputs, inputs):
    """The loss of the whole batch: of the model's `outputs` (rows, shared, local) for its `inputs`."""
    return FORMS[type(settings)](settings, outputs, inputs)


def _pairs(settings, outputs, inputs):
    """Rows of both fields, and who is who, of the pairs that have both."""
    keep = torch.ones(len(outputs["rows"][settings.fields[0]]), dtype=torch.bool)
    for field in settings.fields:
        keep = keep & inputs.get(field, {}).get("present", keep)
    known = [inputs[f]["identity"][keep] for f in settings.fields if "identity" in inputs.get(f, {})]
    return (*(outputs["rows"][field][keep] for field in settings.fields), torch.stack(known, 1) if known else None)


def _softmax(settings, outputs, inputs):
    image, text, identity = _pairs(settings, outputs, inputs)
    pairs, cosine, scale = len(image), image @ text.T, outputs["shared"]["logit_scale"]
    if not pairs:
        return image.sum() + text.sum() + 0 * scale.sum()
    target = torch.eye(pairs, dtype=cosine.dtype)
    if isinstance(settings, objectives.MultiPositiveConfig):
        target = (identity[:, None] == identity[None]).any(dim=2).to(cosine.dtype)
        target /= target.sum(dim=1, keepdim=True)
    target = (1 - settings.label_smoothing) * target + settings.label_smoothing / pairs
    return (F.cross_entropy(scale * cosine, target) + F.cross_entropy(scale * cosine.T, target)) / 2


def _sigmoid(settings, outputs, inputs):
    image, text, _ = _pairs(settings, outputs, inputs)
    scale, bias = (outputs["shared"][name] for name in ("logit_scale", "logit_bias"))
    answers = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(answers * (scale * image @ text.T + bias)).sum() / max(len(image), 1)


def _margin(settings, outputs, inputs):
    """Hinges of both directions for every pair."""
    image, text, _ = _pairs(settings, outputs, inputs)
    cosine = image @ text.T
    if not len(image):
        return image.sum() + text.sum()
    own = cosine.diagonal()
    hinges = [(settings.margin + s - own[:, None]).clamp(min=0).fill_diagonal_(0) for s in (cosine, cosine.T)]
    return torch.stack([h.sum(dim=1) if settings.negatives == "sum" else h.amax(dim=1) for h in hinges]).mean()


def _classes(settings, outputs, inputs):
    wanted, scores = inputs["label"]["class"], outputs["local"]["classes"]
    keep = inputs["label"].get("present", torch.ones_like(wanted, dtype=torch.bool))
    return F.cross_entropy(scores[keep], wanted[keep], reduction="sum") / max(int(keep.sum()), 1)


def _match(settings, outputs, inputs):
    """Of each pair three judgements: it is one; with a mined text, and with a mined image, it is none. Those of mined
    rows that are the pair's own, because there was nothing else, count 0."""
    present = inputs["text"].get("present", torch.ones(len(inputs["image"]["identity"]), dtype=torch.bool))
    logits = outputs["local"]["fusion"]
    told = {name: logits[name].to(torch.promote_types(logits[name].dtype, torch.float32)).sigmoid() for name in logits}
    wrong = {f: present & (inputs[f"{f}#match"]["identity"] != inputs[f]["identity"]) for f in ("image", "text")}
    total = told["image+text"][present].log().sum()
    total = total + (1 - told["image+text#match"][wrong["text"]]).log().sum()
    total = total + (1 - told["image#match+text"][wrong["image"]]).log().sum()
    return -total / (3 * max(int(present.sum()), 1))


def _mlm(settings, outputs, inputs):
    """Of the scores of every word at every place, where one is wanted."""
    wanted, scores = inputs["masked_text"]["wanted"], outputs["local"]["words"]
    total = F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
    return total / max(int((wanted != -100).sum()), 1)


def _kept(names, outputs, inputs):
    """Rows of all `names` of the samples that have all of them, and who those are."""
    keep = torch.ones(len(outputs["rows"][names[0]]), dtype=torch.bool)
    for name in names:
        keep = keep & inputs.get(name, {}).get("present", keep)
    return [outputs["rows"][name][keep] for name in names], keep


def _feature_distillation(settings, outputs, inputs):
    (_, teacher), keep = _kept(settings.fields, outputs, inputs)
    student = outputs["rows"]["{}_to_{}".format(*settings.fields)][keep]
    return F.mse_loss(student, teacher.to(student.dtype)) if keep.any() else student.sum()


def _relational_distillation(settings, outputs, inputs):
    rows, keep = _kept((*settings.fields, *settings.teachers), outputs, inputs)
    image, text, *teacher = rows
    if not keep.any():
        return image.sum() + text.sum()
    student = outputs["shared"]["logit_scale"] * image @ text.T
    teacher = (teacher[0].to(image.dtype) @ teacher[1].to(image.dtype).T) / settings.teacher_temperature
    ways = [(student, teacher), (student.T, teacher.T)]
    return (
        sum(F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True) for s, t in ways) / 2
    )


def _interactive_contrastive(settings, outputs, inputs):
    total = 0
    for own, like, other in (
        (settings.fields[0], *settings.teachers),
        (settings.fields[1], *settings.teachers[::-1]),
    ):
        (_, key), keep = _kept((own, other), outputs, inputs)
        anchor = outputs["rows"][f"{own}_to_{like}"][keep]
        logits = outputs["shared"]["logit_scale"] * anchor @ key.to(anchor.dtype).T
        total = total + (F.cross_entropy(logits, torch.arange(len(key))) if keep.any() else logits.sum()) / 2
    return total


FORMS = {
    objectives.FeatureDistillationConfig: _feature_distillation,
    objectives.RelationalDistillationConfig: _relational_distillation,
    objectives.InteractiveContrastiveConfig: _interactive_contrastive,
    objectives.InfoNCEConfig: _softmax,
    objectives.MultiPositiveConfig: _softmax,
    objectives.SigmoidConfig: _sigmoid,
    objectives.MarginConfig: _margin,
    objectives.ClassesConfig: _classes,
    objectives.MatchConfig: _match,
    objectives.MLMConfig: _mlm,
}


def of_pairs(settings, image, text, scale, bias=None, identity=None, present=None, by=None):
    """The loss of features `[b, d]` by `settings`: ours, this rank's share, or `by=plain` that of the whole batch.

    `scale` and `bias` `[1]`; `identity` int64 `[b, 2]` says who is who; `present` bool `[b]`: which texts are there.
    """
    facts = {"image": {}, "text": {} if present is None else {"present": present}}
    if identity is not None:
        facts["image"]["identity"], facts["text"]["identity"] = identity.unbind(1)
    rows, shared = {"image": image, "text": text}, {"logit_scale": scale, "logit_bias": bias}
    if by is not None:
        return by(settings, {"rows": rows, "shared": shared}, facts)
    (ours,) = build({"it": settings}).values()
    return ours.objective.loss(rows, shared, facts)


def identities(pairs):
    """Some images come up to three times and some texts twice, near and far apart, so that they meet across ranks."""
    image, text = torch.arange(pairs) % (2 * pairs // 3), torch.arange(pairs)
    image[7] = image[8] = image[9]
    text[[3, pairs - 2]], text[[10, 11]] = 1000, -1
    return torch.stack([image, text], dim=1)
