"""Pure tensor functions for quantizers. Straight-through estimators are in this file only.

A straight-through estimator wraps the rounding alone (Bengio et al. 2013, arXiv 1308.3432):
scaling, clipping and squashing keep their true derivatives. No function writes to its input.

Quantizers of activations have two forms, both in their method's file: the plain definition, which
autograd differentiates, and a fused one that works in place and saves one tensor
(`fused_quantizer`). Tests hold the two equal; `reference_kernels` selects the plain one. The parts
of fused forms are in `fused_kernels.py`.

The context managers here set context variables, which a thread does not inherit. They are read in
the forward pass only, because autograd may run the backward pass in another thread. Compiled code
ignores them: torch.compile cannot read context variables.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from qbench.quant.fused_kernels import at_least

P = ParamSpec("P")
Context = Any
"""What autograd passes to a Function; torch declares no types for its attributes."""

MAX_CELLS = 2**8 + 3
"""Most cells that are numbered: those of 8 bits, and what lies beyond them on either side."""

_rounding = ContextVar("rounding", default=True)
_fused = ContextVar("fused", default=True)
_compressing = ContextVar("compressing", default=False)


def in_float32(function: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Decorate a function of a tensor to compute half types in float32.

    The result has the input's type.

    float16 has 11 significant bits, too few to separate the thresholds of 8 bits from their levels.
    float32 and float64 are not converted.
    """

    @wraps(function)
    def wrapped(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):
            return function(x.float(), *args, **kwargs).to(x.dtype)
        return function(x, *args, **kwargs)

    return wrapped


