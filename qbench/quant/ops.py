"""Provides pure tensor functions for quantizers, including all straight-through estimators.

A straight-through estimator replaces only the derivative of rounding (Bengio et al. 2013, arXiv 1308.3432). Scaling,
clipping and functions such as tanh keep their true derivatives. No function modifies its inputs.

Each activation quantizer has two forms, and both are in the method's file. The plain form is the definition, which
autograd differentiates. The fused form (`fused_quantizer`) works in place, saves only one tensor, and is built from
functions in `fused_kernels.py`. Tests check that both forms give equal results. `reference_kernels` selects the plain
form.

The context managers in this module set context variables, which other threads do not inherit. The
variables are read only in the forward pass, because autograd may run the backward pass in another
thread. Compiled code ignores the variables, because torch.compile cannot read context variables.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.graph import saved_tensors_hooks

from qbench.quant import elementwise
from qbench.quant.fused_kernels import at_least, blockwise

P = ParamSpec("P")
Setting = TypeVar("Setting", bool, str)
Result = TypeVar("Result")

MAX_CELLS = 2**8 + 3
"""Maximum number of cells of a step function (see `Cells`).

This number is enough for one cell per level of an 8-bit quantizer, and for the cells beyond both ends.
"""

FEW_ELEMENTS = 2**17
"""With fewer elements, `activation_memory("recompute")` saves the result too, which costs little memory."""

HALF_BLOCK = 2**17
"""Number of half-precision elements that are converted to float32 together. As floats, they take half a megabyte."""

TRANSFORMS = (
    "quantizers do not work inside torch.func.grad, vmap, jvp and other transforms of functions\n"
    "use torch.autograd.grad, with create_graph=True for second derivatives"
)

_rounding = ContextVar("rounding", default=True)
_fused = ContextVar("fused", default=True)
_memory = ContextVar("memory", default="recompute")

HALF = (torch.float16, torch.bfloat16)
"""Types that quantizers convert to float32. They have too few significant bits for the arithmetic of 8-bit quantizers.
"""


def in_float32(function: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Decorate a function of a tensor so that it computes float16 and bfloat16 inputs in float32.

    The result has the type of the input. Inputs of type float32 and float64 are not converted. The conversion is needed
    because float16 has only 11 significant bits, which are too few to distinguish the thresholds of an 8-bit quantizer
    from its levels.
    """

    @wraps(function)
    def wrapped(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if x.dtype in HALF:
            return function(x.float(), *args, **kwargs).to(x.dtype)
        return function(x, *args, **kwargs)

    return wrapped


def wide_type(x: Tensor) -> torch.dtype:
    """Return the type in which a quantizer computes: float32 if x has half precision, else the type of x."""
    return torch.float32 if x.dtype in HALF else x.dtype


@contextmanager
def _switched(variable: ContextVar[Setting], value: Setting) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Make all quantizers use their plain definitions within a `with` block."""
    with _switched(_fused, False):
        yield


@contextmanager
def without_rounding() -> Iterator[None]:
    """Make `round_ste` and `straight_through` return their input x within a `with` block.

    Within the block, quantizers use their plain definitions. A quantizer without rounding is the smooth function that
    the backward pass differentiates. Tests can therefore compare the gradients of learned scales with finite
    differences.
    """
    with _switched(_rounding, False), reference_kernels():
        yield


@contextmanager
def activation_memory(mode: str) -> Iterator[None]:
    """Select what quantized layers keep for the backward pass within a `with` block. Results are bit-identical.

    Args:
        mode: `recompute` keeps the input of each quantizer. The quantizer's output is computed again when the next
            layer needs it. `keep` keeps both, which is faster. `codes` keeps the index of each element's level in one
            or two bytes if this index is enough to compute the gradients. Otherwise, `codes` is the same as
            `recompute`.
    """
    with _switched(_memory, mode):
        yield


def _rounds() -> bool:
    return torch.compiler.is_compiling() or _rounding.get()


def _apply(function: type[Function], *args: object) -> Tensor:
    try:
        result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise named_transform(error) from None
    return result


def named_transform(error: RuntimeError) -> Exception:
    """Return `error`, or an error that names torch.func if one of torch.func's transforms caused it."""
    caused = any(word in str(error) for word in ("functorch", "vmap", "forward AD"))
    return NotImplementedError(TRANSFORMS) if caused else error


class Context(Protocol):
    """The context that autograd passes to a Function. Functions may add attributes of their own."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...  # noqa: D102


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


class _OnBackwardContext(Context, Protocol):
    change: Callable[[Tensor], Tensor]


class _OnBackward(Function):
    @staticmethod
    def forward(ctx: _OnBackwardContext, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: _OnBackwardContext, *grads: Tensor) -> tuple[Tensor, None]:
        changed = ctx.change(grads[0])
        if torch.is_grad_enabled() and grads[0].requires_grad and not changed.requires_grad:
            raise NotImplementedError("quantized gradients have no derivatives; use bits.g=32")
        return changed, None


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer, and halves to the nearest even integer. The gradient passes unchanged."""
    return _apply(_Round, x)


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return exactly `value`, and pass the gradient of the result to x unchanged. `value` has the shape of x.

    The tensors from which `value` was computed get no gradient. The usual `x + (value - x).detach()`
    is not used, because it is not exact in floating point and can differ from the level.
    """
    return _apply(_StraightThrough, x, value.detach())


def on_backward(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x. In the backward pass, x gets the gradient `change(gradient of the result)`."""
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
    """Return exactly `value`. In the backward pass, x gets the gradient of the result times `slope`.

    The slope is the derivative that a paper uses instead of the derivative of the step function. `value` and `slope`
    have the shape of x. A boolean slope is a mask. Second derivatives are possible if the slope was computed from x.
    """
    return _apply(_Surrogate, x, value.detach(), slope)


class Cells(NamedTuple):
    """The cells of a step function.

    A cell is an interval of x in which the function has one value and one slope.

    The backward pass needs to know only in which cell each element of x is.
    """

    number: Callable[[Tensor], Tensor]  #: maps x to the number of each element's cell (0, 1, ...), in x's type
    inside: Callable[[Tensor], Tensor]  #: maps cell numbers to one value of x inside each of these cells
    size: int  #: number of cells; if it is above `MAX_CELLS`, cells are not used


Values = Callable[..., Tensor]
Gradients = Callable[..., Tensor | tuple[Tensor, ...]]


class _Forms(NamedTuple):
    """The arguments of `fused_quantizer` that are functions."""

    plain: Values
    value: Values
    backward: Gradients

    def in_float32(self, dtype: torch.dtype, masks: bool, pointwise: bool) -> "_Forms":
        """Return the forms for half-precision x. They compute in float32, and their results have the type `dtype`.

        If the backward pass is only a mask of the gradient, it computes in half precision, with the same result. If
        each element of the result depends on one element of x alone, `value` converts x block by block, so that the
        converted numbers stay in the processor's cache.
        """

        def value(x: Tensor, *learned: Tensor) -> Tensor:
            if pointwise and x.dtype == dtype:  # `_with_codes` passes float32
                return blockwise(x, lambda y, result: result.copy_(self.value(y.float(), *learned)), block=HALF_BLOCK)
            return self.value(x.float(), *learned).to(dtype)

        def backward(grad: Tensor, x: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
            half = masks and x.dtype == dtype
            result = self.backward(grad, x, *learned) if half else self.backward(grad.float(), x.float(), *learned)
            first, *others = result if isinstance(result, tuple) else (result,)
            return first.to(dtype), *others

        return _Forms(
            lambda x, *learned: self.plain(x.float(), *learned).to(dtype),
            value,
            backward,
        )


class _FusedContext(Context, Protocol):
    as_codes: bool
    gradients: Gradients
    plain: Values


class _Fused(Function):
    @staticmethod
    def forward(
        ctx: _FusedContext, x: Tensor, made: list[Tensor], saved: Tensor | None, backward: Gradients, plain: Values,
        *learned: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x if saved is None else saved, *learned)
        ctx.as_codes, ctx.gradients, ctx.plain = saved is not None, backward, plain
        return made.pop()

    @staticmethod
    def backward(ctx: _FusedContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, *learned = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True, the gradient is differentiated too
            if ctx.as_codes:
                raise NotImplementedError("second derivatives need runtime.activation_memory=recompute or keep")
            gradients: Sequence[Tensor | None] = _gradients_by_definition(ctx.plain, grads[0], saved, *learned)
        else:
            result = elementwise.call(ctx.gradients, grads[0], saved, *learned)
            gradients = result if isinstance(result, tuple) else (result,)
        first, *others = gradients
        return first, None, None, None, None, *others


def _gradients_by_definition(plain: Values, grad: Tensor, *inputs: Tensor) -> list[Tensor | None]:
    """Return the gradients of all inputs, computed so that autograd can differentiate them again."""
    wanted = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    result = plain(*inputs)
    found = torch.autograd.grad(result, [inputs[i] for i in wanted], grad, create_graph=True, allow_unused=True)
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def fused_quantizer(
    x: Tensor,
    *learned: Tensor,
    plain: Values,
    value: Values,
    backward: Gradients,
    cells: Cells | None = None,
    masks: bool = False,
    repeatable: bool = True,
) -> Tensor:
    """Apply an elementwise quantizer that saves only one tensor for the backward pass.

    With `activation_memory("codes")`, the saved tensor contains the cell of each element of x. Otherwise, x itself is
    saved.

    The next operation often needs the quantized values for its own backward pass. Inside `recompute_in_backward`, the
    next operation does not save these values but recomputes them. The result must therefore not be modified in place.

    The functions get x in float32 if x has half precision, and the result has the type of x.

    With the extra `fast`, `value`, `backward` and `cells` are compiled on the CPU if they consist of elementwise
    operations and sums (elementwise.py). Their results must depend only on their arguments, and on numbers, tensors and
    functions in their closures. A function that refers to other objects, such as `self`, is not compiled.

    Args:
        x: the float values.
        learned: the learned parameters, such as scales, that get gradients. The functions get them in the same type as
            x.
        plain: function of `(x, *learned)` that returns the quantized x. This function is the definition, and autograd
            can differentiate it twice.
        value: function of `(x, *learned)` that returns the same result as `plain` in few passes over memory. All passes
            except the first work in place.
        backward: function of `(grad, x, *learned)` that returns the gradient of x, or the gradients of x and all
            `learned`.
        cells: the cells of the step function, or None. More than `MAX_CELLS` cells are ignored.
        masks: whether `backward` only keeps each element of grad or sets it to 0, depending on comparisons of x. If
            true, `backward` gets half-precision tensors without conversion.
        repeatable: whether `value` returns the same result when it is called again. Pass False if `value` uses random
            numbers. The result is then saved and never recomputed.
    """
    forms = _Forms(plain, value, backward)
    learned = tuple(t.to(wide_type(x)) for t in learned)
    if x.dtype in HALF:
        forms = forms.in_float32(x.dtype, masks, cells is not None and not any(t.dim() for t in learned))
    if torch.compiler.is_compiling() or not _fused.get():
        return forms.plain(x, *learned)
    fixed = [parameter.detach() for parameter in learned]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *learned)):
        if unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]  # the derivative would be 0
            raise NotImplementedError(TRANSFORMS)
        return _computed(forms.value, x.detach(), *fixed)
    # Save x itself for the backward pass, or the numbers of its cells in one or two bytes per element.
    again, gradients, codes = forms.value, forms.backward, None
    mode = _memory.get()
    if mode == "codes" and cells and cells.size <= MAX_CELLS:
        both, again, gradients = _with_codes(forms, cells, wide_type(x))
        made, codes = _computed(both, x.detach(), *fixed)
    else:
        made = _computed(forms.value, x.detach(), *fixed)
    result = _apply(_Fused, x, [made], codes, gradients, forms.plain, *learned)
    few = mode == "recompute" and x.numel() < FEW_ELEMENTS
    if repeatable and mode != "keep" and not few:
        saved = x.detach() if codes is None else codes
        unchanged = _raise_if_changed(saved, *fixed)

        def recompute() -> Tensor:
            unchanged()
            return _computed(again, saved, *fixed)

        result.recompute = recompute  # type: ignore[attr-defined]
    return result


