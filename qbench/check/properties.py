"""The properties that every method must have, each a function that raises `PropertyViolation` where it does not.

A property takes the subject and one of its widths, and raises `NotApplicable` where the method has nothing that it
could
test. `PROPERTIES` says at which widths each is asked: at every legal one, or (where it trains) at the default ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from qbench.bits import FLOAT, Bits, LevelCount
from qbench.check.backward import learned_parameters, reaching
from qbench.check.subject import (
    EPOCHS,
    SHAPE,
    MethodUnderTest,
    NotApplicable,
    PropertyViolation,
    advance,
    batches,
    gradient_of,
    probe,
    tiny_network,
)
from qbench.config.schema import Optim
from qbench.quant.install import install
from qbench.quant.layers import NotFinite, quantized_layers
from qbench.quant.method import Method, Unsupported
from qbench.quant.ops import compress_activations
from qbench.quant.verify import NotQuantized, verify
from qbench.training import optimizer as optim
from qbench.training.checkpoint import pack, unpack, weights_sha256
from qbench.training.loop import Callbacks, train
from qbench.training.state import State
from qbench.training.task import Task

DRAWS = 400
CHANCE = 1e-9
"""Of an unbiased rounding to miss Hoeffding's bound (1963) for the mean of bounded draws."""


def levels(subject: MethodUnderTest, bits: Bits) -> None:
    """Weights, activations and gradients lie on the levels declared, not too many for the width."""
    found = _verified(subject.network(bits))
    if not found:
        raise PropertyViolation("no layer is quantized")
    limits = {key: 2**width + 1 for key, width in bits._asdict().items() if width < FLOAT}
    for key, limit in limits.items():
        counts = [layer[key] for layer in found.values() if key in layer]
        if not counts:
            raise PropertyViolation(f"bits.{key}={getattr(bits, key)} quantizes nothing")
        mean = sum(count.allowed for count in counts) / len(counts)
        if mean > limit and not _is_product(subject, bits, key):
            raise PropertyViolation(f"{key}: {mean:g} levels allowed on average, more than {limit} for {bits}")
        if key == "w" and max(count.found for count in counts) < 2:
            raise PropertyViolation("weights have a single value on every layer")


def _is_product(subject: MethodUnderTest, bits: Bits, key: str) -> bool:
    """Whether levels are vectors: a codebook for several weights at a time has more of them."""
    _, layer = next(subject.layers(bits))
    return key == "w" and layer.weight_q.grid(layer.weight).points.shape[-1] > 1  # type: ignore[operator]


def _verified(model: nn.Module) -> dict[str, dict[str, LevelCount]]:
    shape = SHAPE if isinstance(next(iter(model.children())), nn.Conv2d) else (1, 1, 1)
    try:
        return verify(model, batches(shape)[0][0])
    except NotQuantized as error:
        raise PropertyViolation(str(error)) from None


def _declared(subject: MethodUnderTest, bits: Bits, *traits: str) -> frozenset[str]:
    declared = subject.make(bits).traits.intersection(traits)
    if not declared:
        raise NotApplicable(f"it declares no trait {' or '.join(traits)}")
    return declared


def function_of_weights(subject: MethodUnderTest, bits: Bits) -> None:
    """The weights' function is odd, monotone, idempotent where it declares that, within every scale group."""
    traits = _declared(subject, bits, "odd", "monotone", "idempotent")
    for name, layer in subject.layers(bits):
        w, site = layer.weight.detach(), layer.weight_q
        if "odd" in traits and not torch.equal(site(-w), -site(w)):
            raise PropertyViolation(f"{name}: weights declared odd, Q(-w) is not -Q(w)")
        if "monotone" in traits:
            _monotone(name, site, w, w)
        if "idempotent" in traits and not torch.allclose(site(site(w)), site(w), rtol=1e-5, atol=1e-7):
            raise PropertyViolation(f"{name}: weights declared idempotent, Q(Q(w)) is not Q(w)")


