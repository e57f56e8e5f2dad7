"""The core: convolutions, linear maps and products whose backward sends the error through a feedback matrix B instead of W.

Forward, weight gradient and bias gradient are those of torch; only the gradient with respect to the input differs
(Moskovitz et al. 2018, eq. 3):

    delta_below = B^T delta      instead of      W^T delta

`feedback` is anything that maps the effective weight W of the call to B, of W's shape: usually a `fahooks.Rule`. It is
called in the backward pass, so that at most one layer's B exists at a time. Its readable twin is `fahooks.reference`.

A convolution is recorded by torch itself, and its node then finds B where it saved W (`_hand_over`). Whatever stands between
autograd and that node, a compiler, checkpointing, anomaly mode, gets an autograd function that does the same, as linear maps and
products are always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

Feedback = Callable[[Tensor], Tensor]


def _once_differentiable(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Refuse a graph of the backward pass, where torch's decorator of that name refuses what is made of it, and costs time."""

    def refusing(ctx: Any, grad_output: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(_NO_GRAPH)
        return backward(ctx, grad_output)

    return refusing


_NO_GRAPH = (
    "feedback matrices have no second derivatives, which create_graph=True asks for: run the forward pass inside "
    "fahooks.backprop(model) for those of the true gradient"
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, feedback: Feedback) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.feedback = feedback
        return _owned(F.linear(input, weight, bias))

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows, grad_rows = input.reshape(-1, input.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            matrix = feedback_matrix(ctx.feedback, weight)
            grad_input = _product(grad_rows, matrix, like=rows).reshape(input.shape)
        if needs_weight:
            grad_weight = _product(rows.t(), grad_rows, like=weight.t()).t()
        if needs_bias:
            grad_bias = grad_rows.sum(0)
        return grad_input, grad_weight, grad_bias, None


def _product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """The product left @ right in the memory layout of `like`, whose gradient it is: as torch does it, to the last bit."""
    if like.stride(0) == 1 and like.stride(1) == like.shape[0]:
        return (right.t() @ left.t()).t()
    return left @ right


def _owned(output: Tensor) -> Tensor:
    """The output of a function, no view of another tensor: autograd lets nobody overwrite one that a function returns.

    einsum makes views, and so does F.linear in some versions of torch.
    """
    return output.data if not torch.compiler.is_compiling() and output._is_view() else output


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, feedback: Feedback, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.feedback = feedback
        ctx.settings = settings
        ctx.bias_sizes = None if bias is None else bias.shape
        if is_dynamo_compiling() and not torch.compiler.is_exporting() and type(weight) is nn.Parameter:
            weight = _set_apart(weight)
        return torch.convolution(input, weight, bias, *settings)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        # The weight gradient does not read the weight slot, so that one call with B in it yields all three gradients.
        matrix = feedback_matrix(ctx.feedback, weight) if needed[0] else weight
        gradients = torch.ops.aten.convolution_backward.default(grad_output, input, matrix, ctx.bias_sizes, *ctx.settings, needed)
        return *gradients, None, None


def _set_apart(weight: nn.Parameter) -> Tensor:
    """W for the convolution of a compiled forward pass, while W itself is what the backward pass reads.

    Inductor lays a convolution's weight out as channels_last, and in place of W saves that copy, except where it sees W taken for
    another tensor's storage. From there a sign rule would read a second copy of all weights, and mix its layout with that of
    `B_0`. Shape and strides become constants of the graph, which dynamo compiles anew where they change; an exported program
    would keep them.
    """
    return weight.as_strided(weight.shape, weight.stride())


RECORDED = "ConvolutionBackward0"
"""What autograd calls the node of a convolution that it recorded itself."""


def _hand_over(output: Tensor, weight: Tensor, feedback: Feedback) -> None:
    """Have the node that torch recorded for a convolution find B where it saved W, which it reads for the input's gradient only.

    What `_Convolution` does, in a fraction of its time: a function in Python takes as long as a small layer.
    """
    version = weight._version

    def unpack(_: int) -> Tensor:
        if torch.is_grad_enabled():
            if torch._C._current_graph_task_id() == -1:  # pyright: ignore[reportAttributeAccessIssue]
                return weight  # somebody looks at the node
            raise RuntimeError(_NO_GRAPH)
        if weight._version != version:
            raise RuntimeError(
                "a weight needed for the backward pass has been modified by an inplace operation: it is at version "
                f"{weight._version}, expected version {version}"
            )
        return feedback_matrix(feedback, weight)

    node: Any = output.grad_fn
    node._raw_saved_weight.register_hooks(id, unpack)  # a number is kept in place of W


def _records_alone(input: Tensor, weight: Tensor, feedback: Any) -> bool:
    """Whether autograd records a call as it is, with nobody about who asks for what it saves, or for a function."""
    return not (
        is_dynamo_compiling()
        or getattr(feedback, "reaches_out", True)  # a plain function too: see `fahooks.Rule.reaches_out`
        or torch.is_anomaly_enabled()  # `fahooks.audit` reads the rule off the function's node
        or _saved_tensors_hooks(True)  # activation checkpointing, offloading
        or _transforms()
        or forward_ad._current_level >= 0
        or type(weight) not in ORDINARY
        or type(input) not in ORDINARY
    )


ORDINARY = (Tensor, nn.Parameter)
"""The types of tensors that are what they seem; those of subclasses, and of most that is traced, are not."""

# Looked up once, since between two layers all that Python reads is gone from the caches.
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
"""Asked where a compiled function must not do as an eager one; `torch.compiler.is_compiling` takes longer.

It says no where something else traces, torch.export or make_fx, whose tensors either are not `ORDINARY` or are computed with as
in eager mode.
"""
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
_transforms = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Callable[..., Tensor], place: int, feedback: Feedback, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.operation, ctx.place, ctx.feedback = operation, place, feedback
        return _owned(operation(*operands))

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        operands: list[Tensor] = [operand.detach() for operand in ctx.saved_tensors]
        needed = ctx.needs_input_grad[3:]
        if any(need for at, need in enumerate(needed) if at != ctx.place):
            operands[ctx.place] = feedback_matrix(ctx.feedback, operands[ctx.place]).detach()
        # The gradient of W does not read W, in which the operation is linear: with B in its place one pass yields all of them.
        with torch.enable_grad():
            operands = [operand.requires_grad_(need) for operand, need in zip(operands, needed, strict=True)]
            output = ctx.operation(*operands)
        wanted = [operand for operand in operands if operand.requires_grad]
        gradients = iter(torch.autograd.grad(output, wanted, grad_output))
        return None, None, None, *(next(gradients) if need else None for need in needed)


def feedback_matrix(feedback: Feedback, weight: Tensor) -> Tensor:
    """B for the effective `weight` of a call, checked to have its shape and dtype.

    Raises:
        ValueError: B is no tensor, or has another shape or dtype than the weight; the message names the rule and its layer.
    """
    matrix = feedback(weight)
    if getattr(matrix, "shape", None) != weight.shape or matrix.dtype != weight.dtype:
        raise ValueError(_no_feedback_matrix(matrix, feedback, weight))
    return matrix


def _no_feedback_matrix(given: Any, feedback: Any, weight: Tensor) -> str:
    """What is wrong with what a rule or function returned, by its name and that of its layer."""
    who = getattr(feedback, "label", "") or getattr(feedback, "__name__", type(feedback).__name__)
    layer = getattr(feedback, "name", "")
    who = f"rule {who!r} of {layer!r}" if layer else f"rule {who!r}"
    wanted = f"for a weight of shape {tuple(weight.shape)} and {weight.dtype}"
    if not isinstance(given, Tensor):
        return f"{who} returned a {type(given).__name__} in place of a feedback matrix, {wanted}"
    return f"{who} returned a feedback matrix of shape {tuple(given.shape)} and {given.dtype}, {wanted}"


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, feedback: Feedback) -> Tensor:
    """`torch.nn.functional.linear` with B in the backward pass.

    Arguments:
        input: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features] or None.
        feedback: maps weight to B, of the same shape.

    Returns:
        [..., out_features], the same bits as torch's.
    """
    if not _sends_error(input):
        return F.linear(input, weight, bias)
    if _is_any_autocast_enabled():
        input, weight, bias = _autocast(input, weight, bias)
    return _apply(_Linear, input, weight, bias, feedback)


def product(operation: Callable[..., Tensor], *operands: Tensor, place: int, feedback: Feedback) -> Tensor:
    """An operation that is linear in W, such as `torch.matmul`, with B in the backward pass, which computes it once more.

    Arguments:
        operation: called with the operands alone.
        operands: its tensors, signals and one weight W.
        place: the index of W among them.
        feedback: maps W to B, of the same shape.

    Returns:
        operation(*operands).
    """
    if not any(_sends_error(operand) for at, operand in enumerate(operands) if at != place):
        return operation(*operands)
    return _apply(_Product, operation, place, feedback, *operands)


def _convolve(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    feedback: Feedback,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
) -> Tensor:
    stride, dilation = _expand(stride, dimensions), _expand(dilation, dimensions)
    if isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, padding, stride, dilation)
    unbatched = input.dim() == dimensions + 1
    if unbatched:
        input = input.unsqueeze(0)
    settings = (
        stride,
        _expand(padding, dimensions),
        dilation,
        transposed,
        _expand(output_padding, dimensions),
        groups,
    )
    if _is_any_autocast_enabled():
        input, weight, bias = _autocast(input, weight, bias)
    if _records_alone(input, weight, feedback):
        output = torch.convolution(input, weight, bias, *settings)
        _hand_over(output, weight, feedback)
    else:
        output = _apply(_Convolution, input, weight, bias, feedback, settings)
    return output.squeeze(0) if unbatched else output