def _raise_if_changed(*tensors: Tensor) -> Callable[[], None]:
    """Return a function that raises an error if a tensor has been changed in place since now.

    torch makes this check for tensors that it saves for the backward pass, but not inside `saved_tensors_hooks`.
    """
    versions = [t._version for t in tensors]

    def check() -> None:
        if any(t._version != version for t, version in zip(tensors, versions, strict=True)):
            raise RuntimeError(
                "a variable needed for gradient computation has been modified by an inplace operation after the "
                "forward pass: the input, the weights or a learned parameter of a quantized layer\n"
                "call backward before the change, or change a copy"
            )

    return check


def _computed(function: Callable[..., Result], *tensors: Tensor) -> Result:
    """Return the result of a function without gradient."""
    with torch.no_grad():
        return elementwise.call(function, *tensors)


def _with_codes(
    forms: _Forms, cells: Cells, dtype: torch.dtype
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Values, Gradients]:
    """Return the functions that save the number of each element's cell instead of the element.

    Args:
        dtype: type in which the quantizer computes.

    Returns:
        Three functions. The first is a function of x and the learned parameters that returns the result and the cell
        numbers. The second and the third are `value` and `backward` of `fused_quantizer`, but take the cell numbers
        instead of x.
    """
    value, backward, inside = forms.value, forms.backward, cells.inside
    number, kind = cells.number, torch.uint8 if cells.size <= 256 else torch.int16
    return (
        lambda x, *learned: (value(x, *learned), number(x.to(dtype)).to(kind)),
        lambda codes, *learned: value(inside(codes.to(dtype)), *learned),
        lambda grad, codes, *learned: backward(grad, inside(codes.to(dtype)), *learned),
    )


