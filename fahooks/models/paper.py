"""The five networks of Moskovitz et al. 2018, Supplementary Tables 2 and 3: images [N, C, H, W] to logits [N, classes].

A row of a table is a line here. Where the paper is silent or leaves a choice:

- Every convolution pads by half its kernel. The maps that the tables average over, 8x8 and 4x4, follow from that, and from no
  padding they do not.
- The softmax is part of the loss. The ReLU that the tables put on the last 1x1 convolution is left out: it would make a class
  whose map is negative everywhere untrainable, and none of the other networks has one on its logits.
- Dropout is where section 7.1 has it. It does not name the ImageNet networks; model 2, a scaled variation of CIFAR-10 model 2,
  has it in the same places.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import nn

from fahooks.plugins import InputError, models, near

PAPER = "Moskovitz, Litwin-Kumar, Abbott 2018, https://arxiv.org/abs/1812.06488"

Init = Literal["fan_in", "default"]

Activation = Literal["relu", "tanh"]

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def fan_in_(model: nn.Module) -> None:
    """Draw the weights of every linear and convolutional layer from N(0, 1/N_in) and set the biases to zero.

    N_in is the number of connections into a unit: channels per group times kernel area (Moskovitz et al. 2018, section 5.1).
    """
    for module in model.modules():
        # On the meta device there is nothing to draw, and torch would import its compiler to do so, which takes seconds.
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Network(nn.Sequential):
    """Named rows, one after the other.

    Arguments:
        init: "fan_in" draws weights from N(0, 1/N_in) and zeroes biases, section 5.1; "default" keeps torch's initialisation.
        input_size: the shape (C, H, W) of an image.
        rows: modules by name.

    Raises:
        InputError: there is no such `init`.
    """

    def __init__(self, init: Init, input_size: tuple[int, int, int], **rows: nn.Module) -> None:
        super().__init__()
        if init not in get_args(Init):
            raise InputError(f"init must be 'fan_in' or 'default', got {init!r}{near(str(init), get_args(Init))}")
        self.input_size = input_size
        for name, row in rows.items():
            self.add_module(name, row)
        if init == "fan_in":
            fan_in_(self)


@models.register(
    "paper/mnist", summary="the paper's MNIST network (Supplementary Table 2): two 5x5 convolutions, 1024 dense", paper=PAPER
)
def mnist(
    *, init: Init = "fan_in", activation: Activation = "relu", in_channels: int = 1, image_size: int = 28, classes: int = 10
) -> Network:
    """The MNIST network, Supplementary Table 2.

    Arguments:
        init: as for `Network`.
        activation: "relu", the paper's, or "tanh", which is bounded, as `drtp` needs it.
        in_channels: channels C of an image.
        image_size: height H and width W of an image, at least 4; the paper's is 28.
        classes: the number of classes.

    Raises:
        InputError: the image is too small for two 2x2 poolings, or there is no such `init` or `activation`.
    """
    _require("paper/mnist", image_size, at_least=4)
    return Network(
        init,
        (in_channels, image_size, image_size),
        conv1=_conv(in_channels, 32, 5),
        activation1=_activation(activation),
        pool1=nn.MaxPool2d(2),
        conv2=_conv(32, 64, 5),
        activation2=_activation(activation),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        dense=nn.Linear(64 * (image_size // 4) ** 2, 1024),
        activation3=_activation(activation),
        dropout=nn.Dropout(0.5),
        output=nn.Linear(1024, classes),
    )


@models.register(
    "paper/cifar10-1",
    summary="the paper's CIFAR-10 model 1 (Supplementary Table 2): two 5x5 convolutions, 384 and 192 dense",
    paper=PAPER,
)
def cifar10_1(
    *, init: Init = "fan_in", activation: Activation = "relu", in_channels: int = 3, image_size: int = 24, classes: int = 10
) -> Network:
    """CIFAR-10 model 1, Supplementary Table 2, for crops of 24x24 pixels.

    Arguments:
        init: as for `Network`.
        activation: "relu", the paper's, or "tanh", which is bounded, as `drtp` needs it.
        in_channels: channels C of an image.
        image_size: height H and width W of an image, at least 4; the paper's is 24.
        classes: the number of classes.

    Raises:
        InputError: the image is too small for two 2x2 poolings, or there is no such `init` or `activation`.
    """
    _require("paper/cifar10-1", image_size, at_least=4)
    return Network(
        init,
        (in_channels, image_size, image_size),
        conv1=_conv(in_channels, 64, 5),
        activation1=_activation(activation),
        pool1=nn.MaxPool2d(2),
        conv2=_conv(64, 64, 5),
        activation2=_activation(activation),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        dense1=nn.Linear(64 * (image_size // 4) ** 2, 384),
        activation3=_activation(activation),
        dense2=nn.Linear(384, 192),
        activation4=_activation(activation),
        output=nn.Linear(192, classes),
    )


@models.register(
    "paper/cifar10-2",
    summary="the paper's CIFAR-10 model 2 (Supplementary Table 2): nine convolutions, no dense layer",
    paper=PAPER,
)
def cifar10_2(
    *, init: Init = "fan_in", activation: Activation = "relu", in_channels: int = 3, image_size: int = 32, classes: int = 10
) -> Network:
    """CIFAR-10 model 2, Supplementary Table 2: the all-convolutional network of Springenberg et al. 2014.

    Arguments:
        init: as for `Network`.
        activation: "relu", the paper's, or "tanh", which is bounded, as `drtp` needs it.
        in_channels: channels C of an image.
        image_size: height H and width W of an image; the paper's is 32.
        classes: the number of classes.

    Raises:
        InputError: the image has no pixels, or there is no such `init` or `activation`.
    """
    _require("paper/cifar10-2", image_size, at_least=1)
    return Network(
        init,
        (in_channels, image_size, image_size),
        dropout0=nn.Dropout(0.2),
        conv1=_conv(in_channels, 96, 3),
        activation1=_activation(activation),
        conv2=_conv(96, 96, 3),
        activation2=_activation(activation),
        conv3=_conv(96, 96, 3, stride=2),
        activation3=_activation(activation),
        dropout3=nn.Dropout(0.5),
        conv4=_conv(96, 192, 3),
        activation4=_activation(activation),
        conv5=_conv(192, 192, 3),
        activation5=_activation(activation),
        conv6=_conv(192, 192, 3, stride=2),
        activation6=_activation(activation),
        dropout6=nn.Dropout(0.5),
        conv7=_conv(192, 192, 3),
        activation7=_activation(activation),
        conv8=_conv(192, 192, 1),
        activation8=_activation(activation),
        output=_conv(192, classes, 1),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
    )


@models.register(
    "paper/imagenet-1",
    summary="the paper's ImageNet model 1 (Supplementary Table 3): 9x9 and 5x5 convolutions of stride 2, 512 and 512 dense",
    paper=PAPER,
)
def imagenet_1(
    *, init: Init = "fan_in", activation: Activation = "relu", in_channels: int = 3, image_size: int = 299, classes: int = 1000
) -> Network:
    """ImageNet model 1, Supplementary Table 3, for images of 299x299 pixels.

    Arguments:
        init: as for `Network`.
        activation: "relu", the paper's, or "tanh", which is bounded, as `drtp` needs it.
        in_channels: channels C of an image.
        image_size: height H and width W of an image, at least 11; the paper's is 299.
        classes: the number of classes.

    Raises:
        InputError: the image is too small for two strides of 2 and two 2x2 poolings, or there is no such `init` or
            `activation`.
    """
    _require("paper/imagenet-1", image_size, at_least=11)
    side = ((image_size + 1) // 4 + 1) // 4  # a stride rounds up, a pooling down
    return Network(
        init,
        (in_channels, image_size, image_size),
        conv1=_conv(in_channels, 192, 9, stride=2),
        activation1=_activation(activation),
        pool1=nn.MaxPool2d(2),
        conv2=_conv(192, 192, 5, stride=2),
        activation2=_activation(activation),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        dense1=nn.Linear(192 * side**2, 512),
        activation3=_activation(activation),
        dense2=nn.Linear(512, 512),
        activation4=_activation(activation),
        output=nn.Linear(512, classes),
    )


@models.register(
    "paper/imagenet-2",
    summary="the paper's ImageNet model 2 (Supplementary Table 3): nine convolutions, no dense layer",
    paper=PAPER,
)
def imagenet_2(
    *, init: Init = "fan_in", activation: Activation = "relu", in_channels: int = 3, image_size: int = 299, classes: int = 1000
) -> Network:
    """ImageNet model 2, Supplementary Table 3: CIFAR-10 model 2 scaled to images of 299x299 pixels.

    Arguments:
        init: as for `Network`.
        activation: "relu", the paper's, or "tanh", which is bounded, as `drtp` needs it.
        in_channels: channels C of an image.
        image_size: height H and width W of an image; the paper's is 299.
        classes: the number of classes.

    Raises:
        InputError: the image has no pixels, or there is no such `init` or `activation`.
    """
    _require("paper/imagenet-2", image_size, at_least=1)
    return Network(
        init,
        (in_channels, image_size, image_size),
        dropout0=nn.Dropout(0.2),
        conv1=_conv(in_channels, 192, 9, stride=4),
        activation1=_activation(activation),
        conv2=_conv(192, 192, 3, stride=2),
        activation2=_activation(activation),
        conv3=_conv(192, 192, 3, stride=3),
        activation3=_activation(activation),
        dropout3=nn.Dropout(0.5),
        conv4=_conv(192, 256, 5, stride=2),
        activation4=_activation(activation),
        conv5=_conv(256, 256, 3),
        activation5=_activation(activation),
        conv6=_conv(256, 256, 3, stride=2),
        activation6=_activation(activation),
        dropout6=nn.Dropout(0.5),
        conv7=_conv(256, 512, 3),
        activation7=_activation(activation),
        conv8=_conv(512, 512, 1),
        activation8=_activation(activation),
        output=_conv(512, classes, 1),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
    )


def _conv(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Padded so that a map of side s becomes one of side ceil(s / stride)."""
    return nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2)


def _activation(name: Activation) -> nn.Module:
    if name not in ACTIVATIONS:
        raise InputError(
            f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {name!r}{near(str(name), ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]()


def _require(name: str, image_size: int, at_least: int) -> None:
    if image_size < at_least:
        raise InputError(f"{name} needs images of at least {at_least}x{at_least} pixels, not image_size={image_size}")
