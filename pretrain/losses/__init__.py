"""Contrastive losses, exact across ranks and under gradient caching. A new one is a file and a line here."""

from pretrain.losses.contrastive import infonce

LOSSES = {"infonce": infonce}
