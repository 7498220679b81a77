"""A head that reads an image and a text together: text tokens attend to image tokens (ALBEF, arXiv 2107.07651).

Its layers are pre-norm transformer blocks of plain linears, each called by itself, so that ZeRO-3 gathers what it cuts.
There is no dropout, so gradients do not depend on how a batch is cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from data_tools.errors import UserError
from pretrain.towers.cut import Rows
from pretrain.towers.heads import FusionConfig
from pretrain.towers.heads.head import Head
from pretrain.towers.model import Inputs, Model, Outputs, Tokens

_STD = 0.02  # of weights at the start; smaller where many layers add up


class Fusion(Head):
    """Logits of match, `[n]` fp32 by pairing: `image+text`, row by row, and with every mined field `image+text#NAME`
    and `image#NAME+text`.

    Of rows that are to be paired otherwise the input `pairs` has the numbers, `image` and `text`, int64 `[p]` each:
    `image+text` are then the logits `[p]` of these.
    """

    reads = frozenset({"image", "text"})

    def __init__(self, settings: FusionConfig, model: Model):
        super().__init__()
        width = settings.width or model.width("text")
        self.from_text = nn.Linear(model.width("text"), width)
        self.from_image = nn.Linear(model.width("image"), width)
        self.norm_image = nn.LayerNorm(width)
        heads = settings.heads or next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        if width % heads:
            raise UserError(
                "the heads of the fusion head do not share its width evenly",
                got=f"{heads} heads, width {width}",
                remedy="set heads.fusion.heads to a divisor of the width",
            )
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)
        self._start(settings.layers)

    def forward(self, outputs: Outputs, inputs: Inputs) -> dict[str, torch.Tensor]:
        """See the class. One pass of the layers for all pairings together."""
        tokens = outputs["local"]["tokens"]
        pairings = [("image", "text")]
        mined = {field.partition("#")[2] for field in tokens if "#" in field}
        for name in sorted(mined):
            pairings += [("image", f"text#{name}"), (f"image#{name}", "text")]
        pairings = [pairing for pairing in pairings if all(field in tokens for field in pairing)]
        rows: Rows = inputs.get("pairs", {})
        images, texts = (
            joined([_taken(tokens[pairing[side]], rows.get(field)) for pairing in pairings])
            for side, field in enumerate(("image", "text"))
        )
        logits = self.judge(*images, *texts).split([_count(tokens, rows, pairing) for pairing in pairings])
        return {"+".join(pairing): own for pairing, own in zip(pairings, logits, strict=True)}

    def judge(
        self, image: torch.Tensor, image_mask: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> torch.Tensor:
        """Logits `[n]` of image tokens `[n, l, w]` with text tokens `[n, m, v]`; masks, bool, say which are there."""
        image = self.norm_image(self.from_image(image))
        x = self.from_text(text)
        for layer in self.layers:
            x = layer(x, text_mask, image, image_mask)
        x = self.norm(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~text_mask[..., None], 0)
            return self.score(x.sum(dim=1) / text_mask.sum(dim=1, keepdim=True))[:, 0]

    def _start(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                adds_up = name.endswith((".out.weight", ".down.weight"))
                nn.init.normal_(parameter, std=_STD * ((3 * layers) ** -0.5 if adds_up else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


class Block(nn.Module):
    """Text attends to itself, then to the image; then each token by itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.own, self.cross = Attention(width, heads), Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, image: torch.Tensor, image_mask: torch.Tensor
    ) -> torch.Tensor:
        """Text tokens `[n, m, w]` again, having seen `image` `[n, l, w]`."""
        own = self.norm_self(x)
        x = x + self.own(own, own, mask)
        x = x + self.cross(self.norm_cross(x), image, image_mask)
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Attention(nn.Module):
    """Multi-head attention of four linears."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)  # a bias adds the same to all that a token compares

    def forward(self, x: torch.Tensor, seen: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What tokens `x` `[n, m, w]` read from `seen` `[n, l, w]` where `mask` `[n, l]` is true."""
        query, key, value = (
            linear(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, tokens in ((self.query, x), (self.key, seen), (self.value, seen))
        )
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return self.out(read.transpose(1, 2).flatten(2))


def joined(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and masks of several fields as those of one, as long as the longest that is there."""
    longest = max(values.shape[1] for values, _ in parts)
    values = torch.cat([F.pad(own, (0, 0, 0, longest - own.shape[1])) for own, _ in parts])
    mask = torch.cat([F.pad(own, (0, longest - own.shape[1])) for _, own in parts])
    mask[:, 0] = True  # of what is absent too: a softmax over nothing is not a number
    used = int(mask.any(dim=0).nonzero()[-1]) + 1  # mined texts come at full length
    return values[:, :used], mask[:, :used]


def _taken(tokens: Tokens, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    values, mask = tokens["values"], tokens["mask"]
    return (values, mask) if rows is None else (values[rows], mask[rows])


def _count(tokens: Mapping[str, Tokens], rows: Rows, pairing: tuple[str, str]) -> int:
    return len(rows["image"]) if rows else len(tokens[pairing[0]]["values"])