def function_of_inputs(subject: MethodUnderTest, bits: Bits) -> None:
    """The activations' function is monotone and idempotent, its gradient 0 where it clips, where it declares that."""
    traits = _declared(subject, bits, "monotone_input", "idempotent_input", "clipped_input")
    for name, layer in subject.layers(bits):
        site, channels = layer.input_q, layer.weight.shape[1]
        x = torch.linspace(-4, 4, 64 * channels).reshape(channels, 1, 8, 8).transpose(0, 1).contiguous()
        points = site.grid(x).points.detach().flatten()  # type: ignore[operator]
        if "monotone_input" in traits:
            _monotone(name, site, x, x)
        if "idempotent_input" in traits and not torch.allclose(site(site(x)), site(x), rtol=1e-5, atol=1e-7):
            raise PropertyViolation(f"{name}: inputs declared idempotent, Q(Q(x)) is not Q(x)")
        _, slope = gradient_of(site, x)
        low, high = float(points.nan_to_num(0).min()), float(points.nan_to_num(0).max())
        margin = 1e-3 * (high - low)
        beyond, inside = (x < low - margin) | (x > high + margin), (x > low + margin) & (x < high - margin)
        if "clipped_input" in traits and (slope[beyond] != 0).any():
            raise PropertyViolation(f"{name}: gradient passes beyond the levels {low:g} to {high:g}")
        if "clipped_input" in traits and inside.any() and not (slope[inside] != 0).all():
            raise PropertyViolation(f"{name}: no gradient passes within the levels {low:g} to {high:g}")


def compressed_inputs(subject: MethodUnderTest, bits: Bits) -> None:
    """Where levels are declared to be all that backward needs, integers are kept of the inputs and no floats."""
    _declared(subject, bits, "cells_input")
    if bits.a > 8:
        raise NotApplicable("above 8 bits nothing is kept as levels")
    floats: list[int] = []

    def keep(t: Tensor) -> Tensor:
        floats.append(t.numel() if t.is_floating_point() else 0)
        return t

    for name, layer in subject.layers(bits):
        x = torch.linspace(-4, 4, 64 * layer.weight.shape[1]).reshape(1, layer.weight.shape[1], 8, 8)
        floats.clear()
        with compress_activations(), saved_tensors_hooks(keep, lambda t: t):
            small = gradient_of(layer.input_q, x)
        if max(floats) >= x.numel():
            raise PropertyViolation(f"{name}: keeps floats of its inputs, declared cells_input")
        if not all(map(torch.equal, small, gradient_of(layer.input_q, x))):
            raise PropertyViolation(f"{name}: other results from levels than from the inputs themselves")


def _monotone(name: str, site: nn.Module, x: Tensor, like: Tensor) -> None:
    grid = site.grid(like)  # type: ignore[operator]
    before, after = grid.arrange(x)[..., 0], grid.arrange(site(x))[..., 0]
    steps = after.gather(1, before.argsort(1)).diff(dim=1)
    if (steps < 0).any():
        raise PropertyViolation(f"{name}: declared monotone, {int((steps < 0).sum())} steps go down")


def randomness(subject: MethodUnderTest, bits: Bits) -> None:
    """Stochastic rounding is unbiased: the mean of many draws is within Hoeffding's bound of the input."""
    drawn = False
    for name, layer in islice(subject.layers(bits), 2):
        layer.train()
        x = torch.rand(4, layer.weight.shape[1], 3, 3) * 0.9 + 0.05
        y = torch.randn(4, layer.weight.shape[0], 3, 3)
        cases: list[tuple[str, Callable[[], Tensor], Tensor]] = [
            ("weights", lambda layer=layer: layer.weight_q(layer.weight), layer.weight.detach()),  # type: ignore[misc]
            ("inputs", lambda layer=layer, x=x: layer.input_q(x), x),  # type: ignore[misc]
            ("gradients", lambda layer=layer, y=y, x=x: _left(layer, y, x), y),  # type: ignore[misc]
        ]
        for what, draw, wanted in cases:
            drawn |= _unbiased(f"{name}: {what}", draw, wanted)
    if not drawn:
        raise NotApplicable("it draws nothing at random")