def _make_convolution(dimensions: int, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        feedback: Feedback,
    ) -> Tensor:
        if not _sends_error(input):
            return plain(input, weight, bias, stride, padding, dilation, groups)
        return _convolve(dimensions, input, weight, bias, feedback, stride, padding, dilation, groups)

    return _document(convolution, plain)


def _make_transposed(dimensions: int, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def transposed_convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
        *,
        feedback: Feedback,
    ) -> Tensor:
        if not _sends_error(input):
            return plain(input, weight, bias, stride, padding, output_padding, groups, dilation)
        return _convolve(dimensions, input, weight, bias, feedback, stride, padding, dilation, groups, True, output_padding)

    return _document(transposed_convolution, plain)


def _document(function: Callable[..., Tensor], plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    function.__name__ = function.__qualname__ = plain.__name__
    function.__doc__ = f"`torch.nn.functional.{plain.__name__}` with B in the backward pass; see `linear` for `feedback`."
    return function


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    try:
        return function.apply(*args)
    except RuntimeError as error:
        if "setup_context" not in str(error):
            raise
        # Functions that torch.func can transform cost sixteen times as much a call.
        raise RuntimeError(
            "torch.func's transforms (grad, vmap, jacrev ...) do not go through feedback matrices: use torch.autograd.grad, "
            "or for true gradients call them inside fahooks.backprop(model)"
        ) from error


def _sends_error(input: Tensor) -> bool:
    return torch.is_grad_enabled() and input.requires_grad


def _expand(value: int | Sequence[int], dimensions: int) -> Sequence[int]:
    if isinstance(value, int):
        return (value,) * dimensions
    return tuple(value) * dimensions if len(value) == 1 else value


def _resolve_padding(
    input: Tensor, weight: Tensor, padding: str, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Sequence[int]]:
    """Numeric padding for "valid" and "same"; what "same" needs on one side only is padded here, as torch does."""
    if padding == "valid":
        return input, [0] * len(dilation)
    if padding != "same":
        raise ValueError(f"padding must be 'valid', 'same' or numbers, got {padding!r}")
    if any(step != 1 for step in stride):
        raise ValueError(f"padding='same' needs stride 1, got stride {tuple(stride)}: give the padding in numbers")
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        excess = [amount for total in reversed(totals) for amount in (0, total % 2)]
        input = F.pad(input, excess)
    return input, [total // 2 for total in totals]


def _autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would: inside an autograd function it no longer could record the casts.

    Called where autocast is on for any device: to ask that first is quicker.
    """
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.dtype in _AUTOCAST_FROM else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)


_AUTOCAST_FROM = (torch.float32, torch.float16, torch.bfloat16)

conv1d = _make_convolution(1, F.conv1d)
conv2d = _make_convolution(2, F.conv2d)
conv3d = _make_convolution(3, F.conv3d)
conv_transpose1d = _make_transposed(1, F.conv_transpose1d)
conv_transpose2d = _make_transposed(2, F.conv_transpose2d)
conv_transpose3d = _make_transposed(3, F.conv_transpose3d)

ROUTES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: linear,
    F.conv1d: conv1d,
    F.conv2d: conv2d,
    F.conv3d: conv3d,
    F.conv_transpose1d: conv_transpose1d,
    F.conv_transpose2d: conv_transpose2d,
    F.conv_transpose3d: conv_transpose3d,
}
"""Every torch function with a weight that the core replaces; keys and values take the same arguments, plus `feedback`."""
