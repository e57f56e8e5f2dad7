"""torch.compile, always with fullgraph=True: one graph break would be an error."""

from __future__ import annotations

import copy
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fahooks

Learn = Callable[..., Any]
M = TypeVar("M", bound=nn.Module)

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="inductor needs g++ and Python's headers (Debian: g++, python3-dev)",
)

ALL_RULES = {"0": "sham", "2": "usf", "4": "usf_init", "7": "usf_sn", "9": "fa"}


class Attention(nn.MultiheadAttention):
    """A signal attends to the first half of itself: the packed projection is split in two."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, x[:, :2], x[:, :2], need_weights=False)[0]


class Attentions(nn.Module):
    """Every way in which attention splits its packed projection, and separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.memory = nn.MultiheadAttention(8, 2, batch_first=True)
        self.three = nn.MultiheadAttention(8, 2, batch_first=True)
        self.separate = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        memory = x[:, :3]
        x = x + self.memory(x, memory, memory, need_weights=False)[0]
        x = x + self.three(x, memory, memory.tanh())[0]
        return x + self.separate(x, memory[..., :6], memory[..., :6])[0]


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 2, padding="same", groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 2, 3, stride=2, output_padding=1),
        nn.Flatten(),
        nn.GELU(),
        nn.Linear(200, 8, bias=False),
        nn.Tanh(),
        nn.Linear(8, 3),
    )


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pair(make: Callable[[], M], rule: Any) -> tuple[M, M]:
    torch.manual_seed(0)
    plain = make()
    converted = copy.deepcopy(plain)
    fahooks.convert(converted, rule)
    return plain, converted


def assert_compiles(learn: Learn, plain: nn.Module, converted: nn.Module, x: Tensor, backend: str) -> None:
    eager = learn(copy.deepcopy(converted), x)
    converted.compile(fullgraph=True, backend=backend)
    compiled = learn(converted, x)
    torch.testing.assert_close(compiled.outputs, eager.outputs)
    torch.testing.assert_close(compiled.gradients, eager.gradients, rtol=1e-4, atol=1e-4)
    assert eager.distance(learn(plain, x)) > 0.05, "control: backpropagation gives the same"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@needs_compiler
def test_inductor_gives_the_gradients_of_eager(learn: Learn) -> None:
    """One network with every rule: compilation takes its time."""
    plain, converted = pair(convolutions, ALL_RULES)
    assert_compiles(learn, plain, converted, torch.randn(2, 3, 8, 8), "inductor")


@needs_compiler
def test_inductor_gives_the_gradients_of_eager_attention(learn: Learn) -> None:
    plain, converted = pair(lambda: Attention(8, 2, batch_first=True), "fa")
    assert_compiles(learn, plain, converted, torch.randn(2, 5, 8), "inductor")


@needs_compiler
@pytest.mark.parametrize("rule", ["usf_init", "usf_sn"])
def test_inductor_saves_the_weights_of_sign_rules_and_no_copies(rule: str) -> None:
    def saves(model: nn.Module) -> list[bool]:
        """For each tensor of a weight's shape whether it is the weight."""
        output: Tensor = torch.compile(model, fullgraph=True)(torch.randn(2, 3, 8, 8, requires_grad=True))
        node: Any = output.grad_fn
        weights = {weight.data_ptr(): weight.shape for weight in model.parameters() if weight.dim() == 4}
        return [tensor.data_ptr() in weights for tensor in node.saved_tensors if tensor.shape in weights.values()]

    plain, converted = pair(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3)), rule)
    assert saves(converted) == [True, True]
    assert saves(plain) == [False, False], "control: backpropagation has channels_last copies"


