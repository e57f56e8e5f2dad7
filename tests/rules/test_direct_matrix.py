from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fahooks
from fahooks.plugins import InputError
from fahooks.rules import direct_matrix
from fahooks.rules.base import Layout
from fahooks.rules.direct_matrix import DirectMatrix, Units

SHAPE = torch.Size((2, 3, 5))
"""Samples, channels and positions of the target."""

SOURCE = (2, 4, 2)
"""Those of the source."""


def matrix(feedback: str = "dense", seed: int = 0, **options: Any) -> DirectMatrix:
    return DirectMatrix(seed, feedback=feedback, **{"init": "fan_out", "distribution": "normal", "gain": 1.0, **options})


class Copies(TorchDispatchMode):
    """How many numbers every copy has that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:
            self.sizes.append(made.numel())
        return made


def values_of(drawn: DirectMatrix) -> Tensor:
    assert drawn.values is not None
    return drawn.values


def whole(drawn: DirectMatrix, channels: int, positions: int, sources: int) -> Tensor:
    """B [channels x positions, sources], from what it does to errors with a single one in them."""
    return drawn(torch.eye(sources).double().unsqueeze(2), torch.Size((sources, channels, positions))).flatten(1).t()


def assert_moments(sample: Tensor, variance: float) -> None:
    """Mean 0 and the given variance, within five standard errors."""
    assert abs(sample.mean().item()) < 5 * (variance / sample.numel()) ** 0.5
    assert abs(sample.var().item() / variance - 1) < 5 * (2 / sample.numel()) ** 0.5


def test_dense_sends_every_value_of_the_source_to_every_unit() -> None:
    dense, error = matrix(), torch.randn(SOURCE).double()
    signal = dense(error, SHAPE)
    entries = values_of(dense).double().view(3, 5, 4, 2)
    torch.testing.assert_close(signal, torch.einsum("cpsq,nsq->ncp", entries, error))
    assert torch.equal(signal, dense(error, SHAPE)), "it is fixed"
    assert not torch.allclose(signal, matrix(seed=1)(error, SHAPE)), "control: every seed draws the same"


@pytest.mark.parametrize("samples", [2, 9])
@pytest.mark.parametrize("feedback", ["dense", "seeded", "channel"])
def test_a_signal_that_lies_otherwise_in_memory_is_the_same(feedback: str, samples: int) -> None:
    shape, error = torch.Size((samples, *SHAPE[1:])), torch.randn(samples, *SOURCE[1:]).double()
    signal, turned = (matrix(feedback)(error, shape, turned=turned) for turned in (False, True))
    torch.testing.assert_close(turned, signal)
    assert signal.std() > 0.1
    if feedback != "channel":  # whose positions share one number
        assert signal.is_contiguous() and turned.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("samples", "copied"), [(2, "the signals"), (9, "B")])
def test_the_smaller_one_of_matrix_and_signals_is_turned(samples: int, copied: str) -> None:
    dense, shape = matrix(), torch.Size((samples, *SHAPE[1:]))
    error = torch.randn(samples, *SOURCE[1:])
    dense(error, shape)
    with Copies() as copies:
        dense(error, shape, turned=True)
    assert copies.sizes == [{"the signals": shape.numel(), "B": values_of(dense).numel()}[copied]]


def test_channel_is_the_dense_matrix_with_entries_tied_over_positions() -> None:
    channel, error = matrix("channel"), torch.randn(SOURCE).double()
    signal = channel(error, SHAPE)
    assert values_of(channel).shape == (3, 4)
    tied = values_of(channel).double()[:, None, :, None].expand(3, 5, 4, 2)
    torch.testing.assert_close(signal, torch.einsum("cpsq,nsq->ncp", tied, error))
    assert not torch.allclose(signal, matrix()(error, SHAPE)), "control: the dense one sends the same"


@pytest.mark.parametrize("rows_at_once", [None, 1, 2, 7, 100])
def test_seeded_is_dense_to_the_last_bit_and_keeps_nothing(rows_at_once: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    in_one = whole(matrix(), 3, 5, 4)
    if rows_at_once is not None:
        monkeypatch.setattr(direct_matrix, "SLICE", 4 * rows_at_once + 3)
    dense, seeded = matrix(), matrix("seeded")
    assert torch.equal(whole(seeded, 3, 5, 4), whole(dense, 3, 5, 4))
    torch.testing.assert_close(seeded(torch.ones(2, 4, 1).double(), SHAPE), dense(torch.ones(2, 4, 1).double(), SHAPE))
    several = rows_at_once is not None and rows_at_once < 15
    assert torch.equal(whole(dense, 3, 5, 4), in_one) is not several, "control: it is drawn in slices"
    assert len(whole(dense, 3, 5, 4).unique(dim=0)) == 15, "each slice has a seed of its own"
    assert seeded.values is None
    assert not seeded.state_dict()
    assert list(dense.state_dict()) == ["values"]


@pytest.mark.parametrize("feedback", ["dense", "channel", "seeded"])
@pytest.mark.parametrize(
    ("options", "variance"),
    [
        ({}, 1 / 40),
        ({"init": "fan_in"}, 1 / 150),
        ({"init": "glorot"}, 2 / 190),
        ({"gain": 3.0}, 9 / 40),
        ({"distribution": "uniform"}, 1 / 40),
    ],
    ids=str,
)
def test_the_variance_is_that_of_the_connections(feedback: str, options: dict[str, Any], variance: float) -> None:
    drawn = matrix(feedback, **options)
    entries = whole(drawn, 50, 3, 40)
    assert_moments(values_of(drawn) if feedback == "channel" else entries, variance)
    with pytest.raises(AssertionError):
        assert_moments(entries, 2 * variance)
    kurtosis = ((entries / entries.std()) ** 4).mean().item()
    assert kurtosis == pytest.approx(1.8 if "distribution" in options else 3.0, abs=0.3)


@pytest.mark.parametrize("feedback", ["dense", "seeded"])
def test_positions_of_the_source_count_in_the_variance(feedback: str) -> None:
    error = torch.zeros(2, 4, 25)
    error[0, 0, 0] = 1
    column = matrix(feedback)(error, torch.Size((2, 500, 4)))[0]
    assert_moments(column, 1 / 100)


def test_drawing_does_not_move_the_global_generator() -> None:
    before = torch.get_rng_state()
    for feedback in ("dense", "channel", "seeded"):
        matrix(feedback)(torch.ones(SOURCE), SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("feedback", ["dense", "channel", "seeded"])
def test_the_matrix_is_the_same_in_every_precision(feedback: str) -> None:
    expected = matrix(feedback)(torch.ones(SOURCE), SHAPE)
    drawn = matrix(feedback)
    found = drawn(torch.ones(SOURCE).bfloat16(), SHAPE)
    assert found.dtype == torch.bfloat16
    assert ((found - expected).norm() / expected.norm()).item() < 0.02
    torch.testing.assert_close(drawn(torch.ones(SOURCE), SHAPE), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("feedback", "kind"), [("dense", "units"), ("channel", "channels"), ("seeded", "units")])
def test_sizes_that_change_are_refused(feedback: str, kind: str) -> None:
    drawn = matrix(feedback)
    drawn(torch.ones(SOURCE), SHAPE)
    drawn(torch.ones(7, 4, 2), torch.Size((7, 3, 5)))
    with pytest.raises(InputError, match=rf"was drawn for .* {kind} of .*, not for .*: sizes must stay"):
        drawn(torch.ones(2, 5, 2), SHAPE)
    with pytest.raises(InputError, match=r"was drawn for .*, not for .*: sizes must stay"):
        drawn(torch.ones(SOURCE), torch.Size((2, 2, 5)))


@pytest.mark.parametrize("feedback", ["dense", "channel", "seeded"])
def test_more_outputs_are_refused_without_a_hint_that_would_not_help(feedback: str) -> None:
    drawn = matrix(feedback)
    drawn(torch.ones(2, 4, 1), SHAPE)
    with pytest.raises(InputError, match="sizes must stay$"):
        drawn(torch.ones(2, 6, 1), SHAPE)


def test_only_channel_serves_images_of_any_size() -> None:
    channel, dense = matrix("channel"), matrix()
    for drawn in (channel, dense):
        drawn(torch.ones(SOURCE), SHAPE)
    assert channel(torch.ones(2, 4, 9), torch.Size((2, 3, 8))).shape == (2, 3, 8)
    with pytest.raises(InputError, match="feedback='channel'"):
        dense(torch.ones(SOURCE), torch.Size((2, 3, 8)))


@pytest.mark.parametrize("drawn_before", [True, False])
def test_a_checkpoint_restores_what_was_drawn(drawn_before: bool) -> None:
    error = torch.randn(SOURCE).double()
    source, target = matrix(seed=1), matrix(seed=2)
    expected = source(error, SHAPE)
    if drawn_before:
        assert not torch.allclose(target(error, SHAPE), expected)
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target(error, SHAPE), expected)
    target.load_state_dict(matrix(seed=3).state_dict(), strict=True)
    assert torch.equal(target(error, SHAPE), expected), "a matrix that was not drawn replaces none"


def test_a_matrix_of_other_sizes_in_a_checkpoint_is_refused() -> None:
    source, target = matrix(), matrix()
    source(torch.ones(SOURCE), SHAPE)
    target(torch.ones(2, 9, 2), SHAPE)
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        target.load_state_dict(source.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedback": "chanel"}, "feedback must be one of 'dense', 'channel', 'seeded', got 'chanel' - did you mean 'channel'"),
        ({"init": "fan"}, "init must be one of"),
        ({"distribution": "gauss"}, "distribution must be one of"),
        ({"gain": -1}, "gain must be a positive number, got -1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        matrix(**options)


LAYOUTS: list[Layout] = ["channels first", "channels last", "sequence first"]


@given(
    st.sampled_from(LAYOUTS),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.integers(1, 3), max_size=3),
)
def test_units_are_divided_by_samples_and_put_back(layout: Layout, n: int, w: int, c: int, positions: list[int]) -> None:
    if layout == "channels first":
        tensor = torch.arange(n * w * c * torch.Size(positions).numel()).view(n * w, c, *positions)
        expected = [tensor[i * w : (i + 1) * w].transpose(0, 1).flatten(1) for i in range(n)]
    elif layout == "channels last":
        tensor = torch.arange(n * w * c * torch.Size(positions).numel()).view(n * w, *positions, c)
        expected = [tensor[i * w : (i + 1) * w].flatten(0, -2).t() for i in range(n)]
    else:
        tensor = torch.arange(w * n * c).view(w, n, c)
        expected = [tensor[:, i].t() for i in range(n)]
        flat = Units(torch.Size((w * n, c)), layout, n)
        assert torch.equal(flat.fold(tensor.view(w * n, c)), torch.stack(expected))
    units = Units(tensor.shape, layout, n)
    folded = units.fold(tensor)
    assert folded.shape == units.folded
    assert torch.equal(folded, torch.stack(expected))
    assert torch.equal(units.unfold(folded), tensor)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_that_can_not_be_divided_is_refused(layout: Layout) -> None:
    with pytest.raises(InputError, match=r"shape \(3, 1, 3\) can not be divided among .* 2"):
        Units(torch.Size((3, 1, 3)), layout, 2)


def test_a_checkpoint_with_a_stray_entry_is_refused_and_a_meta_copy_takes_the_values() -> None:
    def drawn() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        fahooks.convert(model, "dfa")
        model(torch.randn(5, 3, requires_grad=True)).sum().backward()
        return model

    model = drawn()
    state = model.state_dict()
    (key, *_) = [name for name in state if name.endswith("values")]
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{key}z"):
        drawn().load_state_dict({**state, f"{key}z": state[key]})
    copy = drawn().to("meta")
    copy.load_state_dict(state, assign=True)
    assert torch.equal(copy.state_dict()[key], state[key])
