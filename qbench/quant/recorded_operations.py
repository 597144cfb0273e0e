"""The operations of torch that recorded programs may contain (see recording.py).

Each function records one torch operation and returns the index of its result. The results of a program are
bit-identical to those of torch, including the signs of zeros. Only the bits of nan may differ.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qbench.quant.program import Builder, NotRecordable, Operand

COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
"""Maps the names of comparisons to their symbols. If an operand is nan, all comparisons except `ne` are false."""


def _arithmetic(name: str) -> Callable[..., int]:
    def make(r: Builder, a: object, b: object) -> int:
        if all(isinstance(x, Tensor) and x.dtype == torch.bool for x in (a, b)):  # a logical operation in torch
            raise NotRecordable(f"{name} of bool tensors")
        return _rounded(r, r.add(name, r.number(a), r.number(b)), a, b)

    return make


def _rounded(r: Builder, index: int, *operands: object) -> int:
    """Round a result to bfloat16 if an operand with a value for each element is of this type, as torch does."""
    types = {t.dtype for t in operands if isinstance(t, Tensor) and t.dim() and t.dtype != torch.bool}
    return r.converted(index, torch.bfloat16) if types == {torch.bfloat16} else index


def _sum(name: str) -> Callable[..., int]:
    def make(r: Builder, a: object, b: object, alpha: float = 1) -> int:
        if alpha != 1:  # torch computes a + alpha b with one rounding on some processors
            raise NotRecordable(f"alpha={alpha}")
        return _arithmetic(name)(r, a, b)

    return make


def _function(name: str) -> Callable[..., int]:
    def make(r: Builder, x: Tensor) -> int:
        return _rounded(r, r.add(name, r.number(x)), x)

    return make


def _comparison(name: str) -> Callable[..., int]:
    def make(r: Builder, a: object, b: object) -> int:
        half = any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in (a, b))
        numbers = [x for x in (a, b) if isinstance(x, int | float)]
        if half and any(torch.tensor(float(x)).bfloat16().double().item() != x for x in numbers):
            raise NotRecordable("a comparison with a number that torch rounds to bfloat16")
        return r.add(name, r.number(a), r.number(b), dtype=torch.bool)

    return make


def _logical(name: str) -> Callable[..., int]:
    def make(r: Builder, *operands: object) -> int:
        if any(not isinstance(t, Tensor) or t.dtype != torch.bool for t in operands):
            raise NotRecordable(f"{name} of numbers")
        return r.add(name, *map(r.operand, operands), dtype=torch.bool)

    return make


def _select(r: Builder, condition: int, a: Operand, b: Operand) -> int:
    return r.add("select", condition, a, b)


def _clamp(r: Builder, x: Tensor, min: object = None, max: object = None) -> int:
    value = r.operand(x)
    if min is not None:  # replace x only where it is below the lower bound, so that -0 stays -0
        low = r.operand(min)
        value = _select(r, r.add("lt", value, low, dtype=torch.bool), low, value)
    if max is not None:
        high = r.operand(max)
        value = _select(r, r.add("gt", value, high, dtype=torch.bool), high, value)
    return _rounded(r, value if isinstance(value, int) else r.add("copy", value), x)


def _extreme(comparison: str) -> Callable[..., int]:
    def make(r: Builder, a: object, b: object) -> int:
        first, second = r.operand(a), r.operand(b)
        # If `first` is nan, it is the result. If `second` is nan, the comparison is false.
        wins = r.add(comparison, first, second, dtype=torch.bool)
        wins = r.add("or", wins, r.add("ne", first, first, dtype=torch.bool), dtype=torch.bool)
        return _rounded(r, _select(r, wins, first, second), a, b)

    return make


def _where(r: Builder, condition: Tensor, a: object, b: object) -> int:
    chosen = r.operand(condition)
    if not isinstance(chosen, int):
        raise NotRecordable("where with one condition")
    return _rounded(r, _select(r, chosen, r.number(a), r.number(b)), a, b)


def _sign(r: Builder, x: Tensor) -> int:
    value = r.operand(x)
    above = _select(r, r.add("gt", value, 0.0, dtype=torch.bool), 1.0, 0.0)
    return _rounded(r, _select(r, r.add("lt", value, 0.0, dtype=torch.bool), -1.0, above), x)


def _hardtanh_backward(r: Builder, grad: Tensor, x: Tensor, min: float, max: float) -> int:
    value = r.operand(x)
    low = r.add("le", value, r.operand(min), dtype=torch.bool)
    high = r.add("ge", value, r.operand(max), dtype=torch.bool)
    outside = r.add("or", low, high, dtype=torch.bool)
    return _rounded(r, _select(r, outside, 0.0, r.operand(grad)), grad, x)


def _threshold_backward(r: Builder, grad: Tensor, x: Tensor, threshold: float) -> int:
    outside = r.add("le", r.operand(x), r.operand(threshold), dtype=torch.bool)
    return _rounded(r, _select(r, outside, 0.0, r.operand(grad)), grad, x)


def _constant(number: float | None = None) -> Callable[..., int]:
    def make(r: Builder, like: Tensor, value: object = number, **options: object) -> int:
        return r.add("copy", r.operand(value))

    return make


def _copy(r: Builder, target: Tensor, source: Tensor, non_blocking: bool = False) -> int:
    value = r.operand(source)
    return value if isinstance(value, int) else r.add("copy", value)


def _same(r: Builder, x: Tensor, **options: object) -> int:
    """Record a copy, possibly of another type. The caller converts the type."""
    return _copy(r, x, x)


ELEMENTWISE: dict[str, Callable[..., int]] = {
    "add": _sum("fadd"),
    "sub": _sum("fsub"),
    "rsub": lambda r, a, b, alpha=1: _sum("fsub")(r, b, a, alpha),
    "mul": _arithmetic("fmul"),
    "div": _arithmetic("fdiv"),
    **{name: _function(name) for name in ("neg", "abs", "round", "floor", "ceil", "trunc")},
    **{name: _comparison(name) for name in COMPARISONS},
    "logical_and": _logical("and"),
    "bitwise_and": _logical("and"),
    "__and__": _logical("and"),
    "logical_or": _logical("or"),
    "bitwise_or": _logical("or"),
    "__or__": _logical("or"),
    "logical_not": _logical("not"),
    "bitwise_not": _logical("not"),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda r, x, max: _clamp(r, x, None, max),
    "relu": lambda r, x: _clamp(r, x, 0.0),
    "maximum": _extreme("gt"),
    "minimum": _extreme("lt"),
    "sign": _sign,
    "sgn": _sign,
    "where": _where,
    "hardtanh_backward": _hardtanh_backward,
    "threshold_backward": _threshold_backward,
    "zero": _constant(0.0),
    "zeros_like": _constant(0.0),
    "ones_like": _constant(1.0),
    "full_like": _constant(),
    "fill": _constant(),
    "empty_like": _constant(0.0),
    "copy": _copy,
    "clone": _same,
    "_to_copy": _same,
}
"""Maps the names of torch's operations to functions that record them."""
