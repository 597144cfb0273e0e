"""Plans how kernels compute a network: layers, addresses, and the content of the memory.

Pointwise functions between two layers, such as batch normalization, are not computed separately. If a quantizer
follows, the functions become part of the quantizer's thresholds. Otherwise, the preceding layer applies the functions
to its output as a ramp (slope * x + offset, and bounds).
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from torch import Tensor

from qbench.deploy.kernel_addresses import At
from qbench.deploy.kernel_formats import code_format
from qbench.deploy.kernel_layers import NO_RAMP, Finish
from qbench.deploy.kernel_memory import Map, Memory
from qbench.deploy.kernel_parameters import (
    FLOAT_NUMBERS,
    LANES,
    BitWeights,
    IntegerLevels,
    NoKernel,
    Numbers,
    bit_weights,
    code_thresholds,
    integer_levels,
    pack_thresholds,
    whole,
)
from qbench.deploy.kernel_ramps import Ramp, identity_ramp, is_pointwise, pointwise, ramp_of
from qbench.deploy.kernel_sources import PLANNERS, Computed, Operand, pooled
from qbench.deploy.network import Network, Ref, Step, Stored, refs
from qbench.errors import ConfigError


class NotRunnable(ConfigError):
    """Raised if kernels cannot run a network. The message names the layer, the reason and an alternative."""


class Layer(NamedTuple):
    """One layer of a plan: the Python text that makes its kernel, and its addresses."""

    kernel: str
    at: At


class Plan(NamedTuple):
    """A network as a list of layers that kernels compute.

    Args:
        layers: the layers in the order in which they run.
        image, logits: maps of the input image and of the output.
        memory: the content of the memory before the first image.
    """

    layers: Sequence[Layer]
    image: Map
    logits: Map
    memory: np.ndarray


def plan(network: Network, shape: tuple[int, int, int]) -> Plan:
    """Return the plan of a network.

    Args:
        shape: channels, height and width of an image.

    Raises:
        NotRunnable: no kernel exists for one of the network's functions or bit widths.
    """
    planner = Planner(network, shape)
    for i in range(len(network.steps)):
        planner.add_step(i)
    logits = planner.floats(network.output)
    if logits.height * logits.width != 1:
        raise NotRunnable(f"the numba kernels do not support a flattened map as the network's output\n{OTHER_WAYS}")
    if not planner.computes_codes:
        raise NotRunnable(
            "no layer has both weights and activations of 1 or 2 bits; bit-serial kernels need such a layer\n"
            f"{OTHER_WAYS}"
        )
    return Plan(planner.layers, planner.image, logits, planner.memory.build())


OTHER_WAYS = "run the file without --runtime numba, or export the run to onnx or int8"


class Planner:
    """Builds a plan from the steps of a traced network."""

    def __init__(self, network: Network, shape: tuple[int, int, int]) -> None:
        self.network, self.shapes = network, [*network.shapes(shape), (2, *shape)]  # the image is step -1
        self._steps = [*network.steps, Step("output", (network.output,), {})]
        self._uses: dict[int, list[int]] = {}
        for i, step in enumerate(self._steps):
            for ref in _refs(step):
                self._uses.setdefault(ref.step, []).append(i)
        self.memory = Memory(border=max((_padding(step) for step in network.steps), default=0))
        self.format = code_format(_bit_weights(network))
        self.computes_codes = False
        self.image = self.memory.floats(*shape, dense=True)
        self.layers: list[Layer] = []
        self._operands: dict[int, Operand] = {-1: Operand(self.image)}
        self._absorbed: set[int] = set()

    def add_step(self, i: int) -> None:
        """Plan a step and the steps that it reads, unless a planned layer already computes them."""
        if i in self._operands or i in self._absorbed:
            return
        step = self._steps[i]
        for ref in _refs(step):
            self.add_step(ref.step)
        try:
            if is_pointwise(step):
                operand = self.operand(next(_refs(step)))
                if operand.levels:
                    raise NoKernel(f"{step.function} of quantized activations")
                self._operands[i] = operand._replace(chain=(*operand.chain, step))
            elif step.function in PLANNERS:
                PLANNERS[step.function](self, i, *step.args, **step.kwargs)
            else:
                raise NoKernel(f"the function {step.function}")
        except (NoKernel, TypeError) as reason:
            raise NotRunnable(f"{_where(step)}: the numba kernels do not support {reason}\n{OTHER_WAYS}") from None

    # methods that `qbench.deploy.kernel_sources` calls

    def operand(self, ref: Ref) -> Operand:
        """Return the result of a planned step."""
        if ref.item is not None:
            raise NoKernel("functions that return several results")
        return self._operands[ref.step]

    def floats(self, ref: Ref) -> Map:
        """Return a result as a map of floats. If it has pending steps (`Operand`), an extra layer applies them."""
        operand = self.operand(ref)
        if operand.levels:
            raise NoKernel("quantized activations as input of this step")
        if operand.chain:
            computed = self.copied(ref)
            result = self.memory.floats(*computed.size)
            self._add(computed, ramp=computed.ramp, floats=result)
            self._operands[ref.step] = Operand(result)
        return self._operands[ref.step].map

    def copied(self, ref: Ref) -> Computed:
        """Return a source that copies a map of floats. Pending steps (`Operand`) become the ramp of the source."""
        operand = self.operand(ref)
        if operand.levels:
            raise NoKernel("quantized activations as input of this step")
        computed = pooled(operand.map, (1, 1), (1, 1), (0, 0), operand.map.size, mean=False)
        ramp = ramp_of(operand.chain, computed.ramp, self.network.tensors, len(self.shapes[ref.step]))
        return computed._replace(ramp=ramp)

    def alias(self, i: int, ref: Ref) -> None:
        """Declare that step i has the same values as another result, in another shape."""
        if not self.operand(ref).levels:
            self.floats(ref)
        self._operands[i] = self.operand(ref)

    # layers

    def quantize(self, i: int, x: Ref) -> None:
        """Add a layer that quantizes a map of floats."""
        operand = self.operand(x)
        computed = self.copied(x)
        self._quantize(i, computed, FLOAT_NUMBERS, operand.chain)

    def layer(self, i: int, computed: Computed, residual: Map | None = None) -> None:
        """Add a layer that computes step i, and the following steps that the same layer can compute.

        Args:
            residual: map that is added to the values of the source.
        """
        tensors, rank = self.network.tensors, len(self.shapes[i])
        ramp, second = computed.ramp, identity_ramp(computed.size[0])
        last = i
        if residual is None:
            chain, last = self._chain(i)
            if (quantizer := self._only_use(last, "quantize")) is not None:
                self._quantize(quantizer, computed, computed.numbers, chain)
                return
            ramp = ramp_of(chain, ramp, tensors, rank)
            if (total := self._only_use(last, "add")) is not None:
                (other,) = (ref for ref in _refs(self._steps[total]) if ref.step != last)
                plain = (
                    not self._steps[total].kwargs and self.shapes[other.step] == self.shapes[total] == self.shapes[last]
                )
                if plain and self._is_ready(other):
                    self._absorbed.add(total)
                    self.add_step(other.step)
                    residual, last = self.floats(other), total
        if residual is not None:
            chain, last = self._chain(last)
            second = ramp_of(chain, second, tensors, rank)
        branch, quantizer = self._quantizer_after(last)
        needed = len(self._uses[last]) > 1 or quantizer is None
        floats = self.memory.floats(*computed.size) if needed else None
        codes = None if quantizer is None else (quantizer, FLOAT_NUMBERS, branch)
        self._add(computed, ramp=ramp, residual=residual, second=second, floats=floats, codes=codes)
        if floats:
            self._operands[last] = Operand(floats)

    def padded(self, i: int, x: Ref, front: int, back: int) -> None:
        """Add a layer that copies a map and adds channels of zeros before and after its channels."""
        if self.operand(x).map.is_dense:
            raise NoKernel("channels of zeros beside channels of floats that are stored without gaps, as in the image")
        computed = self.copied(x)
        channels, height, width = computed.size
        result = self.memory.floats(front + channels + back, height, width)
        self._add(computed, ramp=computed.ramp, floats=result._replace(address=result.address + 4 * front))
        self._operands[i] = Operand(result)

    def _quantize(self, quantizer: int, computed: Computed, numbers: Numbers, chain: Sequence[Step]) -> None:
        """Add a layer whose values are read only by a quantizer, after a chain of pointwise steps."""
        self._add(computed, codes=(quantizer, numbers, chain))

    def _add(
        self,
        computed: Computed,
        *,
        ramp: Ramp | None = None,
        residual: Map | None = None,
        second: Ramp | None = None,
        floats: Map | None = None,
        codes: tuple[int, Numbers, Sequence[Step]] | None = None,
    ) -> None:
        """Add a layer.

        Args:
            codes: the index of the quantizer's step, the numbering of the values that are compared with thresholds, and
                the pointwise steps between these values and the quantizer.
        """
        self.computes_codes |= computed.integers
        fields: dict[str, int] = {}
        parts = second_parts = NO_RAMP
        if ramp and any(parts := ramp.parts):
            fields["ramp"] = self.memory.place(ramp.pack())
        if residual and residual.size[1:] != computed.size[1:]:  # a flattened map is stored pixel by pixel
            raise NoKernel("the sum of a vector and a flattened map")
        if residual:
            fields["residual"] = residual.address
        if second and any(second_parts := second.parts):
            fields["second_ramp"] = self.memory.place(second.pack())
        if floats:
            fields["floats"] = floats.address
        count, codes_strides = 0, None
        if codes:
            quantizer, numbers, chain = codes
            levels, thresholds, falling = self._thresholds(quantizer, numbers, chain, computed.size[0])
            count, integers = len(thresholds), computed.integers and not ramp
            fields["tables"] = self.format.tables_at(self.memory, levels.bits)
            fields["thresholds"] = self.memory.place(pack_thresholds(thresholds, falling, integers))
            result = self.format.new_map(self.memory, computed.size, levels.bits)
            fields["codes"], codes_strides = result.address, result.strides
            self._operands[quantizer] = Operand(result, levels=levels)
        finish = Finish(
            computed.integers, parts, residual.strides if residual else None, second_parts,
            floats.strides if floats else None, count, codes_strides, self.format.tables,
        )  # fmt: skip
        channels, height, width = computed.size
        kernel = f"layer({computed.source}, {finish}, {height}, {width}, {whole(channels) // LANES})"
        self.layers.append(Layer(kernel, computed.at._replace(**fields)))

    def _thresholds(
        self, quantizer: int, numbers: Numbers, chain: Sequence[Step], channels: int
    ) -> tuple[IntegerLevels, Tensor, Tensor]:
        """Return a quantizer's levels, its thresholds as numbers, and the channels with descending codes.

        In channels with descending codes, larger values have smaller codes.
        """
        step, rank = self._steps[quantizer], len(self.shapes[quantizer])
        stored = step.args[2]
        assert isinstance(stored, Stored)
        levels = self.network.tensors[stored.name]
        levels = levels[:1] if levels.dim() == 2 and bool((levels == levels[0]).all()) else levels.reshape(1, -1)
        found = integer_levels(levels)
        if found.scale[0] < 0:
            raise NoKernel("levels in descending order")
        ramp_of(chain, identity_ramp(channels), self.network.tensors, rank)  # refuses constants that vary by pixel
        function = pointwise([*chain, step], self.network.tensors)

        def of_pixels(x: Tensor) -> Tensor:
            return function(x.reshape(*x.shape, *[1] * (rank - 2))).reshape(x.shape)

        return found, *code_thresholds(of_pixels, levels[0], channels, numbers)

    # search for steps that one layer can compute together

    def _only_use(self, i: int, function: str | None = None) -> int | None:
        """Return the index of the only step that reads a result, if this step has the given function, else None.

        Without a function, the step must be pointwise.
        """
        uses = self._uses.get(i, [])
        if len(uses) != 1:
            return None
        step = self._steps[uses[0]]
        return uses[0] if (is_pointwise(step) if function is None else step.function == function) else None

    def _is_ready(self, ref: Ref) -> bool:
        """Return whether a result is already planned.

        The steps of a shortcut without parameters count as planned if their inputs are planned.
        """
        if ref.step in self._operands:
            return True
        step = self._steps[ref.step]
        return step.function in ("avg_pool2d", "getitem", "pad") and all(map(self._is_ready, _refs(step)))

    def _chain(self, i: int) -> tuple[list[Step], int]:
        """Mark the pointwise steps after a result as planned. Return their chain, and the index of the last step.

        Each step of the chain is the only reader of the result before it.
        """
        chain = []
        while (after := self._only_use(i)) is not None:
            self._absorbed.add(i := after)
            chain.append(self._steps[i])
        return chain, i

    def _quantizer_after(self, i: int) -> tuple[list[Step], int | None]:
        """Return the pointwise steps between a result and a quantizer, and the index of the quantizer's step.

        If no quantizer reads the result, the index is None.
        """
        for use in self._uses[i]:
            chain = []
            while is_pointwise(self._steps[use]) and len(self._uses[use]) == 1:
                chain.append(self._steps[use])
                (use,) = self._uses[use]
            if self._steps[use].function == "quantize":
                return chain, use
        return [], None


def _bit_weights(network: Network) -> Iterator[BitWeights]:
    """Yield the weights with which kernels can multiply codes."""
    for weight in network.weights.values():
        with suppress(NoKernel):
            yield bit_weights(weight, weight.shape)


def _refs(step: Step) -> Iterator[Ref]:
    return refs((step.args, tuple(step.kwargs.values())))


def _where(step: Step) -> str:
    """Return the name of the module that a step belongs to, for messages."""
    names = [a.name.rpartition(".")[0] for a in step.args if isinstance(a, Stored)]
    return step.where or next(iter(names), "the network")


def _padding(step: Step) -> int:
    """Return the largest padding of a convolution or pooling step, in pixels."""
    value = step.kwargs.get("padding", step.args[4] if step.function == "conv2d" and len(step.args) > 4 else 0)
    return max(value) if isinstance(value, tuple) else value if isinstance(value, int) else 0
