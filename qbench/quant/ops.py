"""Pure tensor functions that quantizers are made of. Straight-through estimators live in this file only.

A straight-through estimator stands around the rounding alone (Bengio et al. 2013, arXiv 1308.3432): scaling, clipping
and squashing keep their true derivatives. No function writes to its input.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Function

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


_rounding = True


@contextmanager
def without_rounding() -> Iterator[None]:
    """Let `round_ste` and `straight_through` return x for a while: what is left is the function that is derived.

    With it the gradients of learned scales can be held against finite differences.
    """
    global _rounding
    _rounding = False
    try:
        yield
    finally:
        _rounding = True


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


def sign(x: Tensor) -> Tensor:
    """Sign with sign(0) = +1, so that a binary value has two levels, never three. No gradient."""
    return torch.where(x.detach() >= 0, 1.0, -1.0).to(x.dtype)


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


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Return for every element the nearest of `levels` (L,), ascending; half way the lower one. No gradient."""
    x, edges = x.detach(), (levels[1:] + levels[:-1]) / 2
    if x.dim() == 4 and not x.is_contiguous():  # channels_last: search along memory
        return levels[torch.bucketize(x.movedim(1, 3).contiguous(), edges)].movedim(3, 1)
    return levels[torch.bucketize(x.contiguous(), edges)]


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
