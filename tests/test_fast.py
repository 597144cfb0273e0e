"""The fast form of every quantizer against its plain definition: forward exactly, gradients to a millionth."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench import compose, registry
from qbench.methods import dorefa, gupta, hwgq, lsq, pact, uniform, xnor
from qbench.models import resnet
from qbench.quant import ops
from qbench.quant.layers import install
from qbench.quant.method import Probe

METHODS = [name for name in registry.names("method") if name not in ("float",)]


def awkward(levels: int = 4) -> Tensor:
    """Return activations with ties, ends, borders of cells and zeros of both signs among them, channels_last."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 5) * 1.5
    flat = x.view(-1)
    for i, n in enumerate((1, 2, 3, 7, 15)):
        special = torch.arange(-2 * n, 2 * n + 1) / (2 * n)
        flat[60 * i : 60 * i + len(special)] = special
    flat[300:304] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    flat[304:308] = torch.tensor([math.nextafter(1, 2), math.nextafter(1, 0), 1e-40, -1e-40])
    return x.to(memory_format=torch.channels_last)


def both(function, x: Tensor, *learned: Tensor) -> list[list[Tensor]]:
    """Return value and gradients by the fast form, the compressed one, and the plain definition."""
    torch.manual_seed(1)
    weights, found = torch.randn_like(x), []
    for context in (ops.compressed(False), ops.compressed(), ops.plainly()):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *learned)]
        with context:
            y = function(*leaves)
            y.backward(weights)
        found.append([y.detach(), *[leaf.grad for leaf in leaves]])
    return found


T = torch.tensor
ACTIVATIONS = {
    **{f"dorefa {b}": (lambda x, b=b: dorefa.quantize_activation(x, b), ()) for b in (1, 2, 3, 4, 8, 16)},
    **{f"dorefa abs {b}": (lambda x, b=b: dorefa.quantize_activation_abs(x, b), ()) for b in (1, 3, 8)},
    **{f"pact {b}": (lambda x, a, b=b: pact.quantize_activation(x, a, b), (T(0.7),)) for b in (1, 2, 4, 8, 16)},
    "pact, alpha 1": (lambda x, a: pact.quantize_activation(x, a, 2), (T(1.0),)),
    **{
        f"lsq {b} {signed}": (lambda x, s, b=b, signed=signed: lsq.quantize(x, s, b, signed), (T(step),))
        for b, signed, step in ((1, False, 1.0), (2, False, 0.5), (2, True, 0.5), (4, True, 0.21), (8, False, 0.01))
    },
    **{
        f"uniform {b}": (lambda x, b=b: uniform.quantize_activation(x, T(-0.4), T(1.3), b), ())
        for b in (1, 2, 4, 8, 16)
    },
    "xnor": (xnor.binarize_activation, ()),
    **{
        f"hwgq {b} {u} {how}": (
            lambda x, b=b, u=u, how=how: hwgq.quantize_activation(x, hwgq.half_wave_levels(b, u), how),
            (),
        )
        for b in (1, 2, 4, 6)
        for u in (True, False)
        for how in hwgq.BACKWARDS
    },
    **{
        f"hwgq half step {how}": (
            lambda x, how=how: hwgq.quantize_activation_half_step(x, T([0.5, 1.0, 1.5]), how),
            (),
        )
        for how in hwgq.BACKWARDS
    },
    "gupta": (lambda x: gupta.to_fixed(x, 1, 3, "nearest"), ()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations(name: str, dtype: torch.dtype) -> None:
    function, learned = ACTIVATIONS[name]
    fast, small, plain = both(function, awkward().to(dtype), *[t.to(dtype) for t in learned])
    for other in (fast, small):
        assert torch.equal(other[0], plain[0])
        assert other[0].stride() == plain[0].stride()
        for mine, theirs in zip(other[1:], plain[1:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))
            if mine.dim():
                assert torch.equal(mine == 0, theirs == 0)  # the masks are the same, ends included
    assert all(torch.equal(a, b) for a, b in zip(fast[:2], small[:2], strict=True))


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("w", [torch.randn(7, 5, 3, 3), torch.zeros(3, 2), T([0.5, -0.5, 0.1]), T([-2.0])])
def test_dorefa_weights(bits: int, w: Tensor) -> None:
    fast, _, plain = both(lambda w: dorefa.quantize_weight(w, bits), w)
    assert torch.equal(fast[0], plain[0])
    torch.testing.assert_close(fast[1], plain[1], rtol=1e-5, atol=1e-6)


def trained_step(name: str, context) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients of a small network under a method, after `prepare` and the first `on_epoch`."""
    (config,) = compose.configurations([f"method={name}"])
    from qbench.assembly import make_method, widths

    method = make_method(config, widths(config))
    torch.manual_seed(0)
    norm = method.requires.norm or "affine"
    model = install(method, resnet.build((3, 8, 8), 4, depth=8, width=4, norm=norm), example=torch.zeros(1, 3, 8, 8))
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 8, 8).to(memory_format=torch.channels_last)
    labels = torch.arange(8) % 4
    probe = Probe([(images, labels)], F.cross_entropy)
    if method.prepare:
        method.prepare(model, probe)
    if method.on_epoch:
        method.on_epoch(model, 0, 4, probe)
    torch.manual_seed(2)
    with context:
        logits = model.train()(images)
        F.cross_entropy(logits, labels).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", METHODS)
def test_networks(name: str) -> None:
    logits, grads = trained_step(name, ops.compressed(False))
    for context in (ops.compressed(), ops.plainly()):
        others, theirs = trained_step(name, context)
        assert torch.equal(logits, others)
        assert grads.keys() == theirs.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, theirs[key], rtol=1e-4, atol=1e-6 * float(theirs[key].abs().max() + 1))


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Return the bytes of distinct storages that a forward pass keeps for backward."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(images).sum()
    return sum(storages.values())
