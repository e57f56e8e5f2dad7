from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fahooks
from fahooks.rules import workspace
from fahooks.surgery import feedback_rules

WEIGHT = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))


def in_backward(act: Any) -> Any:
    """What `act` returns when it is called in a backward pass."""
    found = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda error: found.append(act()))
    x.sum().backward()
    return found[0]


def place(weight: Tensor) -> int:
    return workspace.sign(weight).data_ptr()


def test_the_memory_of_a_matrix_that_is_gone_is_used_again():
    first, second, smaller = in_backward(lambda: [place(w) for w in (WEIGHT, WEIGHT, WEIGHT[:300])])
    assert first == second == smaller
    assert in_backward(lambda: place(WEIGHT)) == first


@pytest.mark.parametrize("keep", [lambda signs: signs, lambda signs: signs.detach(), lambda signs: signs[3:4]])
def test_what_somebody_holds_is_not_written_to(keep: Any):
    def act() -> tuple[Tensor, Tensor, Tensor]:
        held = keep(workspace.sign(WEIGHT))
        before = held.clone()
        return held, before, workspace.sign(-WEIGHT)

    held, before, other = in_backward(act)
    assert torch.equal(held, before) and torch.equal(other, (-WEIGHT).sign())
    assert held.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
@pytest.mark.parametrize("shape", [(512, 256, 3, 3), (4, 4, 3, 3)])
def test_signs_are_those_of_torch(dtype: torch.dtype, layout: str, shape: tuple[int, ...]):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[0, 0] = 0
    if layout != "contiguous":
        weight = weight.to(memory_format=torch.channels_last) if layout == "channels last" else weight.transpose(0, 1)
    expected = weight.sign()
    for found in (workspace.sign(weight), in_backward(lambda: workspace.sign(weight).clone())):
        assert torch.equal(found, expected) and found.dtype == dtype and found.stride() == expected.stride()


def test_nothing_is_kept_for_a_thread_that_leaves_it_to_the_allocator():
    in_backward(lambda: place(WEIGHT))
    assert workspace._kept.blocks
    workspace.leave_to_allocator()
    one, other = in_backward(lambda: [workspace.sign(WEIGHT), workspace.sign(WEIGHT)])
    assert one.data_ptr() != other.data_ptr() and torch.equal(one, WEIGHT.sign())
    assert not workspace._kept.blocks
    with ThreadPoolExecutor(1) as elsewhere:
        assert elsewhere.submit(in_backward, lambda: place(WEIGHT) == place(WEIGHT)).result(), "another thread goes on as before"


def test_outside_of_a_backward_pass_nothing_is_kept():
    one, other = workspace.sign(WEIGHT), workspace.sign(WEIGHT)
    assert one.data_ptr() != other.data_ptr()
    assert workspace.sign(WEIGHT.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert torch.equal(workspace.sign(WEIGHT), WEIGHT.sign())


def test_no_more_is_kept_than_was_said():
    large = torch.ones(workspace.LARGEST // 4 + 1)
    in_backward(lambda: [workspace.sign(w) for w in (WEIGHT, large)])
    assert sum(block.nbytes for block, *_ in workspace._kept.blocks.values()) <= 3 * workspace.LARGEST
    assert workspace._kept.blocks[torch.float32][0].nbytes <= workspace.LARGEST


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rule", ["usf", "usf_init", "usf_sn", "frsf"])
def test_a_hook_may_keep_every_matrix(rule: str, left: bool):
    if left:
        workspace.leave_to_allocator()
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 512))
    fahooks.convert(model, rule)
    kept = []
    for rule_of_layer in list(feedback_rules(model).values())[1:]:
        rule_of_layer.register_forward_hook(lambda rule, args, matrix: kept.append((args[0], matrix)))
    model(torch.randn(4, 256, requires_grad=True)).sum().backward()
    assert len(kept) == 2
    for weight, matrix in kept:
        assert torch.equal(matrix.sign(), weight.sign())