def _left(layer: nn.Module, grad: Tensor, x: Tensor) -> Tensor:
    """Return what the module behind a layer makes of a gradient that arrives."""
    y = torch.zeros_like(grad).requires_grad_()
    return torch.autograd.grad(layer.output_q(y, x), y, grad)[0]  # type: ignore[operator]


def _unbiased(name: str, draw: Callable[[], Tensor], wanted: Tensor) -> bool:
    """Return whether anything is drawn; raise `PropertyViolation` where the draws are biased."""
    torch.manual_seed(7)
    first = draw().detach()
    if torch.equal(first, draw().detach()):
        return False
    draws = torch.stack([draw().detach().double() for _ in range(DRAWS)])
    step = (draws.amax(0) - draws.amin(0)).max().item()  # each draw is one of two neighbouring levels
    error = draws.mean(0) - wanted.double().clamp(draws.min(), draws.max())
    bound = step * math.sqrt(math.log(2 / CHANCE) / (2 * DRAWS)) + 1e-6
    if error.abs().max() > bound:
        raise PropertyViolation(f"{name}: biased by up to {error.abs().max() / step:.2f} steps over {DRAWS} draws")
    if error.mean().abs() > bound / math.sqrt(error.numel()) + 1e-6:
        raise PropertyViolation(f"{name}: biased by {error.mean() / step:.3f} steps on average over {DRAWS} draws")
    return True


def float_at_32(subject: MethodUnderTest, bits: Bits) -> None:
    """At 32 bits everywhere, outputs and gradients are the float network's bit for bit."""
    try:
        method = subject.make(Bits())
    except Unsupported as reason:  # an option that means nothing there
        raise NotApplicable(str(reason)) from None
    plain, ours = subject.float_network().train(), subject.float_network()
    try:
        install(method, ours, example=torch.zeros(1, *SHAPE))
        advance(method, ours)
    except Unsupported as reason:
        raise PropertyViolation(f"32 bits everywhere are refused: {reason}") from None
    ours.train()
    images, labels = batches()[0]
    for model in (plain, ours):
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    for (name, one), two in zip(plain.named_parameters(), ours.parameters(), strict=True):
        if one.grad is None or two.grad is None or not torch.equal(one.grad, two.grad):
            raise PropertyViolation(f"32 bits: the gradient of {name} is not the float network's")


def degenerate(subject: MethodUnderTest, bits: Bits) -> None:
    """Weights that are all zero, all the same, or one element alone: everything stays finite and on its levels."""
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
            _verified(model.eval())
            _finite_everywhere(method, model.train(), shape)
        except NotFinite as error:
            raise PropertyViolation(f"{what} weights: {error}") from None
        except PropertyViolation as error:
            raise PropertyViolation(f"{what} weights: {error}") from None


def _finite_everywhere(method: Method, model: nn.Module, shape: tuple[int, int, int]) -> None:
    for images, labels in ((torch.zeros(4, *shape), torch.zeros(4, dtype=torch.long)), batches(shape)[0]):
        logits = model(images)
        F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        if not logits.isfinite().all():
            raise PropertyViolation("outputs are not finite")
        for name, p in model.named_parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                raise PropertyViolation(f"the gradient of {name} is not finite")


def not_finite(subject: MethodUnderTest, bits: Bits) -> None:
    """inf and nan, in weights and inputs, end in an error that names the layer, never in an ordinary level."""
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
    raise PropertyViolation(f"{what} is taken without an error")


def half_types(subject: MethodUnderTest, bits: Bits) -> None:
    """Under autocast to float16 and bfloat16, forward and backward are finite and parameters keep float32 gradients."""
    for dtype in (torch.bfloat16, torch.float16):
        model = subject.network(bits).train()
        images, labels = batches()[0]
        with torch.autocast("cpu", dtype=dtype):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not loss.isfinite() or not all(g.isfinite().all() for g in grads):
            raise PropertyViolation(f"{dtype}: loss or gradients are not finite")
        if any(g.dtype != torch.float32 for g in grads):
            raise PropertyViolation(f"{dtype}: a float32 parameter has a gradient of another type")


