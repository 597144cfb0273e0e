"""Converts functions of torch to standard operators of ONNX.

Each converter takes a graph, followed by the parameters of the torch function. A tensor parameter is the name of a
value in the graph.
"""

from collections.abc import Callable, Sequence

from qbench.deploy.network import Batch, Sizes
from qbench.deploy.onnx_graph import Attribute, OnnxGraph


class NoConverter(Exception):
    """Raised if a function cannot be converted with these arguments. The message states the reason."""


Converter = Callable[..., str]


def _many(value: Sizes, axes: int) -> list[int]:
    return [value] * axes if isinstance(value, int) else list(value)


def _conv(axes: int) -> Converter:
    def convert(
        g: OnnxGraph, x: str, w: str, bias: str | None = None, stride: Sizes = 1, padding: Sizes | str = 0,
        dilation: Sizes = 1, groups: int = 1,
    ) -> str:  # fmt: skip
        attributes = {"strides": _many(stride, axes), "dilations": _many(dilation, axes)}
        attributes["kernel_shape"] = list(g.shape(w)[2:])  # FINN and qonnx need this attribute
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(_many(dilation, axes), g.shape(w)[2:], strict=True)]
            attributes["pads"] = [total // 2 for total in totals] + [total - total // 2 for total in totals]
        elif not isinstance(padding, str):
            attributes["pads"] = _many(padding, axes) * 2
        return g.node("Conv", x, w, *([bias] if bias else []), group=groups, **attributes)

    return convert


def _conv_transpose(axes: int) -> Converter:
    def convert(
        g: OnnxGraph, x: str, w: str, bias: str | None = None, stride: Sizes = 1, padding: Sizes = 0,
        output_padding: Sizes = 0, groups: int = 1, dilation: Sizes = 1,
    ) -> str:  # fmt: skip
        return g.node(
            "ConvTranspose", x, w, *([bias] if bias else []), group=groups, strides=_many(stride, axes),
            pads=_many(padding, axes) * 2, output_padding=_many(output_padding, axes), dilations=_many(dilation, axes),
        )  # fmt: skip

    return convert


def _linear(g: OnnxGraph, x: str, w: str, bias: str | None = None) -> str:
    y = g.node("MatMul", x, g.node("Transpose", w, perm=[1, 0]))
    return g.node("Add", y, bias) if bias else y


def _batch_norm(
    g: OnnxGraph, x: str, mean: str, var: str, weight: str | None = None, bias: str | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> str:  # fmt: skip
    if training:
        raise NoConverter("batch normalization without running statistics")
    channels = g.shape(mean)[0]
    weight, bias = weight or g.floats(*[1.0] * channels), bias or g.floats(*[0.0] * channels)
    return g.node("BatchNormalization", x, weight, bias, mean, var, epsilon=eps)


def _max_pool(axes: int) -> Converter:
    def convert(
        g: OnnxGraph, x: str, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> str:  # fmt: skip
        if return_indices:
            raise NoConverter("max pooling with indices")
        return g.node(
            "MaxPool", x, kernel_shape=_many(kernel_size, axes), strides=_many(stride or kernel_size, axes),
            pads=_many(padding, axes) * 2, dilations=_many(dilation, axes), ceil_mode=int(ceil_mode),
        )  # fmt: skip

    return convert


def _avg_pool(axes: int) -> Converter:
    def convert(
        g: OnnxGraph, x: str, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0,
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> str:  # fmt: skip
        if divisor_override:
            raise NoConverter("average pooling with divisor_override")
        return g.node(
            "AveragePool", x, kernel_shape=_many(kernel_size, axes), strides=_many(stride or kernel_size, axes),
            pads=_many(padding, axes) * 2, ceil_mode=int(ceil_mode), count_include_pad=int(count_include_pad),
        )  # fmt: skip

    return convert


def _adaptive_avg_pool(axes: int) -> Converter:
    def convert(g: OnnxGraph, x: str, output_size: int | Sequence[int | None]) -> str:
        sizes = g.shape(x)[-axes:]
        given = [output_size] * axes if isinstance(output_size, int) else output_size
        wanted = [n if m is None else m for m, n in zip(given, sizes, strict=True)]
        if any(size % want for size, want in zip(sizes, wanted, strict=True)):
            raise NoConverter(
                f"adaptive pooling from {sizes} to {tuple(wanted)}, because the sizes do not divide evenly"
            )
        kernel = [size // want for size, want in zip(sizes, wanted, strict=True)]
        return g.node("AveragePool", x, kernel_shape=kernel, strides=kernel)

    return convert


def _pad(g: OnnxGraph, x: str, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> str:
    if mode not in ("constant", "reflect", "replicate"):
        raise NoConverter(f"padding with mode={mode}")
    rank, axes = len(g.shape(x)), len(pad) // 2
    before, after = [0] * rank, [0] * rank
    for i in range(axes):
        before[rank - 1 - i], after[rank - 1 - i] = pad[2 * i], pad[2 * i + 1]
    constant = [g.floats(value or 0.0)] if mode == "constant" else []
    return g.node("Pad", x, g.integers(*before, *after), *constant, mode={"replicate": "edge"}.get(mode, mode))


def _flatten(g: OnnxGraph, x: str, start_dim: int = 0, end_dim: int = -1) -> str:
    rank = len(g.shape(x))
    start, end = start_dim % rank, end_dim % rank
    sizes = g.shape(x)
    kept = [0] * start  # 0 keeps a size
    if start == 0:
        raise NoConverter("flatten over the images")
    return g.node("Reshape", x, g.integers(*kept, -1, *sizes[end + 1 :]))


def _reshape(g: OnnxGraph, x: str, *sizes: object) -> str:
    first = sizes[0]
    flat = list(first) if len(sizes) == 1 and isinstance(first, tuple) and not isinstance(first, Batch) else list(sizes)
    return g.node("Reshape", x, g.integers(*_with_batch(g, flat)))


def _with_batch(g: OnnxGraph, sizes: list[object]) -> list[int]:
    """Return the sizes for the operator Reshape. At most one size is -1."""
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) == len(sizes):
        return known
    if len(known) == len(sizes) - 1 and -1 in known and sizes[0] == Batch(1):
        return [0, *known]  # 0 keeps the input's number of images
    if len(known) < len(sizes) - 1 or -1 in known:
        raise NoConverter("a reshape with two unknown sizes")
    return [size if isinstance(size, int) else -1 for size in sizes]


def _reduce(operator: str) -> Converter:
    def convert(g: OnnxGraph, x: str, dim: Sizes | None = None, keepdim: bool = False) -> str:
        if dim is None:
            raise NoConverter("a reduction over the images")
        axes = _many(dim, 1)
        if 0 in axes:
            raise NoConverter("a reduction over the images")
        return g.node(operator, x, g.integers(*axes), keepdims=int(keepdim))

    return convert


def _binary(operator: str, reverse: bool = False) -> Converter:
    def convert(g: OnnxGraph, x: str | float, other: str | float, *, alpha: float = 1) -> str:
        if alpha != 1:
            raise NoConverter(f"a sum with alpha={alpha}")
        names = [value if isinstance(value, str) else g.floats(float(value)) for value in (x, other)]
        return g.node(operator, *(reversed(names) if reverse else names))

    return convert


def _unary(operator: str, **attributes: Attribute) -> Converter:
    return lambda g, x: g.node(operator, x, **attributes)


def _clamp(g: OnnxGraph, x: str, min: str | float | None = None, max: str | float | None = None) -> str:
    ends = [end if isinstance(end, str) or end is None else g.floats(float(end)) for end in (min, max)]
    return g.node("Clip", x, *("" if end is None else end for end in ends))


def _permute(g: OnnxGraph, x: str, *dims: int | tuple[int, ...]) -> str:
    order = list(dims[0]) if isinstance(dims[0], tuple) else [d for d in dims if isinstance(d, int)]
    return g.node("Transpose", x, perm=[d % len(order) for d in order])


def _transpose(g: OnnxGraph, x: str, dim0: int, dim1: int) -> str:
    order = list(range(len(g.shape(x))))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return g.node("Transpose", x, perm=order)


def _cat(g: OnnxGraph, tensors: Sequence[str], dim: int = 0) -> str:
    return g.node("Concat", *tensors, axis=dim)


def _getitem(g: OnnxGraph, x: str, index: object) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    for axis, part in enumerate(parts):
        if not isinstance(part, slice):
            raise NoConverter("indexing other than with slices")
        if part != slice(None):
            start, stop = part.start or 0, 2**31 - 1 if part.stop is None else part.stop
            ends = g.integers(start), g.integers(stop), g.integers(axis), g.integers(part.step or 1)
            x = g.node("Slice", x, *ends)
    return x


def _silu(g: OnnxGraph, x: str) -> str:
    return g.node("Mul", x, g.node("Sigmoid", x))


def _gelu(g: OnnxGraph, x: str, approximate: str = "none") -> str:
    return g.node("Gelu", x, approximate=approximate)


def _softmax(g: OnnxGraph, x: str, dim: int = -1, dtype: None = None) -> str:
    return g.node("Softmax", x, axis=dim)


def _hardtanh(g: OnnxGraph, x: str, min_val: float = -1.0, max_val: float = 1.0) -> str:
    return _clamp(g, x, min_val, max_val)


def _leaky_relu(g: OnnxGraph, x: str, negative_slope: float = 0.01) -> str:
    return g.node("LeakyRelu", x, alpha=negative_slope)


def _layer_norm(
    g: OnnxGraph, x: str, normalized_shape: Sequence[int], weight: str | None = None, bias: str | None = None,
    eps: float = 1e-5,
) -> str:  # fmt: skip
    if weight is None or bias is None:
        raise NoConverter("layer normalization without weight and bias")
    return g.node("LayerNormalization", x, weight, bias, axis=-len(normalized_shape), epsilon=eps)


def _unsqueeze(g: OnnxGraph, x: str, dim: int) -> str:
    return g.node("Unsqueeze", x, g.integers(dim))


def _squeeze(g: OnnxGraph, x: str, dim: int) -> str:
    return g.node("Squeeze", x, g.integers(dim))


CONVERTERS: dict[str, Converter] = {
    **{f"conv{n}d": _conv(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _conv_transpose(n) for n in (1, 2, 3)},
    **{f"max_pool{n}d": _max_pool(n) for n in (1, 2, 3)},
    **{f"avg_pool{n}d": _avg_pool(n) for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": _adaptive_avg_pool(n) for n in (1, 2, 3)},
    "linear": _linear, "batch_norm": _batch_norm, "layer_norm": _layer_norm, "pad": _pad,
    "flatten": _flatten, "reshape": _reshape, "view": _reshape, "permute": _permute, "transpose": _transpose,
    "cat": _cat, "getitem": _getitem, "unsqueeze": _unsqueeze, "squeeze": _squeeze,
    "mean": _reduce("ReduceMean"), "sum": _reduce("ReduceSum"),
    "add": _binary("Add"), "sub": _binary("Sub"), "mul": _binary("Mul"), "div": _binary("Div"),
    "rsub": _binary("Sub", reverse=True), "matmul": _binary("MatMul"),
    "relu": _unary("Relu"), "neg": _unary("Neg"), "abs": _unary("Abs"), "sqrt": _unary("Sqrt"), "exp": _unary("Exp"),
    "sigmoid": _unary("Sigmoid"), "tanh": _unary("Tanh"), "contiguous": _unary("Identity"),
    "clone": _unary("Identity"), "hardswish": _unary("HardSwish"),
    "hardsigmoid": _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    "relu6": lambda g, x: _clamp(g, x, 0.0, 6.0), "clamp": _clamp, "hardtanh": _hardtanh, "silu": _silu,
    "gelu": _gelu, "softmax": _softmax, "leaky_relu": _leaky_relu,
}  # fmt: skip
"""Maps the name of a function in `qbench.deploy.network.FUNCTIONS` to its converter."""
