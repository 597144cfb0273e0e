"""The command line of a stored configuration describes the same run."""

import shlex

import pytest
from conftest import Configure, long_tier, tiered

from qbench.config import compose
from qbench.config.command_line import command_line
from qbench.config.identity import run_identity
from qbench.config.schema import to_dict

WORDS = {  # typed -> words of the command line
    "method=dorefa bits=w2a2": ["method=dorefa", "bits=w2a2g32"],
    "method=ttq optim=ttq seed=3": ["method=ttq", "bits=w2a32g32", "optim=ttq", "seed=3"],
    "method=lsq bits=w2a2 optim=adamw optim.warmup=2 optim.ema=0.9": [
        "method=lsq", "bits=w2a2g32", "optim=adamw", "optim.ema=0.9", "optim.warmup=2.0",
    ],
    "method=lsq bits=w2a2 optim=sgd_step optim.milestones=[0.1,0.9]": [
        "method=lsq", "bits=w2a2g32", "optim=sgd_step", "optim.milestones=[0.1, 0.9]",
    ],
    "method=hwgq model=vgg_small dataset=cifar10": [
        "model=vgg_small", "dataset=cifar10", "method=hwgq", "bits=w1a2g32",
    ],
    "method=ttq activation=hwgq bits.a=2 layers.first=8": [
        "method=ttq", "activation=hwgq", "bits=w2a2g32", "layers.first=8",
    ],
    "method=dorefa +optim.momentum=0.5": ["method=dorefa", "bits=w2a32g32", "optim=unified", "+optim.momentum=0.5"],
    "method=dorefa layers.rules={layer1.*:8}": ["method=dorefa", "bits=w2a32g32", "layers.rules={layer1.*: 8}"],
    "method=float optim@pretrain.optim=adam pretrain.epochs=3": ["optim@pretrain.optim=adam", "pretrain.epochs=3"],
    "method=qd": ["method=qd", "bits=w4a32g32"],
}  # fmt: skip


FAST = [list(WORDS)[i] for i in (2, 5, 7, 8)]
"""Keys with numbers, a second method, a rule, a key of the float baseline."""


@pytest.mark.parametrize("typed", tiered(WORDS, FAST))
def test_the_command_line_describes_the_same_run(typed: str, configure: Configure) -> None:
    config = configure(*typed.split())
    found = command_line(to_dict(config))
    assert found is not None
    program, *words = shlex.split(found)
    assert program == "qbench"
    assert [word for word in words if not word.startswith("out=")] == WORDS[typed]
    (again,) = compose.configurations(words)
    assert run_identity(again).digest == run_identity(config).digest
    assert again.out == config.out


@pytest.mark.parametrize(
    "name", ["ttq/resnet20_cifar10", long_tier("xnor/alexnet_bwn"), long_tier("gupta/cifar_cnn_stochastic_fl12")]
)
def test_experiments_of_papers_have_a_command_line(name: str, configure: Configure) -> None:
    config = configure(f"experiment={name}")
    found = command_line(to_dict(config))
    assert found is not None
    (again,) = compose.configurations(shlex.split(found)[1:])
    assert run_identity(again).digest == run_identity(config).digest


def test_one_run_of_a_grid_and_foreign_code_have_none(configure: Configure) -> None:
    grid = compose.configurations(["method=dorefa", "lr_search=grid"])
    assert command_line(to_dict(grid[0])) is None
    config = configure("method=dorefa")
    config.model["name"] = "my.module:build"
    assert command_line(to_dict(config)) is None
