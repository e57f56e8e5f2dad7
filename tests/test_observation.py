"""A look at a model leaves no trace, and reads the autograd graph as it is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fahooks.observation import as_found, edges, inputs_first, tensors, with_gradient


@dataclass
class Output:
    logits: torch.Tensor
    hidden: list[torch.Tensor]


def test_the_model_is_put_back_also_after_an_exception():
    conv, norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
    model = nn.Sequential(conv, norm, nn.Dropout())
    conv.weight.requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), as_found(model):
        model.requires_grad_(True)
        model(torch.randn(3, 1, 4, 4))
        assert any(not torch.equal(b, before[name]) for name, b in model.named_buffers()), "control: the pass left a trace"
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]


def test_a_buffer_that_did_not_change_is_not_written():
    model = nn.BatchNorm2d(2).eval()
    mean = model.get_buffer("running_mean")
    version = mean._version
    with as_found(model):
        model(torch.randn(3, 2, 4, 4))
    assert mean._version == version
    with as_found(model):
        model.train()(torch.randn(3, 2, 4, 4))
    assert mean._version > version, "control: one that changed is"


def test_inputs_are_copied_where_they_can_carry_a_gradient():
    image, label = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    copied = with_gradient(image)
    copied.add_(1)
    assert copied.requires_grad and not image.requires_grad and image.sum() == 0
    assert with_gradient(label) is label


def test_tensors_are_found_at_any_depth():
    a, b, c = torch.zeros(3).unbind()
    assert [id(t) for t in tensors({"x": (a, None), "y": Output(b, [c])})] == [id(a), id(b), id(c)]


def test_the_graph_is_walked_inputs_first():
    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    output = (y * y.sin()).sum()
    assert output.grad_fn is not None
    names = [node.name().removesuffix("0") for node in inputs_first([output.grad_fn], edges)]
    assert sorted(names) == sorted(
        ["torch::autograd::AccumulateGrad", "ExpBackward", "SinBackward", "MulBackward", "SumBackward"]
    )
    assert names.index("ExpBackward") < names.index("SinBackward") < names.index("MulBackward") < names.index("SumBackward")
