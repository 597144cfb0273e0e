"""Every method on an empty batch, on one image, and in other number types."""

import pytest
import torch
from torch import nn

from qbench.bits import FLOAT, Bits
from qbench.config import registry
from qbench.quant.install import install
from qbench.quant.layers import quantized_layers
from qbench.quant.method import Method

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
METHODS = [name for name in registry.names("method") if name != "float"]


class Net(nn.Module):
    """Four layers; each activation feeds one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.act1, self.conv2 = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)
        self.act2, self.fc, self.last = nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 5)
        self.feeds = {"act1": ("conv2",), "act2": ("fc",)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act2(self.conv2(self.act1(self.conv1(x)))).flatten(1)
        y: torch.Tensor = self.last(self.fc(h))
        return y


def method(name: str) -> Method:
    """Return a method at its default width for weights and, if it can, 4 or 1 bits for activations."""
    default = registry.create("method", {"name": name})
    widths = default.supported_bits.get("a", ())
    a = next((k for k in (4, 1, 16) if k in widths), FLOAT)
    g = 16 if name == "gupta" else FLOAT
    built: Method = registry.create("method", {"name": name}, **Bits(default.bits.w, a, g)._asdict())
    return built


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_batch_and_a_single_image(name: str) -> None:
    model = install(method(name), Net(), example=X)
    for mode in (True, False):
        empty = model.train(mode)(X[:0])
        assert empty.shape == (0, 5)
        if empty.requires_grad:
            empty.sum().backward()
    model.train()
    assert model(X[:1]).shape == (1, 5)
    expected = install(method(name), Net(), example=X).train()
    expected(X[:1])
    state = expected.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True, msg=f"{key} changed")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_other_number_types(name: str, dtype: torch.dtype) -> None:
    model, x = install(method(name), Net(), example=X).to(dtype), X.to(dtype)
    model.train()(x).sum().backward()
    assert model.eval()(x).dtype == dtype
    grads = [p.grad for layer in quantized_layers(model).values() for p in layer.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    if dtype == torch.float64:
        single = install(method(name), Net(), example=X)
        single.train()(X)
        torch.testing.assert_close(model(x).float(), single.eval()(X), rtol=0.02, atol=0.05)
