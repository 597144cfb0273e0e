"""Checks special cases: 32 bits, degenerate weights, inf and nan, 16-bit float types, and a scaled loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import Bits
from qbench.check.forward import verified
from qbench.check.subject import (
    SHAPE,
    MethodUnderTest,
    NotApplicable,
    PropertyViolation,
    advance,
    batches,
    probe,
    tiny_network,
)
from qbench.quant.install import install
from qbench.quant.layers import NotFinite, quantized_layers
from qbench.quant.method import Unsupported
from qbench.training.random_state import seed_everything

SCALE = 2.0**10
"""The factor of the loss in `scaled_loss`. It is a power of two, so that scaling is exact."""


def float_at_32(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that a network with all widths at 32 bits has exactly the same gradients as the float network."""
    try:
        method = subject.make(Bits())
    except Unsupported as reason:  # the method has an option that has no effect at 32 bits
        raise NotApplicable(str(reason)) from None
    float_model, model = subject.float_network().train(), subject.float_network()
    try:
        install(method, model, example=torch.zeros(1, *SHAPE))
        advance(method, model)
    except Unsupported as reason:
        raise PropertyViolation(f"the method does not accept 32 bits for w, a and g: {reason}") from None
    model.train()
    images, labels = batches()[0]
    for network in (float_model, model):
        torch.autograd.backward(F.cross_entropy(network(images), labels))
    for (name, one), two in zip(float_model.named_parameters(), model.parameters(), strict=True):
        if one.grad is None or two.grad is None or not torch.equal(one.grad, two.grad):
            raise PropertyViolation(f"32 bits: the gradient of {name} differs from the float network's gradient")


def degenerate_tensors(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that zero, constant or one-element weights give finite values that are on the levels."""
    norm = subject.make(bits).requires.norm or "affine"
    for what, fill in (("zero", 0.0), ("constant", 0.3), ("negative constant", -0.3), ("one-element", None)):
        model = tiny_network(norm) if fill is None else subject.float_network()
        shape = (1, 1, 1) if fill is None else SHAPE
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d) and fill is not None:
                    layer.weight.fill_(fill)
        method = subject.make(bits)
        install(method, model, example=torch.zeros(1, *shape))
        try:
            advance(method, model, probe(shape))
            verified(model.eval())
            _finite_everywhere(model.train(), shape)
        except (NotFinite, PropertyViolation) as error:
            raise PropertyViolation(f"{what} weights: {error}") from None


def _finite_everywhere(model: nn.Module, shape: tuple[int, int, int]) -> None:
    for images, labels in ((torch.zeros(4, *shape), torch.zeros(4, dtype=torch.long)), batches(shape)[0]):
        logits = model(images)
        torch.autograd.backward(F.cross_entropy(logits, labels))
        if not logits.isfinite().all():
            raise PropertyViolation("outputs are not finite")
        for name, p in model.named_parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                raise PropertyViolation(f"the gradient of {name} is not finite")


def not_finite(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that an inf or nan in weights or inputs raises an error instead of becoming a level."""
    for bad in (float("nan"), float("inf")):
        model = subject.network(bits)
        images = batches()[0][0].clone()
        images[0, 0, 0, 0] = bad
        _refused(f"an input with {bad}", model, images)
        layer = next(iter(quantized_layers(model).values()))
        with torch.no_grad():
            layer.weight.view(-1)[0] = bad
        _refused(f"weights with {bad}", model, batches()[0][0])


def _refused(what: str, model: nn.Module, images: Tensor) -> None:
    try:
        model(images)
    except NotFinite:
        return
    raise PropertyViolation(f"{what}: the network raises no error")


def half_types(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that the loss and the gradients are finite under autocast to float16 and to bfloat16.

    The gradients of float32 parameters must be float32.
    """
    for dtype in (torch.bfloat16, torch.float16):
        model = subject.network(bits).train()
        images, labels = batches()[0]
        with torch.autocast("cpu", dtype=dtype):
            loss = F.cross_entropy(model(images).float(), labels)
        torch.autograd.backward(loss)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not loss.isfinite() or not all(g.isfinite().all() for g in grads):
            raise PropertyViolation(f"{dtype}: loss or gradients are not finite")
        if any(g.dtype != torch.float32 for g in grads):
            raise PropertyViolation(f"{dtype}: a float32 parameter has a gradient of another type")


def scaled_loss(subject: MethodUnderTest, bits: Bits) -> None:
    """Check that the gradients of a scaled loss are the scaled gradients, bit for bit. The scale is a power of two.

    Training in float16 scales the loss. Stochastic rounding draws the same random numbers for both losses.
    """
    if "fixed_point_gradients" in subject.make(bits).traits:
        raise NotApplicable("the method rounds gradients to numbers with a fixed step")
    images, labels = batches()[0]
    found = []
    for scale in (1.0, SCALE):
        model = subject.network(bits).train()
        seed_everything(0)
        torch.autograd.backward(F.cross_entropy(model(images), labels) * scale)
        found.append({name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        if not torch.equal(found[1][name], gradient):
            raise PropertyViolation(
                f"if the loss is multiplied by {SCALE:g}, the gradient of {name} is not multiplied by {SCALE:g}; "
                'if the method rounds gradients with a fixed step, declare the trait "fixed_point_gradients"'
            )