@contextmanager
def _switched(variable: ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Let all quantizers compute by their plain definitions while the context lasts."""
    with _switched(_fused, False):
        yield


@contextmanager
def without_rounding() -> Iterator[None]:
    """Let `round_ste` and `straight_through` return x while the context lasts.

    Quantizers use their plain definitions.

    What is left is the smooth function that the backward pass differentiates, so that the gradients
    of learned scales can be compared with finite differences.
    """
    with _switched(_rounding, False), reference_kernels():
        yield


@contextmanager
def compress_activations(on: bool = True) -> Iterator[None]:
    """Let activation quantizers save one or two bytes per element for the backward pass.

    Only where the results stay the same.
    """
    with _switched(_compressing, on):
        yield


def _rounds() -> bool:
    return torch.compiler.is_compiling() or _rounding.get()


def _apply(function: type[Function], *args: object) -> Tensor:
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


class _Round(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        return x.round() if _rounds() else x.view_as(x)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Tensor:
        return grads[0]


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value) if _rounds() else x.view_as(x)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _OnBackward(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grads[0]), None


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer, halves to even; the gradient passes unchanged."""
    return _apply(_Round, x)


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return exactly `value` (x's shape); its gradient goes to x unchanged.

    What `value` was computed from gets no gradient.

    The usual `x + (value - x).detach()` is not exact in floating point: its result can differ from
    the level.
    """
    return _apply(_StraightThrough, x, value.detach())


def on_backward(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x; in the backward pass, apply `change` to the gradient that arrives."""
    return _apply(_OnBackward, x, change)


class _Surrogate(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None, None


def surrogate(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """Return exactly `value`; its gradient goes to x times `slope`.

    The slope is the derivative that a paper puts in place of the step function's. Value and slope
    have x's shape; a boolean slope is a mask.
    """
    return _apply(_Surrogate, x, value.detach(), slope.detach())


class Cells(NamedTuple):
    """The cells of a step function, each with one value and one slope.

    For the backward pass, only the cell of x matters.
    """

    number: Callable[[Tensor], Tensor]  #: x -> the number of every element's cell, 0 ... size - 1, in x's type
    inside: Callable[[Tensor], Tensor]  #: such numbers -> an x somewhere inside each cell
    size: int  #: how many; more than `MAX_CELLS` are not numbered


Values = Callable[..., Tensor]
Gradients = Callable[..., Tensor | tuple[Tensor, ...]]


class _Fused(Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, saved: Tensor, restore: Values, value: Values, gradients: Gradients, *learned: Tensor
    ) -> Tensor:
        ctx.save_for_backward(saved, *learned)
        ctx.restore, ctx.gradients = restore, gradients
        return value(x, *learned)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, *learned = ctx.saved_tensors
        result = ctx.gradients(grads[0], ctx.restore(saved), *learned)
        first, *others = result if isinstance(result, tuple) else (result,)
        return first, None, None, None, None, *others


def fused_quantizer(
    x: Tensor,
    *learned: Tensor,
    plain: Values,
    value: Values,
    backward: Gradients,
    cells: Cells | None = None,
    repeatable: bool = True,
) -> Tensor:
    """Quantize element by element, saving only x or its cells for the backward pass.

    Cells are saved inside `compress_activations`.

    The result need not be saved either: what reads it inside `recompute_in_backward` computes it a
    second time instead. Therefore nothing may be written into it.

    Args:
        learned: scales and the like that get gradients.
        plain: (x, *learned) -> x quantized, in operations that autograd differentiates: the
            definition.
        value: the same numbers in as few passes as possible, in place except for the first.
        backward: (grad, x, *learned) -> the gradient of x, or those of x and of all `learned`.
        cells: the cells of the step function; more than `MAX_CELLS` are not used.
        repeatable: whether `value` gives the same numbers again. Where it draws random numbers, the
            result is saved.
    """
    if torch.compiler.is_compiling() or not _fused.get():
        return plain(x, *learned)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *learned)):
        return value(x.detach(), *learned)
    # What is saved for backward: x itself, or the numbers of its cells in one or two bytes.
    saved = x.detach()
    restore: Values = _identity
    if _compressing.get() and cells and cells.size <= MAX_CELLS:
        dtype, number_type = x.dtype, torch.uint8 if cells.size <= 256 else torch.int16
        saved, restore = cells.number(saved).to(number_type), lambda number: cells.inside(number.to(dtype))
    result = _apply(_Fused, x, saved, restore, value, backward, *learned)
    if repeatable:
        fixed = [parameter.detach() for parameter in learned]
        result.recompute = lambda: value(restore(saved), *fixed)  # type: ignore[attr-defined]
    return result


def _identity(x: Tensor) -> Tensor:
    return x


@contextmanager
def recompute_in_backward(x: Tensor) -> Iterator[None]:
    """Recompute x in the backward pass instead of saving it, if `fused_quantizer` made it.

    While the context lasts, an operation that saves x for its backward pass saves a function that
    computes it.
    """
    recompute = None if torch.compiler.is_compiling() else getattr(x, "recompute", None)
    if recompute is None or not torch.is_grad_enabled():
        yield
        return
    storage = _storage(x)  # the hook lives as long as what it packed; it must not keep x itself
    with saved_tensors_hooks(
        lambda saved: recompute if _storage(saved) == storage else saved,
        lambda saved: saved if isinstance(saved, Tensor) else saved(),
    ):
        yield


def _storage(x: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Return what identifies a tensor's memory: address, shape and strides."""
    return x.data_ptr(), x.shape, x.stride()


def sign(x: Tensor) -> Tensor:
    """Return the sign with sign(0) = +1: two levels, never three. No gradient."""
    return at_least(x, 0).mul_(2).sub_(1)


def quantize_k(x: Tensor, bits: int) -> Tensor:
    """Return DoReFa's Qk of x in [0, 1]: round(x n) / n, n = 2^bits - 1, straight-through.

    arXiv 1606.06160, eq. 5-6.
    """
    if bits < 1:
        raise ValueError(f"bits={bits}: must be 1 or more")
    n = float(2**bits - 1)
    return round_ste(x * n) / n


def levels_k(bits: int, like: Tensor) -> Tensor:
    """Return the 2^bits values of `quantize_k`, ascending, of `like`'s type and device."""
    n = 2**bits - 1
    return torch.arange(n + 1, device=like.device).to(like.dtype) / float(n)
