from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fahooks
from fahooks import functional, plugins, verify
from fahooks.surgery import feedback_rules


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3)
    )


def images() -> Tensor:
    return torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(2))


def verified(model: nn.Module, *inputs: Any, rule: Any = "usf_sn", **arguments: Any) -> verify.Verification:
    plain = verify.outputs(model, *inputs)
    report = fahooks.convert(model, rule, **arguments)
    return verify.verify(model, plain, *inputs, ignore=report.left_out)


def failed(verification: verify.Verification) -> list[str]:
    return [check.claim for check in verification.checks if not check.ok]


def culprits(check: verify.Check) -> list[str]:
    return [problem.culprit for problem in check.problems]


@pytest.mark.parametrize("rule", [name for name in plugins.rules.names() if name != "bp"])
def test_every_rule_passes_the_control_with_b_equal_w_too(rule: str):
    verification = verified(net(), images(), rule=rule)
    assert verification.ok, str(verification)
    assert verification.rules.extent.endswith("each of 2 converted layers")


def test_a_rule_that_only_the_gradient_of_the_inputs_would_use_is_said():
    says = "where the inputs need no gradient, there is nothing below, and all layers learn as by backpropagation"
    assert verified(net(), images(), rule={"0": "fa"}).rules.extent.endswith(f"1 converted layer; {says}")
    for rule in ({"5": "fa"}, "fa", "bp"):
        assert says not in verified(net(), images(), rule=rule).rules.extent
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(2, 3, 4)
    assert says not in verified(attention, x, x, x, rule="fa").rules.extent, "the second projection has the first one below"