@contextmanager
def recompute_in_backward(x: Tensor) -> Iterator[None]:
    """Make operations within a `with` block recompute x in their backward pass instead of saving x.

    This works only if x is a result of `fused_quantizer`. An operation then saves a function that recomputes x.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not hasattr(x, "recompute"):
        yield
        return
    recompute: Callable[[], Tensor] = x.recompute
    storage = _storage(x)  # the hook lives as long as the saved tensors, so a reference to x would keep x in memory

    def pack(saved: Tensor) -> Callable[[], Tensor]:
        if _storage(saved) == storage:
            return recompute
        unchanged = _raise_if_changed(saved)

        def unpack() -> Tensor:
            unchanged()
            return saved

        return unpack

    with saved_tensors_hooks(pack, lambda restore: restore()):
        yield


def _storage(x: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Return the address, the shape and the strides of a tensor. Together, they identify its memory."""
    return x.data_ptr(), x.shape, x.stride()


def sign(x: Tensor) -> Tensor:
    """Return the sign of x without gradient. sign(0) is +1, so that there are only two levels."""
    return at_least(x, 0).mul_(2).sub_(1)


def quantize_k(x: Tensor, bits: int) -> Tensor:
    """Return DoReFa's Qk(x) = round(x n) / n with n = 2^bits - 1, for x in [0, 1]. The gradient passes unchanged.

    Source: arXiv 1606.06160, eq. 5-6.
    """
    if bits < 1:
        raise ValueError(f"bits={bits}: must be 1 or more")
    n = float(2**bits - 1)
    return round_ste(x * n) / n


def levels_k(bits: int, like: Tensor) -> Tensor:
    """Return the 2^bits levels of `quantize_k` in ascending order, with the type and device of `like`."""
    n = 2**bits - 1
    return torch.arange(n + 1, device=like.device).to(like.dtype) / float(n)
