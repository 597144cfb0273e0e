"""Initial weights that several networks share."""

from torch import nn


def init_fan_out(model: nn.Module) -> None:
    """Draw the weights of all convolutions from He's Gaussian, scaled by fan-out, as torchvision's ResNets do.

    Linear layers keep torch's default. Source: He et al. 2015, arXiv 1502.01852.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def init_fan_in(model: nn.Module) -> None:
    """Draw the weights of all convolutions and linear layers from He's Gaussian scaled by fan-in; set biases to 0.

    Caffe calls this initialization msra. Source: He et al. 2015, arXiv 1502.01852.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
