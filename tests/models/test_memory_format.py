import os
import subprocess
import sys

import pytest
import torch
from conftest import tiered
from torch import nn

from qbench.models.memory_format import use_channels_last

GRADIENTS = """
import torch
from torch import nn
from qbench.models.memory_format import use_channels_last

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3))
use_channels_last(net)
images = torch.randn(64, 4, 8, 8).to(memory_format=torch.channels_last)
for _ in range(20):
    net.zero_grad()
    net(images).square().sum().backward()
exact = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
exact.load_state_dict(net.state_dict())
exact(images.contiguous().double()).square().sum().backward()
for p, q in zip(net.parameters(), exact.parameters(), strict=True):
    torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-3)
"""


@pytest.mark.parametrize("instructions", tiered(["DEFAULT", "AVX2"], []))
def test_strided_1x1_convolutions_with_few_channels_have_right_gradients(instructions: str) -> None:
    """Without the exception for such layers, the process aborts on processors with AVX2 but without AVX-512."""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", GRADIENTS], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_other_layers_read_channels_last() -> None:
    layers = [nn.Conv2d(4, 8, 1, stride=2), nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(4, 8, 3, stride=2)]
    formats: list[bool] = []
    for layer in layers:
        use_channels_last(layer)
        layer.register_forward_pre_hook(lambda _, inputs: formats.append(inputs[0].is_contiguous()))
        layer(torch.randn(2, layer.in_channels, 8, 8).to(memory_format=torch.channels_last))
    assert formats == [True, False, False]
    assert not layers[2].weight.is_contiguous()
