"""torchvision's models of segmentation and detection: conversion is exact on each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests.zoo.exactness import check
from tests.zoo.shrinking import Unfilled, fill, images, shorten


class Detected(nn.Module):
    """Detection in two images of the same boxes: losses in training, boxes in evaluation."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> Any:
        box = torch.tensor([[4.0, 6.0, 40.0, 50.0]], dtype=x.dtype)
        masks = torch.zeros(1, *x.shape[2:], dtype=torch.uint8)
        masks[:, 6:50, 4:40] = 1
        keypoints = torch.tensor([[[9.0, 9.0, 1.0]] * 17])
        target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64), "masks": masks, "keypoints": keypoints}
        return self.detector(list(x), [target] * len(x) if self.training else None)


def segmentation(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3)


def detection(name: str) -> nn.Module:
    return Detected(torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=2, **SIZES.get(name, {})))


SIZES: dict[str, dict[str, int]] = {
    name: {"min_size": 64, "max_size": 64}
    for name in torchvision.models.list_models(module=torchvision.models.detection)
    if not name.startswith("ssd")
}

QUICK = (
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
)
"""The others take a minute each."""


def models_of(kind: Any) -> list[Any]:
    names = torchvision.models.list_models(module=kind)
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", models_of(torchvision.models.segmentation))
def test_segmentation_is_exact(name: str):
    verify(segmentation, name)


@pytest.mark.parametrize("name", models_of(torchvision.models.detection))
def test_detection_is_exact(name: str):
    verify(detection, name)


def verify(make: Any, name: str) -> None:
    with Unfilled():
        model = make(name)
    parts: Any = model
    if not name.startswith("ssd"):  # without all of its blocks it does not run, and so a head for keypoints
        shorten(parts.detector.backbone if name.startswith("keypoint") else model, keep=1)
    check(fill(model), [images(64)])
