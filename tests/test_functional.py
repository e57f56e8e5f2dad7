from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from fahooks import functional, reference

CONVOLUTIONS = [(dimensions, transposed) for dimensions in (1, 2, 3) for transposed in (False, True)]
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass
class Given:
    """A feedback matrix, as a rule holds it."""

    matrix: Tensor
    reaches_out = False

    def __call__(self, weight: Tensor) -> Tensor:
        return self.matrix


@dataclass
class Call:
    """One call of an operation, and a feedback matrix for it."""

    operation: str
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)
    matrix: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.matrix = torch.randn_like(self.weight)

    def plain(self, *tensors: Tensor | None) -> Tensor:
        return getattr(F, self.operation)(*tensors, **self.options)

    def routed(self, *tensors: Tensor | None) -> Tensor:
        return getattr(functional, self.operation)(*tensors, **self.options, feedback=Given(self.matrix))

    def surrogate(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.straight_through(getattr(F, self.operation), input, weight, bias, self.matrix, **self.options)

    def leaves(self) -> list[Tensor | None]:
        return [None if t is None else t.detach().clone().requires_grad_() for t in (self.input, self.weight, self.bias)]

    def learn(self, operation: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = self.leaves()
        output = operation(*leaves)
        torch.manual_seed(1)
        output.backward(torch.randn_like(output))
        named = zip(("input", "weight", "bias"), leaves, strict=True)
        return output.detach(), {name: leaf.grad for name, leaf in named if leaf is not None and leaf.grad is not None}


def present(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@st.composite
def linear_calls(draw: st.DrawFn) -> Call:
    sizes = st.integers(1, 3)
    leading = draw(st.lists(st.integers(0, 3), max_size=4))
    inward, outward = draw(sizes), draw(sizes)
    torch.manual_seed(draw(st.integers(0, 99)))
    bias = tensor(outward) if draw(st.booleans()) else None
    return Call("linear", tensor(*leading, inward), tensor(outward, inward), bias)


@st.composite
def convolution_calls(draw: st.DrawFn, dimensions: int, transposed: bool) -> Call:
    small = st.integers(1, 2)
    each = st.tuples(*[small] * dimensions)
    kernel = draw(st.tuples(*[st.integers(1, 3)] * dimensions))
    stride, dilation = (draw(st.one_of(small, each)) for _ in range(2))
    strides, dilations = (value if isinstance(value, tuple) else (value,) * dimensions for value in (stride, dilation))
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    padding: Any = draw(st.one_of(st.integers(0, min(reach) // 2), st.tuples(*[st.integers(0, r // 2) for r in reach])))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": draw(small)}
    if transposed:
        options["output_padding"] = draw(
            st.tuples(*[st.integers(0, max(s, d) - 1) for s, d in zip(strides, dilations, strict=True)])
        )
    elif draw(st.booleans()):
        options["padding"] = draw(st.sampled_from(["valid", "same"] if set(strides) == {1} else ["valid"]))
    inward, outward = draw(small) * options["groups"], draw(small) * options["groups"]
    batch = draw(st.sampled_from([(), (0,), (1,), (2,)]))
    torch.manual_seed(draw(st.integers(0, 99)))
    input = tensor(*batch, inward, *[r + 1 + draw(st.integers(0, 2)) for r in reach])
    first, second = (inward, outward) if transposed else (outward, inward)
    weight = tensor(first, second // options["groups"], *kernel)
    if batch and dimensions in CHANNELS_LAST and draw(st.booleans()):
        input, weight = (t.to(memory_format=CHANNELS_LAST[dimensions]) for t in (input, weight))
    bias = tensor(outward) if draw(st.booleans()) else None
    return Call(f"conv{'_transpose' if transposed else ''}{dimensions}d", input, weight, bias, options)


def one_of_each() -> list[Call]:
    """A plain call of every operation, of a size at which no gradient vanishes."""
    torch.manual_seed(0)
    calls = [Call("linear", tensor(3, 4), tensor(5, 4), tensor(5))]
    for dimensions, transposed in CONVOLUTIONS:
        weight = tensor(4, 3, *[3] * dimensions) if transposed else tensor(6, 2, *[3] * dimensions)
        name = f"conv{'_transpose' if transposed else ''}{dimensions}d"
        calls.append(
            Call(name, tensor(2, 4, *[6 - dimensions] * dimensions), weight, tensor(6), {"stride": 2, "padding": 1, "groups": 2})
        )
    return calls


@pytest.fixture(params=reference.OPERATIONS)
def call(request: pytest.FixtureRequest) -> Call:
    return next(call for call in one_of_each() if call.operation == request.param)


def assert_exact(call: Call) -> None:
    output, gradients = call.learn(call.routed)
    plain_output, plain_gradients = call.learn(call.plain)
    _, expected = call.learn(call.surrogate)
    assert torch.equal(output, plain_output)
    assert output.stride() == plain_output.stride()
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)
    # Whoever wants to keep elsewhere what autograd saves has a convolution made a function.
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(call.learn(call.routed), (output, gradients), rtol=0, atol=0)
    if call.input.numel() and output.numel():
        assert not torch.allclose(gradients["input"], plain_gradients["input"]), "control: B sends what W sends"


@settings(max_examples=40)
@given(linear_calls())
def test_linear_equals_the_oracle(call: Call) -> None:
    assert_exact(call)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("dimensions", "transposed"), CONVOLUTIONS)
def test_convolutions_equal_the_oracle(dimensions: int, transposed: bool) -> None:
    settings(max_examples=40)(given(convolution_calls(dimensions, transposed))(assert_exact))()


def test_with_w_as_feedback_gradients_are_the_derivative(call: Call) -> None:
    routed = getattr(functional, call.operation)

    def true(*tensors: Tensor | None) -> Tensor:
        return routed(*tensors, **call.options, feedback=lambda weight: weight)

    assert torch.autograd.gradcheck(true, present(call.leaves()), fast_mode=True)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(call.routed, present(call.leaves()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_w_as_feedback_gradients_have_the_bits_of_torch(call: Call, dtype: torch.dtype) -> None:
    narrow = Call(call.operation, call.input.to(dtype), call.weight.to(dtype), None, call.options)
    narrow.matrix = narrow.weight
    torch.testing.assert_close(narrow.learn(narrow.routed), narrow.learn(narrow.plain), rtol=0, atol=0)
    narrow.matrix = narrow.weight * 2
    assert not torch.equal(narrow.learn(narrow.routed)[1]["input"], narrow.learn(narrow.plain)[1]["input"])


@pytest.mark.parametrize("transposed", [(), (0,), (1,), (0, 1)], ids=["neither", "input", "weight", "both"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_has_the_bits_of_torch_in_every_layout(transposed: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    shapes = [(7, 33), (16, 33)]
    x, w = (torch.randn(*shape[::-1]).t() if i in transposed else torch.randn(*shape) for i, shape in enumerate(shapes))
    same = Call("linear", x, w, torch.randn(16) if bias else None)
    same.matrix = same.weight
    (output, gradients), (plain_output, plain_gradients) = same.learn(same.routed), same.learn(same.plain)
    torch.testing.assert_close((output, gradients), (plain_output, plain_gradients), rtol=0, atol=0)
    assert {n: g.stride() for n, g in gradients.items()} == {n: g.stride() for n, g in plain_gradients.items()}


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3), (1, 2, 5, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_can_be_overwritten(shape: tuple[int, ...], bias: bool) -> None:
    x, weight, matrix = (torch.randn(*s).double() for s in (shape, (4, 3), (4, 3)))
    x.requires_grad_()
    output = functional.linear(x, weight, torch.zeros(4).double() if bias else None, feedback=Given(matrix))
    output += 1
    output.mul_(2).sum().backward()
    torch.testing.assert_close(x.grad, (2 * matrix.sum(0)).expand(shape))


@pytest.mark.parametrize("equation", ["ni,oi->no", "ni,oi->on"])
def test_products_can_be_overwritten(equation: str) -> None:
    x, weight, matrix = (torch.randn(*s).double() for s in ((2, 3), (4, 3), (4, 3)))
    x.requires_grad_()
    output = functional.product(partial(torch.einsum, equation), x, weight, place=1, feedback=Given(matrix))
    output.mul_(2).sum().backward()
    torch.testing.assert_close(x.grad, (2 * matrix.sum(0)).expand(2, 3))


def test_takes_positions_and_keywords_as_torch_does(call: Call) -> None:
    order = ["stride", "padding", "output_padding", "groups", "dilation"]
    if "transpose" not in call.operation:
        order = ["stride", "padding", "dilation", "groups"]
    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
    positions = [{**defaults, **call.options}[name] for name in order] if call.options else []
    for operation, route in ((getattr(F, call.operation), {}), (getattr(functional, call.operation), {"feedback": torch.sign})):
        x, w, b = call.leaves()
        by_position = operation(x, w, b, *positions, **route)
        by_keyword = operation(input=x, weight=w, bias=b, **call.options, **route)
        assert torch.equal(by_position, call.plain(x, w, b))
        assert torch.equal(by_keyword, call.plain(x, w, b))


def test_every_operation_of_the_oracle_has_a_route(call: Call) -> None:
    assert functional.ROUTES[getattr(F, call.operation)] is getattr(functional, call.operation)
    assert len(functional.ROUTES) == len(reference.OPERATIONS) == len(one_of_each())


def test_feedback_is_asked_for_in_the_backward_pass_only_and_once(call: Call) -> None:
    asked: list[Tensor] = []

    def feedback(weight: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        asked.append(weight)
        return weight

    output = getattr(functional, call.operation)(*call.leaves(), **call.options, feedback=feedback)
    assert asked == []
    output.sum().backward()
    assert len(asked) == 1
    assert torch.equal(asked[0], call.weight)


def test_without_an_error_to_send_feedback_is_not_asked_for(call: Call) -> None:
    def refuse(weight: Tensor) -> Tensor:
        raise RuntimeError("no error is sent")

    routed = getattr(functional, call.operation)
    x, w, b = present(call.leaves())
    routed(x.detach(), w, b, **call.options, feedback=refuse).sum().backward()
    torch.testing.assert_close(w.grad, torch.autograd.grad(call.plain(x, w, b).sum(), w)[0], rtol=0, atol=0)
    with torch.no_grad():
        assert not routed(x, w, b, **call.options, feedback=refuse).requires_grad
    with pytest.raises(RuntimeError, match="no error is sent"):
        routed(x, w, b, **call.options, feedback=refuse).sum().backward()


def test_frozen_weight_and_bias_get_no_gradient(call: Call) -> None:
    x, w, b = (None if leaf is None else leaf.detach() for leaf in call.leaves())
    x = call.input.clone().requires_grad_()
    call.routed(x, w, b).sum().backward()
    assert x.grad is not None
    assert w is not None and w.grad is None and b is not None and b.grad is None
    _, gradients = call.learn(call.routed)
    assert gradients.keys() == {"input", "weight", "bias"}, "control: thawed, they get one"


def test_feedback_of_a_wrong_shape_is_refused(call: Call) -> None:
    call.matrix = call.matrix[:1]
    output = call.routed(*call.leaves())
    shapes = rf"shape \(1, .*\).* for a weight of shape \({call.weight.shape[0]}, "
    with pytest.raises(ValueError, match=shapes):
        output.sum().backward()


def test_second_derivatives_are_refused(call: Call) -> None:
    x, w, b = present(call.leaves())
    with pytest.raises(RuntimeError, match="feedback matrices have no second derivatives.*fahooks.backprop"):
        torch.autograd.grad(call.routed(x, w, b).square().sum(), x, create_graph=True)


def asking_for_a_function() -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Settings in which somebody stands about what autograd records, so that a convolution is a function of the core's own."""
    return {
        "saved tensors": lambda: torch.autograd.graph.save_on_cpu(),
        "anomalies": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    }


@pytest.mark.parametrize("setting", asking_for_a_function())
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_both_ways_of_a_convolution_give_the_same(call: Call, setting: str) -> None:
    if call.operation == "linear":
        pytest.skip("linear maps are functions always")

    def node(**route: Any) -> str:
        output = call.routed(*call.leaves())
        return output.grad_fn.name()  # pyright: ignore[reportOptionalMemberAccess]

    recorded = call.learn(call.routed)
    assert node() == "ConvolutionBackward0"
    with asking_for_a_function()[setting]():
        assert node() == "_ConvolutionBackward"
        torch.testing.assert_close(call.learn(call.routed), recorded, rtol=0, atol=0)


def test_a_weight_that_changes_before_the_backward_pass_is_refused(call: Call) -> None:
    x, w, b = present(call.leaves())
    output = call.routed(x, w, b)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation.*is at version 1"):
        output.sum().backward()


def test_a_second_backward_pass_needs_the_graph(call: Call) -> None:
    output = call.routed(*call.leaves()).sum()
    output.backward(retain_graph=True)
    output.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward()


def test_looking_at_a_node_is_no_backward_pass() -> None:
    call = next(call for call in one_of_each() if call.operation == "conv2d")
    x, w, b = call.leaves()
    node: Any = call.routed(x, w, b).grad_fn
    assert node._saved_weight is not None and w is not None
    assert torch.equal(node._saved_weight, w)


def test_a_function_that_reaches_what_keeps_an_output_does_not_keep_it_for_ever(call: Call) -> None:
    class Keeping:
        output: Tensor

    def kept() -> weakref.ref[Keeping]:
        keeping = Keeping()
        operation = getattr(functional, call.operation)
        keeping.output = operation(*call.leaves(), **call.options, feedback=lambda weight: keeping.output)
        return weakref.ref(keeping)

    seen = kept()
    gc.collect()
    assert seen() is None


def test_nothing_is_kept_of_a_pass_that_is_over(call: Call) -> None:
    x, w, b = call.leaves()
    output = call.routed(x, w, b)
    output.sum().backward()
    seen = weakref.ref(w)
    del x, w, b, output
    gc.collect()
    assert seen() is None


def test_function_transforms_are_refused(call: Call) -> None:
    with pytest.raises(RuntimeError, match="torch.func's transforms .* do not go through feedback"):
        torch.func.grad(lambda x: call.routed(x, call.weight, call.bias).sum())(call.input)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "same", "stride": 2}, r"padding='same' needs stride 1, got stride \(2, 2\)"),
        ({"padding": "mirror"}, "padding must be 'valid', 'same' or numbers, got 'mirror'"),
    ],
)
def test_padding_that_torch_refuses_is_refused(options: dict[str, Any], message: str) -> None:
    call = Call("conv2d", tensor(1, 2, 5, 5), tensor(2, 2, 3, 3), None, options)
    with pytest.raises(RuntimeError):
        call.plain(*call.leaves())
    with pytest.raises(ValueError, match=message):
        call.routed(*call.leaves())


def test_autocast_casts_as_torch_does(call: Call) -> None:
    x, w, b = (t.detach().float() for t in present(call.leaves()))
    single = Call(call.operation, x, w, b, call.options)
    seen: list[torch.dtype] = []

    def feedback(weight: Tensor) -> Tensor:
        seen.append(weight.dtype)
        return weight

    def autocast(operation: Callable[..., Tensor], **route: Any) -> Callable[..., Tensor]:
        def run(*tensors: Tensor | None) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return operation(*tensors, **single.options, **route)

        return run

    output, gradients = single.learn(autocast(getattr(functional, call.operation), feedback=feedback))
    plain_output, plain_gradients = single.learn(autocast(getattr(F, call.operation)))
    assert seen == [torch.bfloat16] and output.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    torch.testing.assert_close((output, gradients), (plain_output, plain_gradients), rtol=0, atol=0)
    assert not torch.equal(output.float(), single.plain(single.input, single.weight, single.bias)), "control: nothing was cast"


def test_autocast_leaves_float64_alone(call: Call) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert call.routed(*call.leaves()).dtype == call.plain(*call.leaves()).dtype


def test_runs_on_the_meta_device(call: Call) -> None:
    call.matrix = call.matrix.to("meta")
    leaves = [None if t is None else t.detach().to("meta").requires_grad_() for t in call.leaves()]
    output = call.routed(*leaves)
    output.sum().backward()
    assert output.shape == call.plain(*call.leaves()).shape
    assert all(leaf is None or leaf.grad is not None for leaf in leaves)
