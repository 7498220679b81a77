"""A model with heads, and objectives of every kind beside the registered ones: what the gradient path must be exact
for. Each toy has its plain form beside it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import tiny
from plain_losses import SETTINGS, identities, plain
from pretrain.objectives.objective import Weighted, build
from pretrain.towers.build import DualEncoder
from pretrain.towers.heads import FusionConfig, ProjectionConfig, WordsConfig
from pretrain.towers.heads.equip import Equipment
from pretrain.towers.model import STORED

PAIRS, CLASSES, WORDS, SLOTS = 16, 3, 7, 4
START, MASK = 49406, 187  # ids of tokens
DIM = tiny.MODEL_CFG["embed_dim"]
PAIR, TEACHER = ("image", "text"), 20  # what has a teacher, and the numbers of its features


class Classes(nn.Linear):
    """Scores `[n, CLASSES]` of images."""

    def forward(self, outputs, inputs):
        return super().forward(outputs["rows"]["image"])


class Slots(nn.Linear):
    """Scores `[n, SLOTS, WORDS]` of what stands in each of a text's slots."""

    def forward(self, outputs, inputs):
        return super().forward(outputs["rows"]["text"]).unflatten(1, (SLOTS, WORDS))


class Joint(DualEncoder):
    """The tiny towers with three heads and a learned loss weight, exp(-doubt)."""

    def __init__(self):
        super().__init__(replace(tiny.SPEC, model_cfg=tiny.MODEL_CFG | {"init_logit_bias": -3.0}), text_buckets=2)
        self.heads["classes"] = Classes(DIM, CLASSES)
        self.heads["slots"] = Slots(DIM, SLOTS * WORDS)
        heads = {"fusion": FusionConfig(layers=2, width=32, heads=2), "words": WordsConfig()}
        heads |= {f"{field}_to_teacher_{field}": ProjectionConfig(of=field, to=f"teacher_{field}") for field in PAIR}
        teachers = [f"teacher_{field}" for field in PAIR]
        stored = dict.fromkeys(teachers, STORED)
        Equipment({"masked_text": "text", **stored}, dict.fromkeys(teachers, TEACHER), heads).give(self, seed=0)
        self.doubt = nn.Parameter(torch.tensor([0.3]))

    def shared(self):
        return super().shared() | {"doubt": self.doubt.float().clone()}


