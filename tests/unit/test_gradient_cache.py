"""What the two passes of a gradient cache compute."""

import pytest
import torch

import joint
from pretrain.engine.backward import backward


class OneProcess:
    """An engine that takes no step."""

    device = torch.device("cpu")

    def __init__(self, model):
        self.model = model

    def __call__(self, *inputs):
        return self.model(*inputs)

    def backward(self, loss):
        loss.backward()

    def accumulate(self, parts):
        for part in parts:
            part()


def gradients(names, parts, seen):
    """By parameter; `seen` gets of every call of an encoder its name, whether it learns, and whether words are hidden
    from it."""
    torch.manual_seed(0)
    model = joint.Joint()
    for name in ("encode", "encode_tokens"):
        setattr(model, name, _spied(getattr(model, name), seen))
    inputs = joint.cut(model, joint.inputs(model), 0, joint.PAIRS, parts)
    backward(OneProcess(model), inputs, joint.objectives(names)[0], samples_seen=0)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def _spied(encode, seen):
    def encoded(encoder, rows):
        seen.append((encoder, torch.is_grad_enabled(), "wanted" in rows))
        return encode(encoder, rows)

    return encoded


@pytest.mark.parametrize(
    ("names", "compared"),
    [(("infonce", "mlm"), {"image", "text"}), (("doubt", "mlm"), set()), (("match",), {"image", "text"})],
)
def test_the_first_pass_encodes_what_is_compared_alone(names, compared):
    seen = []
    cached = gradients(names, 4, seen)
    first = [(encoder, masked) for encoder, learns, masked in seen if not learns]
    assert sorted(first) == sorted([(encoder, False) for encoder in compared] * 4)
    assert sum(masked for *_, masked in seen) == 4  # of the replay
    whole = gradients(names, 1, [])
    for name, grad in whole.items():
        assert torch.allclose(cached[name], grad, rtol=1e-3, atol=1e-6), name
