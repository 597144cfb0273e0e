"""Pure tensor functions that quantizers are made of. Straight-through estimators live in this file only.

A straight-through estimator stands around the rounding alone (Bengio et al. 2013, arXiv 1308.3432): scaling, clipping
and squashing keep their true derivatives. No function writes to its input.

Quantizers that every activation passes have two forms, side by side in their method's file: the plain definition, for
autograd to differentiate, and a fast one that works in place and saves one tensor (`fused_quantizer`).
`reference_kernels` chooses the first; tests hold the two equal. What fast forms are made of stands in `passes.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from qbench.quant.fused_kernels import at_least

F = TypeVar("F", bound=Callable[..., Tensor])


def in_float32(function: F) -> F:
    """Decorate a function of a tensor: half types are computed in float32, the result has the input's type.

    float16 holds no more than 11 significant bits, so that the levels of 8 bits and their thresholds would blur;
    float32 and float64 pass as they are.
    """

    @wraps(function)
    def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):
            return function(x.float(), *args, **kwargs).to(x.dtype)
        return function(x, *args, **kwargs)

    return cast(F, wrapped)


MOST_CELLS = 2**8 + 3
"""Those of 8 bits and of what lies beyond on either side."""

_rounding, _fast, _compressing = True, True, False


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Let all quantizers compute by their plain definitions for a while."""
    global _fast
    before, _fast = _fast, False
    try:
        yield
    finally:
        _fast = before


@contextmanager
def without_rounding() -> Iterator[None]:
    """Let `round_ste` and `straight_through` return x for a while: what is left is the function that is derived.

    With it the gradients of learned scales can be held against finite differences. Plain definitions are used.
    """
    global _rounding
    _rounding = False
    try:
        with reference_kernels():
            yield
    finally:
        _rounding = True


@contextmanager
def compress_activations(on: bool = True) -> Iterator[None]:
    """Let activation quantizers keep whole numbers for backward, a byte or two each, where that loses nothing."""
    global _compressing
    before, _compressing = _compressing, on
    try:
        yield
    finally:
        _compressing = before


class _Round(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round() if _rounding else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value) if _rounding else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _OnBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grads[0]), None


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer, halves to even; the gradient passes unchanged."""
    return _Round.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return exactly `value` (x's shape); its gradient goes to x unchanged, none to whatever made `value`.

    The usual `x + (value - x).detach()` is not exact in floating point: its result can lie beside the level.
    """
    return _StraightThrough.apply(x, value.detach())  # type: ignore[no-any-return,no-untyped-call]


def on_backward(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x; in the backward pass, apply `change` to the gradient that arrives."""
    return _OnBackward.apply(x, change)  # type: ignore[no-any-return,no-untyped-call]


class _Surrogate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None, None


def surrogate(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """Return exactly `value`; its gradient goes to x times `slope`, the derivative that the paper puts in place of the
    staircase's. Both have x's shape; a boolean slope is a mask.
    """
    return _Surrogate.apply(x, value.detach(), slope.detach())  # type: ignore[no-any-return,no-untyped-call]


class Cells(NamedTuple):
    """For a staircase all of whose cells have one value and one slope each: what must be kept of x is its cell."""

    number: Callable[[Tensor], Tensor]  #: x -> the number of every element's cell, 0 ... size - 1, in x's type
    inside: Callable[[Tensor], Tensor]  #: such numbers -> an x somewhere inside each cell
    size: int  #: how many; more than `MOST_CELLS` are not numbered


class _Staircase(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, restored: Any, value: Any, slope: Any, *learned: Tensor) -> Tensor:
        ctx.save_for_backward(kept, *learned)
        ctx.restored, ctx.slope = restored, slope
        return value(x, *learned)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, *learned = ctx.saved_tensors
        found = ctx.slope(grads[0], ctx.restored(kept), *learned)
        first, *more = found if isinstance(found, tuple) else (found,)
        return first, None, None, None, None, *more


def fused_quantizer(
    x: Tensor,
    *learned: Tensor,
    plain: Callable[..., Tensor],
    value: Callable[..., Tensor],
    backward: Callable[..., Tensor | tuple[Tensor, ...]],
    cells: Cells | None = None,
    repeatable: bool = True,
) -> Tensor:
    """Quantize element by element, keeping x alone, or its cells (see `compress_activations`), for the backward pass.

    The result needs not be kept either: what reads it inside `recompute_in_backward` computes it a second time
    instead. Therefore nothing may be written into it.

    Args:
        learned: scales and the like that get gradients.
        plain: (x, *learned) -> x quantized, in operations that autograd differentiates: the definition.
        value: the same numbers in as few passes as it takes, in place but for the first.
        backward: (grad, x, *learned) -> the gradient of x, or those of x and of all `learned`.
        repeatable: whether `value` gives the same again; where it draws random numbers, the result is kept.
    """
    if not _fast or torch.compiler.is_compiling():
        return plain(x, *learned)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *learned)):
        return value(x.detach(), *learned)
    kept, restored = x.detach(), _same
    if _compressing and cells and cells.size <= MOST_CELLS:
        dtype, numbers = x.dtype, torch.uint8 if cells.size <= 256 else torch.int16
        kept, restored = cells.number(kept).to(numbers), lambda number: cells.inside(number.to(dtype))
    made: Tensor = _Staircase.apply(x, kept, restored, value, backward, *learned)  # type: ignore[no-untyped-call]
    if repeatable:
        fixed = [parameter.detach() for parameter in learned]
        made.anew = lambda: value(restored(kept), *fixed)  # type: ignore[attr-defined]
    return made


def _same(number: Tensor) -> Tensor:
    return number


@contextmanager
def recompute_in_backward(x: Tensor) -> Iterator[None]:
    """While it lasts, what saves x for the backward pass saves how `fused_quantizer` made it instead, if it did."""
    anew = None if torch.compiler.is_compiling() else getattr(x, "anew", None)
    if anew is None or not torch.is_grad_enabled():
        yield
        return
    place = _place(x)  # pack lives as long as what it packed, and x must not
    with saved_tensors_hooks(
        lambda saved: anew if _place(saved) == place else saved,
        lambda saved: saved if isinstance(saved, Tensor) else saved(),
    ):
        yield


def _place(x: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return x.data_ptr(), x.shape, x.stride()


def sign(x: Tensor) -> Tensor:
    """Sign with sign(0) = +1, so that a binary value has two levels, never three. No gradient."""
    return at_least(x, 0).mul_(2).sub_(1)


def quantize_k(x: Tensor, bits: int) -> Tensor:
    """DoReFa's Qk on x in [0, 1]: round(x n) / n with n = 2^bits - 1, straight-through (1606.06160, eq. 5-6)."""
    if bits < 1:
        raise ValueError(f"bits={bits}: allowed is 1 or more")
    n = float(2**bits - 1)
    return round_ste(x * n) / n


def levels_k(bits: int, like: Tensor) -> Tensor:
    """Return the 2^bits values of `quantize_k`, ascending in [0, 1], of `like`'s type and device."""
    n = 2**bits - 1
    return torch.arange(n + 1, device=like.device).to(like.dtype) / float(n)
