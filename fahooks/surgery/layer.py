"""What a converted layer is: its class, made from the plain one, and how the calls inside its forward reach the core."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fahooks import functional
from fahooks.plugins import InputError
from fahooks.rules.base import Call, DirectRule, Layout


class FeedbackLayer(nn.Module):
    """The mixin of every converted layer, leftmost among its bases.

    Attributes:
        feedback: the layer's rule; for a module with several weights of its own (attention), an `nn.ModuleDict` of rules by
            parameter name.
        feedback_enabled: False inside `fahooks.backprop`.
        functional_weights: for a module that uses weights functionally, their names (of its own or of children); else None.
        at_output: whether it is a block, at whose output the rule sends its error, with backpropagation inside.
        one_call: for a class whose forward is one call of the core and nothing else, that call; else None.
    """

    feedback: nn.Module
    feedback_enabled: bool
    functional_weights: tuple[str, ...] | None
    at_output: bool
    one_call: Callable[[Tensor, Tensor, functional.Feedback], Tensor] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward, its weights' calls routed through the feedback rule where gradients are recorded."""
        if not (self.feedback_enabled and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        if self.functional_weights is not None and not self._sends_error(args, kwargs):
            return super().forward(*args, **kwargs)
        # A module looks for its parts in these dictionaries last: asking them takes a fraction of the time.
        rule: Any = self._modules.get("feedback")
        if self.at_output:
            return rule.cut(super().forward(*args, **kwargs))
        if self.one_call is not None and self.functional_weights is None and len(args) == 1 and not kwargs:
            if not isinstance(rule, DirectRule):
                weight: Any = self._parameters.get("weight")
                if weight is None or weight.shape != rule.weight_shape:
                    weight = self.weight
                    rule = self.feedback_for(weight)
                if rule is not None:
                    return self.one_call(args[0], weight, rule)
        if self._uses_parametrized_weights():
            # A parametrization computes a new tensor each time it is asked: kept, it is known again where it is used. torch's
            # attention asks for its packed projection three times a pass in training: spectral_norm then moves once, not thrice.
            with parametrize.cached():
                return self._routed_forward(*args, **kwargs)
        return self._routed_forward(*args, **kwargs)

    def _routed_forward(self, *args: Any, **kwargs: Any) -> Any:
        with Routing(self):
            return super().forward(*args, **kwargs)

    def feedback_for(self, weight: Tensor) -> functional.Feedback | None:
        """What maps the weight of one call to its feedback matrix; None where the call is not this layer's to route."""
        if self.functional_weights is None:
            rule: Any = self.feedback
            if weight.shape == rule.weight_shape:
                return rule if self._owns(weight) else None
            if weight is self._parameters.get("weight"):
                raise InputError(
                    f"{type(self).__name__}: the weight was replaced by one of shape {tuple(weight.shape)}, "
                    f"and the feedback matrix has shape {tuple(rule.weight_shape)}: call fahooks.convert again"
                )
            return None
        for name in self.functional_weights:
            owner, attribute, rule = functional_weight(self, name)
            if rule is not None and weight is getattr(owner, attribute):
                return rule
        return None

    def _owns(self, weight: Tensor) -> bool:
        """Whether a weight is this layer's parameter or made of it; another parameter is not."""
        if weight is self._parameters.get("weight") or not isinstance(weight, nn.Parameter):
            return True
        if parametrize.is_parametrized(self, "weight"):
            parametrizations: Any = self.parametrizations
            return any(weight is original for original in parametrizations["weight"].parameters())
        return False

    def _sends_error(self, args: Any, kwargs: Any) -> bool:
        """False where nothing asks for a gradient: attention may then take torch's fast path, which a mode would close."""
        inputs = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return any(tensor.requires_grad for tensor in itertools.chain(self.parameters(), inputs))

    def _uses_parametrized_weights(self) -> bool:
        names = self.functional_weights or ()
        return any(parametrize.is_parametrized(functional_weight(self, name)[0]) for name in names)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the plain class: the class with feedback is made anew, and can not be imported by name."""
        return _restore, (plain_class(type(self)),), self.__getstate__()


class Routing(TorchFunctionMode):
    """While active, sends the calls that use the layer's weights to the core."""

    def __init__(self, layer: FeedbackLayer) -> None:
        self.layer = layer
        self.parts: list[tuple[Tensor, functional.Feedback]] = []
        self.kernels: list[tuple[Tensor, functional.Feedback]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        core = functional.ROUTES.get(func)
        if core is not None:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            feedback = self.feedback_for(weight)
            if feedback is None and func is not F.linear:
                feedback = _found(weight, self.kernels)
            if feedback is not None:
                return self.call(func, feedback, *args, **kwargs)
        elif func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention_forward(*args, **kwargs)
        elif self.layer.functional_weights is not None and func in _TAKES_PARTS:
            return self.take_parts(func, *args, **kwargs)
        elif self.layer.functional_weights is not None and func in PRODUCTS:
            return self.multiply(func, args, kwargs)
        return func(*args, **kwargs)

    def call(self, func: Callable[..., Tensor], feedback: functional.Feedback, *args: Any, **kwargs: Any) -> Tensor:
        """Call the core in place of `func`; a direct rule decides itself what is called."""
        core, rule = functional.ROUTES[func], rule_of(feedback)
        if not isinstance(rule, DirectRule):
            return core(*args, **kwargs, feedback=feedback)
        input, *others = args if args else (kwargs.pop("input"),)
        if not input.requires_grad or input.numel() == 0:
            return func(input, *others, **kwargs)
        return rule.around(
            Call(
                plain=lambda x: func(x, *others, **kwargs),
                routed=lambda x: core(x, *others, **kwargs, feedback=feedback),
                layout=self.layout(func),
                unbatched=input.dim() == DIMENSIONS.get(func),
            ),
            input,
        )

    def layout(self, func: Callable[..., Tensor]) -> Layout:
        """How the input of a call of `func` lies."""
        if func is not F.linear:
            return "channels first"
        return "sequence first" if isinstance(self.layer, nn.MultiheadAttention) else "channels last"

    def feedback_for(self, weight: Tensor) -> functional.Feedback | None:
        """The layer's feedback for a weight, or for a part that was taken of one."""
        part = _found(weight, self.parts)
        return self.layer.feedback_for(weight) if part is None else part  # some versions of torch can not trace `or` here

    def take_parts(self, func: Callable[..., Any], whole: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call `func`; where it takes parts of a weight, or turns it round, calls that use them get the same of B."""
        taken = func(whole, *args, **kwargs)
        for feedback, noted in ((self.feedback_for(whole), self.parts), (_found(whole, self.kernels), self.kernels)):
            if feedback is not None:
                for index, part in enumerate(_as_parts(taken)):
                    take = (func, args, kwargs, index)
                    noted.append((part, partial(_part_of_feedback, feedback, whole.detach(), take)))
        return taken

    def multiply(self, func: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Call a product; with B in its backward pass where a weight is an operand."""
        flat, form = pytree.tree_flatten((args, kwargs))
        places = [at for at, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
        feedbacks = [self.feedback_for(flat[at]) for at in places]
        weights = [place for place, feedback in enumerate(feedbacks) if feedback is not None]
        if len(weights) != 1:
            return func(*args, **kwargs)
        place = weights[0]
        feedback = cast(functional.Feedback, feedbacks[place])

        def operation(*operands: Tensor) -> Tensor:
            filled = list(flat)
            for at, operand in zip(places, operands, strict=True):
                filled[at] = operand
            positional, named = pytree.tree_unflatten(filled, form)
            return func(*positional, **named)

        operands = [flat[at] for at in places]
        rule = rule_of(feedback)
        if isinstance(rule, DirectRule) and any(o.requires_grad for i, o in enumerate(operands) if i != place):
            raise InputError(
                f"{rule.label}: {rule.name!r} is used in a {getattr(func, '__name__', 'product')}, and direct rules serve linear "
                "maps and convolutions only: leave it to backpropagation (exclude=) or give it another rule"
            )
        product = functional.product(operation, *operands, place=place, feedback=feedback)
        constants = [operand.detach() for operand in operands]

        def mixed(matrix: Tensor) -> Tensor:
            return operation(*(matrix if i == place else constant for i, constant in enumerate(constants)))

        # What a signal makes of weights may be a kernel: that of a convolution whose weights are mixed for every sample.
        take = (mixed, (), {}, 0)
        self.kernels.append((product, partial(_part_of_feedback, feedback, constants[place], take)))
        return product


DIMENSIONS = {
    F.conv1d: 2,
    F.conv2d: 3,
    F.conv3d: 4,
    F.conv_transpose1d: 2,
    F.conv_transpose2d: 3,
    F.conv_transpose3d: 4,
}
"""How many dimensions an unbatched input has."""


def rule_of(feedback: functional.Feedback) -> functional.Feedback:
    """The rule that a call asks for B, also where it takes a part of B."""
    while isinstance(feedback, partial):
        feedback = feedback.args[0]
    return feedback


_TAKES_PARTS = frozenset(
    {
        Tensor.chunk,
        Tensor.split,
        Tensor.__getitem__,
        Tensor.t,
        Tensor.transpose,
        Tensor.permute,
        Tensor.view,
        Tensor.reshape,
        Tensor.flatten,
        Tensor.expand,
        Tensor.unsqueeze,
        Tensor.squeeze,
        *(getattr(Tensor, name).__get__ for name in ("T", "mT")),
        F.interpolate,
        torch.chunk,
        torch.split,
        torch.t,
        torch.transpose,
        torch.permute,
        torch.reshape,
        torch.flatten,
    }
)
"""What takes parts of a weight, or turns it round, and does the same to B."""

PRODUCTS = frozenset(
    {
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
        torch.einsum,
        torch.bilinear,
        F.bilinear,
        Tensor.matmul,
        Tensor.mm,
        Tensor.bmm,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
    }
)
"""Products of two operands, in which an adapter may name a weight."""


OneCall = Callable[[Any, Tensor, Tensor, functional.Feedback], Tensor]


def _call_linear(layer: Any, input: Tensor, weight: Tensor, feedback: functional.Feedback) -> Tensor:
    return functional.ROUTES[F.linear](input, weight, _bias(layer), feedback=feedback)


def _make_call(convolution: Callable[..., Tensor]) -> OneCall:
    def call(layer: Any, input: Tensor, weight: Tensor, feedback: functional.Feedback) -> Tensor:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            input, padding = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        core = functional.ROUTES[convolution]
        return core(input, weight, _bias(layer), layer.stride, padding, layer.dilation, layer.groups, feedback=feedback)

    return call


def _bias(layer: Any) -> Tensor | None:
    """As `layer.bias`, for which a module looks everywhere else first."""
    parameters = layer._parameters
    return parameters["bias"] if "bias" in parameters else layer.bias


ONE_CALL: dict[type[nn.Module], OneCall] = {
    nn.Linear: _call_linear,
    nn.Conv1d: _make_call(F.conv1d),
    nn.Conv2d: _make_call(F.conv2d),
    nn.Conv3d: _make_call(F.conv3d),
}
"""Layers whose forward is one call of the core. A mode, which finds that call in any forward, takes as long as a small layer."""


def _one_call(cls: type[nn.Module]) -> OneCall | None:
    """The call that a class does in its forward, if it inherits that of a layer in `ONE_CALL`."""

    def does_as(plain: Any) -> bool:
        return all(getattr(cls, name, None) is getattr(plain, name, None) for name in ("forward", "_conv_forward"))

    return next((call for plain, call in ONE_CALL.items() if does_as(plain)), None)


def _found(tensor: Tensor, noted: Sequence[tuple[Tensor, functional.Feedback]]) -> functional.Feedback | None:
    return next((feedback for other, feedback in noted if tensor is other), None)


def _as_parts(taken: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (taken,) if isinstance(taken, Tensor) else taken


def _part_of_feedback(rule: functional.Feedback, packed: Tensor, take: tuple[Any, ...], part: Tensor) -> Tensor:
    """The part of a packed weight's B that stands where `part` stands in the weight."""
    func, args, kwargs, index = take
    return _as_parts(func(functional.feedback_matrix(rule, packed), *args, **kwargs))[index].to(part.dtype)


# A mode sees this Python function as one opaque call. Without its own check for overrides, its inner calls are seen.
_multi_head_attention_forward = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def functional_weight(layer: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module | None]:
    """Owner, attribute and rule (None where not converted) of the weight called `name` relative to `layer`."""
    path, _, attribute = name.rpartition(".")
    owner = layer.get_submodule(path)
    rule = owner._modules.get("feedback")
    if owner is layer and isinstance(rule, nn.ModuleDict):
        rule = rule[attribute] if attribute in rule else None
    return owner, attribute, rule


_feedback_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()


def feedback_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`Feedback<Class>` for a layer class; one for each class, so that compiled guards on the type hold."""
    made = _feedback_classes.get(cls)
    if made is None:
        namespace = {
            "__module__": cls.__module__,
            "__doc__": cls.__doc__,
            "plain_class": cls,
            "one_call": _one_call(cls),
        }
        made = types.new_class(f"Feedback{cls.__name__}", (FeedbackLayer, cls), exec_body=lambda ns: ns.update(namespace))
        _feedback_classes[cls] = made
    return made


def with_feedback(module: nn.Module) -> type[nn.Module]:
    """The class for a module once converted; below the class that a parametrization derived, which stays outermost."""
    cls = type(module)
    if parametrize.is_parametrized(module) and len(cls.__bases__) == 1:
        plain = cls.__bases__[0]
        made = feedback_class(plain)
        return _derive(cls, (made,), cls.__name__.replace(plain.__name__, made.__name__))
    return feedback_class(cls)


def without_feedback(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with its feedback class replaced by the plain one, also below classes that torch derived from it later."""
    if "plain_class" in cls.__dict__:
        return cls.__dict__["plain_class"]
    if not issubclass(cls, FeedbackLayer):
        return cls
    bases = tuple(without_feedback(base) for base in cls.__bases__)
    return _derive(cls, bases, cls.__name__.replace("Feedback", "", 1))


def _derive(cls: type[nn.Module], bases: tuple[type[nn.Module], ...], name: str) -> type[nn.Module]:
    """A copy of `cls` on other bases."""
    namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return types.new_class(name, bases, exec_body=lambda ns: ns.update(namespace))


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The layer class that a feedback class, or a class that others derived from one, was made for."""
    return next(c.__dict__["plain_class"] for c in cls.__mro__ if "plain_class" in c.__dict__)


def _restore(cls: type[nn.Module]) -> nn.Module:
    made = feedback_class(cls)
    return made.__new__(made)


def swap(module: nn.Module) -> FeedbackLayer:
    """Make `module`, the same object, a feedback layer with no rule yet; a feedback layer stays as it is."""
    layer = cast(FeedbackLayer, module)
    if not isinstance(module, FeedbackLayer):
        module.__class__ = with_feedback(module)
        layer.feedback_enabled = True
        layer.functional_weights = None
        layer.at_output = False
    return layer


def unswap(layer: FeedbackLayer) -> None:
    """Make `layer` what it was before `swap`, and take its rule away."""
    layer.__class__ = without_feedback(type(layer))  # pyright: ignore[reportAttributeAccessIssue]
    layer._modules.pop("feedback", None)
    for attribute in ("feedback_enabled", "functional_weights", "at_output"):
        del layer.__dict__[attribute]