class Guess:
    """Words in slots, of which some samples have many and others none; its weight is live in every micro-batch."""

    wants = frozenset({"slots"})

    def count(self, inputs):
        return (inputs["slots"]["wanted"] >= 0).sum()

    def loss(self, outputs, inputs, reduction="sum"):
        scores = outputs["local"]["slots"].flatten(0, 1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        wanted = inputs["slots"]["wanted"].flatten()
        loss = F.cross_entropy(scores, wanted, ignore_index=-100, reduction=reduction)
        return torch.exp(-outputs["shared"]["doubt"]) * loss

    def plain(self, outputs, inputs):
        return self.loss(outputs, inputs, "mean")


class Doubt:
    """What keeps the learned weight from falling to 0: it counts once."""

    reads = frozenset()

    def loss(self, rows, shared, facts):
        return shared["doubt"].sum()

    def plain(self, outputs, inputs):
        return outputs["shared"]["doubt"].sum()


def objectives(names):
    """name -> `Weighted`, and its plain form: of registered ones by their settings, or of toys."""
    toys = {"guess": Guess(), "doubt": Doubt()}
    ours = build({name: SETTINGS[name] for name in names if name not in toys})
    ours |= {name: Weighted(toys[name], 0.5) for name in names if name in toys}
    forms = {name: toys[name].plain if name in toys else _plain(SETTINGS[name]) for name in names}
    return {name: ours[name] for name in names}, forms


def _plain(settings):
    return lambda outputs, inputs: plain(settings, outputs, inputs)


TOYS = ("guess", "doubt")


def inputs(model, absent=True):
    """The global batch; `absent`: texts are missing of some pairs and of the whole last quarter, labels of the last
    half, teachers of the first quarter's images. The slots that hold a word, and the words that are hidden, are more
    with every sample."""
    images, tokens = tiny.batch(model, PAIRS)
    g = torch.Generator().manual_seed(5)
    image, text = identities(PAIRS).unbind(1)
    share = torch.linspace(0.05, 0.9, PAIRS)[:, None]
    words = torch.randint(0, WORDS, (PAIRS, SLOTS), generator=g)
    whole = {
        "image": {"pixels": images, "identity": image},
        "text": {"tokens": tokens, "identity": text},
        "label": {"class": torch.arange(PAIRS) % CLASSES},
        "slots": {"wanted": torch.where(torch.rand(PAIRS, SLOTS, generator=g) < share, words, -100)},
    }
    hidden = (torch.rand(tokens.shape, generator=g) < share) & (tokens > 0) & (tokens < START)
    for field in PAIR:
        whole[f"teacher_{field}"] = {"values": F.normalize(torch.randn(PAIRS, TEACHER, generator=g), dim=-1)}
    if absent:
        here = torch.arange(PAIRS)
        whole["teacher_image"]["present"] = (here >= PAIRS // 4) & (here % 5 != 1)  # a quarter is a whole rank of four
        whole["text"]["present"] = (here < 3 * PAIRS // 4) & (here != 2) & (here != 5)
        whole["label"]["present"] = here < PAIRS // 2
        hidden &= whole["text"]["present"][:, None]
    masked, wanted = torch.where(hidden, MASK, tokens), torch.where(hidden, tokens, -100)
    return whole | {"masked_text": {"tokens": masked, "wanted": wanted}}


def cut(model, whole, first, size, parts):
    """Micro-batches of the `size` samples from `first` on."""
    found = []
    for start in range(first, first + size, size // parts):
        rows = slice(start, start + size // parts)
        own = {field: {name: value[rows] for name, value in values.items()} for field, values in whole.items()}
        for field in ("text", "masked_text"):
            own[field] |= model.rule(own[field]["tokens"])
        found.append(own)
    return found


def reference(names, whole, mined, autocast=False):
    """Losses by name and all gradients: one process, plain autograd, text at full length, the mined rows given; fp64,
    or fp32 under autocast."""
    torch.manual_seed(0)
    model = Joint() if autocast else Joint().double()
    dtype = torch.float32 if autocast else torch.float64
    ours, forms = objectives(names)
    given = {f"{field}#match": {n: v[rows] for n, v in whole[field].items()} for field, rows in mined.items()}
    everything = whole | given
    seen, states = [], {}  # of tokens, at full length
    model.clip.ln_final.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rows, tokens = {}, {}
        for field, values in everything.items():
            if "pixels" in values or "tokens" in values:
                tokens[field] = model.encode_tokens(model.encoder_of[field.partition("#")[0]], values)[1]
            if "pixels" in values:
                rows[field] = model.clip.encode_image(model._pixels(values["pixels"]))
            if "tokens" in values:
                rows[field] = model.clip.encode_text(values["tokens"])
                states[field] = seen.pop()
        rows = {field: F.normalize(value.to(dtype), dim=-1) for field, value in rows.items()}
        rows |= {field: values["values"].to(dtype) for field, values in whole.items() if "values" in values}
        shared = {
            "logit_scale": model.clip.logit_scale.exp(),
            "logit_bias": model.clip.logit_bias,
            "doubt": model.doubt,
        }
        outputs = {"rows": rows, "shared": shared, "local": {"tokens": tokens}}
        wanted = frozenset().union(*(getattr(o.objective, "wants", ()) for o in ours.values()))
        for name in sorted(wanted):
            own = name == "words"  # its own form: of all tokens and words
            kind = "rows" if getattr(model.heads[name], "gives_rows", False) else "local"
            outputs[kind][name] = word_scores(model, states) if own else model.heads[name](outputs, everything)
    losses = {name: form(outputs, everything).sum() for name, form in forms.items()}
    sum(ours[name].weight * loss for name, loss in losses.items()).backward()
    return {n: v.item() for n, v in losses.items()}, {n: p.grad for n, p in model.named_parameters()}


def word_scores(model, states):
    """Scores `[n, context, vocabulary]` of every token by the head `words`, from its definition."""
    head = model.heads["words"]
    hidden = head.norm(F.gelu(head.dense(states["masked_text"])))
    scores = hidden @ model.clip.token_embedding.weight.T + head.bias
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def errors(got, want):
    """Relative error of every loss and of every parameter's gradient; where it must be 0, whatever it is."""
    losses = {f"loss of {name}": abs(got[0][name] - value) / (abs(value) or 1) for name, value in want[0].items()}
    for name, grad in want[1].items():
        own = got[1][name]
        found = 0.0 if own is None else own.double()
        norm = 0.0 if grad is None else float(grad.double().norm())
        off = float((found - (0 if grad is None else grad.double())).norm()) if torch.is_tensor(found) else norm
        losses[name] = off / (norm or 1)
    return losses