class Bypassing(nn.Linear):
    """Uses its weight in a way that the routing does not see."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.addmm(self.bias, input, self.weight.t())


def test_a_layer_whose_rule_is_bypassed_is_named():
    verification = verified(nn.Sequential(nn.Linear(4, 4), Bypassing(4, 4), nn.Linear(4, 2)), torch.randn(3, 4))
    assert failed(verification) == ["rule in effect", "audit clean"]
    assert verification.rules.problems == (verify.Problem("1", "the backward pass never asks for its B"),)
    assert culprits(verification.audit) == ["1", "1.weight"]


def test_a_rule_that_is_asked_and_ignored_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(functional, "feedback_matrix", lambda feedback, weight: (feedback(weight), weight)[1])
    verification = verified(net(), images())
    assert failed(verification) == ["rule in effect"]
    assert verification.rules.problems == tuple(verify.Problem(name, "another B sends the same gradient below") for name in "05")


def test_a_layer_that_is_bypassed_at_one_of_its_calls_is_named():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, input: Tensor) -> Tensor:
            return F.linear(self.layer(input), self.layer.weight)

    verification = verified(Twice(), torch.randn(3, 4))
    assert failed(verification) == ["audit clean"]
    assert culprits(verification.audit) == ["layer.weight"]


def test_one_ignored_call_of_several_is_enough_to_fail(monkeypatch: pytest.MonkeyPatch):
    layer, calls, genuine = nn.Linear(4, 4), [], functional.feedback_matrix

    def every_other(feedback: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
        calls.append(weight)
        return genuine(feedback, weight) if len(calls) % 2 else (feedback(weight), weight)[1]

    monkeypatch.setattr(functional, "feedback_matrix", every_other)
    verification = verified(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(3, 4))
    assert len(calls) == 4
    assert culprits(verification.rules) == ["0"]


def test_a_changed_forward_pass_is_told_by_output_and_size():
    model = net()
    plain = verify.outputs(model, images())
    fahooks.convert(model, "fa")
    with torch.no_grad():
        list(model.parameters())[-1][0] += 0.25
    verification = verify.verify(model, plain, images())
    assert failed(verification) == ["forward unchanged"]
    assert verification.forward.problems == (
        verify.Problem("output 0", "in evaluation mode: differs by up to 0.25"),
        verify.Problem("output 0", "as built: differs by up to 0.25"),
    )


def test_a_core_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch):
    model, genuine = net(), functional.linear
    monkeypatch.setitem(functional.ROUTES, F.linear, lambda *args, **kwargs: genuine(*args, **kwargs) + 1e-6)
    assert failed(verified(model, images())) == ["forward unchanged"]


def test_another_shape_or_number_of_outputs_is_a_changed_forward_pass():
    model = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    plain = verify.outputs(model, x)["as built"][0]
    fahooks.convert(model, "fa")
    assert verify.verify(model, {"in evaluation mode": [plain[:2]], "as built": [plain.double()]}, x).forward.problems == (
        verify.Problem("output 0", "in evaluation mode: was (2, 2) torch.float32, is (3, 2) torch.float32"),
        verify.Problem("output 0", "as built: was (3, 2) torch.float64, is (3, 2) torch.float32"),
    )
    assert verify.verify(model, {"as built": []}, x).forward.problems == (
        verify.Problem("model", "as built: returns 1 tensors, 0 before it was converted"),
    )


def test_a_branch_that_starts_at_zero_is_verified_all_the_same():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.zeros(4))

        def forward(self, input: Tensor) -> Tensor:
            return input + self.scale * self.branch(input)

    model, x = Residual(), torch.randn(3, 4)
    (true_gradient,) = torch.autograd.grad(model(x).sum(), model.branch.weight)
    assert not true_gradient.any()
    assert verified(model, x).ok


def test_the_first_layer_counts_and_a_frozen_one_too():
    model = net()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    verification = verified(model, images())
    assert verification.ok
    assert "each of 2" in verification.rules.extent


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layer = nn.Linear(4, 4)
        self.positions = nn.Linear(2, 4)
        self.register_buffer("table", torch.randn(5, 2))

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        hidden = self.layer(self.embedding(tokens)) + self.positions(self.table)
        return {"hidden": hidden, "both": [hidden.sum(), tokens]}


def test_integer_inputs_nested_outputs_and_layers_of_constants():
    tokens = torch.randint(10, (2, 5))
    model = Tokens()
    assert [tuple(tensor.shape) for tensor in verify.outputs(model, tokens)["as built"]] == [(2, 5, 4), (), (2, 5)]
    verification = verified(model, tokens)
    assert verification.ok, str(verification)
    assert "each of 1 converted layer;" in verification.rules.extent
    assert "; 1 more layer with a constant input" in verification.rules.extent


def test_a_model_may_return_more_while_it_learns():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.auxiliary = nn.Linear(4, 2)

        def forward(self, input: Tensor) -> Any:
            return (self.head(input), self.auxiliary(input)) if self.training else self.head(input)

    assert verified(Auxiliary(), torch.randn(3, 4)).ok
    assert verified(Auxiliary().eval(), torch.randn(3, 4)).rules.problems == (
        verify.Problem("auxiliary", "the backward pass never asks for its B"),
    )


def test_attention_is_verified_by_projection():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, query: Tensor, memory: Tensor) -> Tensor:
            return self.attention(query, memory, memory)[0]

    verification = verified(Attention(), torch.randn(2, 3, 4), torch.randn(2, 5, 4), rule="fa")
    assert verification.ok, str(verification)
    assert "each of 2" in verification.rules.extent


def test_layers_left_out_on_purpose_are_no_findings():
    verification = verified(net(), images(), exclude="0")
    assert verification.ok
    assert verification.audit.extent.endswith("save 1 layer left out as asked")
    model = net()
    plain = verify.outputs(model, images())
    fahooks.convert(model, "usf_sn", exclude="0")
    assert culprits(verify.verify(model, plain, images()).audit) == ["0.weight"]


def test_where_no_layer_has_a_rule_it_says_so():
    verification = verified(net(), images(), rule="bp")
    assert verification.ok
    assert verification.rules.extent == "no layer has a rule"


def test_a_model_that_only_runs_unconverted_is_told_and_not_raised():
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, input: Tensor) -> Tensor:
            if type(self.layer) is not nn.Linear:
                raise RuntimeError("a Linear\nis wanted")
            return self.layer(input)

    verification = verified(Picky(), torch.randn(3, 4))
    assert failed(verification) == ["forward unchanged", "rule in effect", "audit clean"]
    assert all(check.problems == (verify.Problem("model", "RuntimeError: a Linear is wanted"),) for check in verification.checks)


def test_a_model_without_gradients_at_its_outputs_fails():
    class Detached(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).detach()

    verification = verified(Detached(4, 4), torch.randn(3, 4))
    assert failed(verification) == ["rule in effect", "audit clean"]
    assert verification.rules.problems == (verify.Problem("model", "the backward pass never asks for its B"),)


def test_the_model_is_left_as_found():
    model, x = net(), images()
    model[1].eval()
    model[5].weight.requires_grad_(False)
    fahooks.convert(model, "fa")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(rule._forward_hooks) for rule in feedback_rules(model).values()]
    before = torch.get_rng_state()
    verification = verify.verify(model, verify.outputs(model, x), x)
    assert verification.ok
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not x.requires_grad
    assert [len(rule._forward_hooks) for rule in feedback_rules(model).values()] == hooks


@pytest.mark.parametrize("depth", [2, 20])
def test_it_costs_two_backward_passes_however_deep_the_model(depth: int):
    asked: list[None] = []

    def count(weight: Tensor) -> Tensor:
        asked.append(None)
        return weight.sign()

    assert verified(nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth))), torch.randn(3, 4), rule=count).ok
    assert len(asked) == 2 * depth


def test_it_prints_a_line_for_each_check_and_the_culprits_below():
    good, bad = verified(net(), images()), verified(nn.Sequential(Bypassing(4, 4)), torch.randn(3, 4))
    assert [line.split("  ")[0] for line in str(good).splitlines()] == ["forward unchanged", "rule in effect", "audit clean"]
    assert all("  ok  " in line for line in str(good).splitlines())
    lines = str(bad).splitlines()
    assert lines[1:3] == ["rule in effect     FAILED  1 problem", "    0: the backward pass never asks for its B"]
    assert lines[3] == "audit clean        FAILED  2 problems"
    assert lines[5].startswith("    0.weight: unrouted ") and "test_verify.py:" in lines[5]
    assert bad.as_dict()["rules"]["problems"] == ({"culprit": "0", "reason": "the backward pass never asks for its B"},)
    assert (bad.as_dict()["ok"], good.as_dict()["ok"]) == (False, True)
