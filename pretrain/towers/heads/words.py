"""What words were hidden in a text: BERT's head (arXiv 1810.04805) on the states of the tokens that hide them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.towers.clip import text_tower
from pretrain.towers.heads import WordsConfig
from pretrain.towers.heads.head import Head
from pretrain.towers.model import Inputs, Model, Outputs

FIELD = "masked_text"
_CAUSAL = (
    "masked words: the text tower is causal, so a hidden word sees only what stands before it; a tower "
    "of BERT's kind, or one with no_causal_mask, sees the whole text"
)
_STD, _EPS = 0.02, 1e-12  # as in BERT: of initial weights, and of the norm


class Words(Head):
    """Called as a head, `-log p` of each hidden word, fp32 `[m]`, in the order of samples and of places in them. Only
    those m states are taken through the vocabulary; m differs between ranks and may be 0.

    A state goes through a layer, GELU and a norm, as BERT's does, to scores of all words: by a matrix of its own or,
    `tied`, by the text tower's embedding. That is asked for its rows in a forward of its own, so that under ZeRO-3 it
    is whole there.
    """

    reads = frozenset({FIELD})

    def __init__(self, settings: WordsConfig, model: Model):
        super().__init__()
        encoder = model.encoder_of[FIELD]
        embedding = model.token_embedding(encoder)
        words, width = embedding.weight.shape
        self.dense = nn.Linear(model.width(encoder), width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.bias = nn.Parameter(torch.zeros(words))
        self._embedding = (embedding,) if settings.tied else ()  # in a tuple it is no part of this module
        if not settings.tied:
            self.weight = nn.Parameter(torch.empty(words, width))
            nn.init.normal_(self.weight, std=_STD)
        nn.init.normal_(self.dense.weight, std=_STD)
        nn.init.zeros_(self.dense.bias)
        if _is_causal(model):
            self.remarks = (_CAUSAL,)

    def forward(self, outputs: Outputs, inputs: Inputs) -> torch.Tensor:
        """See `Words`."""
        states = outputs["local"]["tokens"][FIELD]["values"]  # [n, length, width]
        wanted = inputs[FIELD]["wanted"][:, : states.shape[1]]
        hidden = wanted >= 0
        features = self.norm(F.gelu(self.dense(states[hidden])))  # [m, width]
        scores = F.linear(features, self._rows(), self.bias)
        with torch.autocast(scores.device.type, enabled=False):
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            return F.cross_entropy(scores, wanted[hidden], reduction="none")

    def _rows(self) -> torch.Tensor:
        """What the scores of the words are products with, `[words, width]`."""
        if not self._embedding:
            return self.weight
        (embedding,) = self._embedding
        return embedding(torch.arange(len(self.bias), device=self.bias.device))


def _is_causal(model: Model) -> bool:
    clip = getattr(model, "clip", None)
    return clip is not None and getattr(text_tower(clip), "attn_mask", None) is not None