def round_trip(subject: MethodUnderTest, bits: Bits) -> None:
    """A fresh network with the state_dict of a trained one gives the same outputs, bit for bit."""
    task, state = _task(subject, bits)
    train(task, state)
    saved = unpack(pack({"model": task.model.state_dict()}), "memory")["model"]
    fresh = subject.float_network()
    install(subject.make(bits), fresh, example=torch.zeros(1, *SHAPE))
    fresh.load_state_dict(saved)
    images = batches()[0][0]
    if not torch.equal(fresh.eval()(images), task.model.eval()(images)):
        raise PropertyViolation("outputs differ after saving and loading the state_dict")


def resume(subject: MethodUnderTest, bits: Bits) -> None:
    """Training that stops in the middle of an epoch and goes on ends in the same bits."""
    if not subject.make(bits).needs_training:
        raise NotApplicable("it trains no epoch")
    whole, state = _task(subject, bits)
    train(whole, state)
    first, state = _task(subject, bits)
    stop = len(batches()) * 2 + 1

    class _Stop(Exception):
        pass

    def watch(state: State, loss: Tensor) -> None:
        if state.step == stop:
            raise _Stop

    try:
        train(first, state, Callbacks(on_step=watch))
    except _Stop:
        saved = unpack(pack(state.save(first.model)), "memory")
    else:
        raise PropertyViolation(f"training ends before step {stop}")
    again, state = _task(subject, bits, prepare=False)
    for name, p in again.model.named_parameters():
        p.requires_grad_(name in saved["trainable"])
    state = State(_optimizer(again.model))
    state.load(again.model, saved)
    train(again, state)
    if weights_sha256(again.model.state_dict()) != weights_sha256(whole.model.state_dict()):
        raise PropertyViolation("training that was interrupted ends in other weights")


RECIPE = Optim(name="sgd", lr=0.02, schedule="cosine", batch_size=16)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    if not any(p.requires_grad for p in model.parameters()):
        raise Unsupported("nothing is trained")
    return optim.build_optimizer(model, RECIPE)


def _task(subject: MethodUnderTest, bits: Bits, *, prepare: bool = True) -> tuple[Task, State]:
    method, model = subject.make(bits), subject.float_network()
    install(method, model, example=torch.zeros(1, *SHAPE))
    torch.manual_seed(2)
    if prepare and method.prepare:
        method.prepare(model, probe())
    data = batches()
    task = Task(
        model=model, method=method, optim=RECIPE, epochs=EPOCHS if method.needs_training else 0, steps=len(data),
        train=lambda epoch, start: data[start:], validate=lambda: data, probe=probe(),
    )  # fmt: skip
    torch.manual_seed(4)
    return task, State(_optimizer(model))


Where = Literal["weights", "inputs", "every", "default", "own"]


@dataclass(frozen=True)
class Property:
    """A property and the widths at which it is asked."""

    name: str
    holds: Callable[[MethodUnderTest, Bits], None]
    where: Where


PROPERTIES = (
    Property("levels", levels, "every"),
    Property("weights: odd, monotone, idempotent as declared", function_of_weights, "weights"),
    Property("inputs: monotone, idempotent, clipped as declared", function_of_inputs, "inputs"),
    Property("inputs: kept as levels with the same results, as declared", compressed_inputs, "inputs"),
    Property("gradients reach what is trained", reaching, "every"),
    Property("gradients of learned parameters", learned_parameters, "default"),
    Property("stochastic rounding is unbiased", randomness, "every"),
    Property("32 bits are float", float_at_32, "default"),
    Property("zero, constant, one-element tensors", degenerate, "every"),
    Property("inf and nan are refused", not_finite, "default"),
    Property("float16 and bfloat16 under autocast", half_types, "own"),
    Property("state_dict round trip", round_trip, "default"),
    Property("resume", resume, "default"),
)
