"""The graph of a network: its operations in order, and what each of them reads."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.models import resnet
from qbench.quant.graph import IMAGE, UNKNOWN, between, operations, recorded_calls
from qbench.quant.policy import quantizable

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """A residual sum, a layer called twice, a change in place, a constant, and a step of Python on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)
        self.register_buffer("mean", torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.conv(x - self.mean)
        h = self.act(h)
        if h.sum() > -1:
            h = h + self.conv(x=x) if False else h + self.conv(h)
        h[:, 0] = 0
        h.mul_(2)
        return {"logits": F.adaptive_avg_pool2d(h, 1).flatten(1)}


def test_operations_and_what_they_read() -> None:
    model = Branches()
    graph = operations(model, X)
    assert [(o.name, o.module, o.kind, o.reads, o.parameters) for o in graph if o.kind != "sum"] == [
        (IMAGE, None, IMAGE, (), ()),
        ("sub", None, "sub", (IMAGE,), ("mean",)),
        ("conv", "conv", "Conv2d", ("sub",), ()),
        ("act", "act", "ReLU", ("conv",), ()),
        ("gt", None, "gt", ("sum",), ()),
        ("conv:2", "conv", "Conv2d", ("act",), ()),
        ("add", None, "add", ("act", "conv:2"), ()),
        ("__setitem__", None, "__setitem__", ("add",), ()),
        ("mul_", None, "mul_", ("__setitem__",), ()),
        ("adaptive_avg_pool2d", None, "adaptive_avg_pool2d", ("mul_",), ()),
        ("flatten", None, "flatten", ("adaptive_avg_pool2d",), ()),
    ]
    assert [o.name for o in between(graph, IMAGE, "conv:2")] == ["sub", "conv", "act"]
    assert [o.name for o in between(graph, "act", "add")] == ["conv:2"]
    assert model.training
    assert "forward" not in vars(model.conv), "the network is left as it was"


def test_a_tensor_of_unknown_origin_is_marked() -> None:
    class ByNumPy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(torch.from_numpy(np.abs(x.numpy())))
            return y

    graph = operations(ByNumPy(), X)
    assert graph[-1].reads[0] in (UNKNOWN, "from_numpy")
    assert IMAGE not in graph[-1].reads


def test_a_residual_network_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = resnet.build((3, 8, 8), 10, depth=8, width=4)
    graph = {o.name: o for o in operations(model, X.to("meta"), quantizable(model))}
    assert graph["conv1"].reads == (IMAGE,)
    assert graph["layer2.0.conv1"].reads == ("layer2.0.act1",)
    assert graph["add"].reads == ("layer1.0.bn", "conv1")


def test_calls_are_recorded_without_hooks_and_through_forward() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(128, 2))
    with recorded_calls(model, ["0", "2"]) as calls:
        h = model[0].forward(X)
        model[2](input=model[1](h))
        assert not model[0]._forward_hooks
    assert [call.name for call in calls] == ["0", "2"]
    assert calls[0].input is X
    assert calls[0].output is h


class InPlace(nn.Module):
    """A layer whose input and output are changed in place after the call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        y += x
        x.mul_(0)
        return y.relu_()


def test_recorded_calls_keep_what_the_call_read_and_returned() -> None:
    model, images = InPlace(), torch.randn(2, 2, 3, 3)
    with torch.no_grad(), recorded_calls(model, ["conv"]) as calls:
        model(images.clone())
    ((_, x, y),) = calls
    assert torch.equal(x, images)
    assert torch.equal(y, model.conv(images))