class Wrapped(Tensor):
    """A weight inside of another tensor, as quantized ones are, that is convolved with and can do little else."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)  # pyright: ignore

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Wrapped({self.inner!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *rest: Any) -> Wrapped:
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = [arg.inner if isinstance(arg, Wrapped) else arg for arg in args]
        name = func.overloadpacket.__name__
        if name in ("detach", "clone", "alias", "empty_like"):
            return Wrapped(func(*inner, **(kwargs or {})))
        if name in ("convolution", "convolution_backward"):
            return func(*inner, **(kwargs or {}))
        raise NotImplementedError(f"a wrapped weight does not do {name}")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_the_weight_of_a_subclass_is_convolved_with_as_it_is(backend: str) -> None:
    _, converted = pair(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3)), "fa")
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    expected = torch.autograd.grad(converted(x).sum(), x)[0]
    layer: Any = converted[2]
    layer.weight = nn.Parameter(Wrapped(layer.weight.detach()), requires_grad=False)
    found = torch.autograd.grad(torch.compile(converted, fullgraph=True, backend=backend)(x).sum(), x)[0]
    torch.testing.assert_close(found, expected)


# The rest is about what dynamo and aot_autograd trace; these two backends generate no code, and are quick.


@pytest.mark.parametrize("rule", ["fa", {"*_proj*": "usf_sn", "*": "usf_init"}], ids=["fa", "sign rules"])
def test_every_use_of_a_projection_is_traced(learn: Learn, rule: Any) -> None:
    plain, converted = pair(Attentions, rule)
    assert_compiles(learn, plain, converted, torch.randn(2, 5, 8), "aot_eager")


def test_one_compilation_serves_the_live_weight() -> None:
    compilations: list[Any] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    _, model = pair(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "usf_sn")
    compiled = torch.compile(model, fullgraph=True, backend=count)
    gradients: list[tuple[Tensor, Tensor]] = []
    for _ in range(2):
        x = torch.ones(5, 4, requires_grad=True)
        gradients.append((torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(model(x).sum(), x)[0]))
        with torch.no_grad():
            model.get_parameter("0.weight").neg_()
    for found, expected in gradients:
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients[0][0], -gradients[1][0])
    assert len(compilations) == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
@pytest.mark.parametrize("rule", [*fahooks.list_rules(), "fa from its seed"])
def test_each_rule_is_one_graph(learn: Learn, rule: str, backend: str) -> None:
    compilations: list[Any] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compilations.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    options: dict[str, Any] = {}
    if rule == "fa from its seed":
        rule, options = "fa", {"storage": "seed"}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
    labels = torch.tensor([0, 1])
    fahooks.convert(model, rule, **options)
    x = torch.randn(2, 3, 6, 6)
    step = partial(learn, around=lambda: fahooks.targets(model, labels))
    step(model, x)  # direct rules draw their matrices in the first step
    twin = copy.deepcopy(model)
    twin.compile(fullgraph=True, backend=count)
    for _ in range(2):
        with fahooks.targets(twin, labels):
            found = learn(twin, x)
        if (rule, backend) != ("bp_noise", "inductor"):  # which draws its noise otherwise
            torch.testing.assert_close(found.gradients, step(model, x).gradients, rtol=1e-4, atol=1e-4)
    assert len(compilations) == 1


@pytest.mark.parametrize("rule", ["dfa", "drtp"])
def test_a_compiled_first_step_draws_the_matrices_of_direct_rules(learn: Learn, rule: str) -> None:
    labels, x = torch.tensor([0, 1]), torch.randn(2, 4)
    _, model = pair(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), rule)
    twin = copy.deepcopy(model)
    twin.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        expected, found = (learn(m, x, around=partial(fahooks.targets, m, labels)) for m in (model, twin))
        torch.testing.assert_close(found.gradients, expected.gradients)
    assert twin.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("rule", fahooks.list_rules())
def test_each_rule_serves_batches_of_any_size(rule: str) -> None:
    """In training, that is for images that need no gradient."""
    compilations: list[Any] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        labels = torch.arange(len(x)) % 3
        with fahooks.targets(model, labels):
            loss = nn.functional.cross_entropy(model(x), labels)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    _, model = pair(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(36, 3)), rule
    )
    batches = [torch.randn(size, 3, 6, 6) for size in (4, 3, 7)]
    gradients(model, batches[0])  # dense_fa draws its matrices in the first step
    twin = copy.deepcopy(model)
    twin.compile(fullgraph=True, backend=count, dynamic=True)
    for x in batches:
        expected, found = gradients(model, x), gradients(twin, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(compilations) <= 2, "three sizes"


def test_a_compiled_first_step_of_dense_fa_says_what_to_do() -> None:
    _, model = pair(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "dense_fa")
    model.compile(fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="take one step, forward and backward, before torch.compile"):
        model(torch.randn(2, 4, requires_grad=True)).sum().backward()


def test_layers_of_one_class_share_their_compilation() -> None:
    """A class for each instance would be guarded against, and compiled anew for each."""
    compilations: list[Any] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    _, model = pair(lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), "fa")
    for layer in model:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend=count)
    model(torch.ones(5, 4, requires_grad=True)).sum().backward()
    assert len(compilations) <= 2


def test_a_compiled_model_notices_conversion_backprop_and_revert(learn: Learn) -> None:
    plain, model = pair(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), "fa")
    fahooks.revert(model)
    model.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 4)
    true = learn(plain, x)
    learn(model, x).assert_same_bits(true)
    fahooks.convert(model, "fa")
    assert learn(model, x).distance(true) > 0.05
    with fahooks.backprop(model):
        learn(model, x).assert_same_bits(true)
    assert learn(model, x).distance(true) > 0.05
    fahooks.revert(model)
    learn(model, x).assert_same_bits(true)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_normalised_layers_are_traced(learn: Learn, norm: Callable[[nn.Module], nn.Module]) -> None:
    plain, converted = pair(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), norm(nn.Linear(3, 2))).eval(), "fa")
    assert_compiles(learn, plain, converted, torch.randn(5, 4), "aot_eager")


def test_autocast_is_traced(learn: Learn) -> None:
    _, converted = pair(lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), "usf_init")
    twin = copy.deepcopy(converted)
    twin.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8)
    expected, found = (learn(m, x, around=lambda: torch.autocast("cpu", torch.bfloat16)) for m in (converted, twin))
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=0, atol=0)
    assert found.outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-2, atol=1e-2)


def test_dynamic_shapes_are_traced(learn: Learn) -> None:
    _, converted = pair(convolutions, {"2": "bp", **ALL_RULES})
    twin = copy.deepcopy(converted)
    twin.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(learn(twin, x).gradients, learn(converted, x).gradients, rtol=1e-4, atol=1e-4)
