from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from fahooks.data import Augment, Draw
from fahooks.data.framing import CenterCrop, RandomResizedCrop, frame
from fahooks.plugins import InputError

SIDES = st.integers(1, 700)
INDEX = torch.arange(4000)


def draw(index: Tensor = INDEX) -> Draw:
    return Draw(index, ("test",))


def sizes(height: int, width: int, count: int = len(INDEX)) -> Tensor:
    return torch.tensor([[height, width]]).expand(count, 2)


def assert_inside(boxes: Tensor, sizes: Tensor) -> None:
    corner, shape = boxes[:, :2], boxes[:, 2:]
    assert (corner >= 0).all() and (shape >= 1).all() and (corner + shape <= sizes).all()


@given(SIDES, SIDES, st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.2, 5), st.floats(0.2, 5))
def test_random_boxes_lie_in_the_image(height: int, width: int, a: float, b: float, c: float, d: float):
    step = RandomResizedCrop(size=8, scale=(min(a, b), max(a, b)), ratio=(min(c, d), max(c, d)))
    assert_inside(step.train(sizes(height, width, 50), draw(INDEX[:50])), sizes(height, width, 50))


@given(SIDES, SIDES, st.integers(1, 300), st.integers(0, 100))
def test_central_boxes_lie_in_the_centre(height: int, width: int, size: int, more: int):
    for step in (CenterCrop(size=size, resize=size + more), RandomResizedCrop(size=size, resize=size + more)):
        (box,) = step.evaluate(sizes(height, width, 1))
        assert_inside(box[None], sizes(height, width, 1))
        top, left, high, wide = box.tolist()
        assert high == wide == max(1, round(min(height, width) * size / (size + more)))
        assert top == (height - high) // 2 and left == (width - wide) // 2


def test_area_shape_and_place_are_distributed_as_torchvision_has_them():
    """Quantiles beside those of torchvision's own boxes, 4,000 of each."""
    from torchvision.transforms import RandomResizedCrop as Theirs

    image = torch.zeros(3, 375, 500)
    torch.manual_seed(0)
    theirs = torch.tensor([Theirs.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]).double()
    ours = RandomResizedCrop(size=224).train(sizes(375, 500), draw()).double()

    def quantities(boxes: Tensor) -> Tensor:
        top, left, high, wide = boxes.unbind(1)
        return torch.stack([high * wide / (375 * 500), wide / high, top / 375, left / 500])

    quantiles = torch.linspace(0.05, 0.95, 19).double()
    difference = (quantities(ours).quantile(quantiles, 1) - quantities(theirs).quantile(quantiles, 1)).abs()
    assert difference.max() < 0.05
    narrower = RandomResizedCrop(size=224, scale=(0.25, 1.0)).train(sizes(375, 500), draw()).double()
    difference = (quantities(narrower).quantile(quantiles, 1) - quantities(theirs).quantile(quantiles, 1)).abs()
    assert difference.max() > 0.05, "control"


@pytest.mark.parametrize(("height", "width", "box"), [(10, 400, (0, 193, 10, 13)), (400, 10, (193, 0, 13, 10))])
def test_where_no_box_fits_it_is_the_largest_in_the_centre(height: int, width: int, box: tuple[int, ...]):
    boxes = RandomResizedCrop(size=8, scale=(1.0, 1.0)).train(sizes(height, width, 3), draw(INDEX[:3]))
    assert boxes.tolist() == [list(box)] * 3


def test_a_box_is_a_pure_function_of_the_image():
    step = RandomResizedCrop(size=8)
    mixed = torch.stack([INDEX % 300 + 200, INDEX % 200 + 250], 1)
    together = step.train(mixed, draw())
    picked = torch.tensor([7, 3999, 0])
    assert torch.equal(step.train(mixed[picked], draw(INDEX[picked])), together[picked])
    assert len(together[::300].unique(dim=0)) == len(together[::300])
    assert not torch.equal(step.train(mixed, Draw(INDEX, ("other",))), together)


def ramp(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, (rows * 7 + columns * 3) % 251]).byte()


def test_a_box_of_the_size_wanted_is_cut_out_as_it_is():
    image = ramp(40, 50)
    assert torch.equal(frame(image, (3, 5, 8, 8), 8), image[:, 3:11, 5:13])


@pytest.mark.parametrize(("box", "size"), [((0, 0, 40, 50), 10), ((4, 6, 30, 20), 16), ((10, 10, 5, 6), 24)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_other_boxes_are_scaled_as_pillow_does_to_one_level(box: tuple[int, int, int, int], size: int, channels_last: bool):
    image = ramp(40, 50)
    top, left, high, wide = box
    theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + wide, top + high))
    expected = torch.from_numpy(numpy.array(theirs.resize((size, size), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    laid = image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if channels_last else image
    found = frame(laid, box, size)
    assert found.shape == (3, size, size) and found.dtype == torch.uint8
    assert (found.int() - expected.int()).abs().max() <= 1


def test_images_of_one_size_are_framed_by_augment():
    pixels = torch.stack([ramp(20, 30)] * 6)
    augment = Augment([{"random_resized_crop": {"size": 8}}, {"flip": {}}], seed=3)
    assert augment.framing is not None and augment.shape((3, 20, 30)) == (3, 8, 8)
    index = torch.arange(6)
    boxes = augment.framing.train(sizes(20, 30, 6), augment.draw(augment.framing, 2, index))
    cut = torch.stack([frame(image, box, 8) for image, box in zip(pixels, boxes.tolist(), strict=True)])
    expected = augment.train(pixels, 2, index)
    assert all(torch.equal(e, c) or torch.equal(e, c.flip(2)) for c, e in zip(cut, expected, strict=True))
    assert torch.equal(augment.train(cut, 2, index, framed=True), expected)
    assert torch.equal(augment.evaluate(pixels)[0], frame(pixels[0], augment.framing.evaluate(sizes(20, 30, 1))[0].tolist(), 8))


@pytest.mark.parametrize("name", ["random_resized_crop", "center_crop"])
def test_framing_comes_first_or_not_at_all(name: str):
    with pytest.raises(InputError, match=f"{name} takes its box out of the image as it is stored: it must be the first step"):
        Augment([{"flip": {}}, {name: {"size": 8}}])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("center_crop", {"size": 0}, "size must be positive"),
        ("center_crop", {"size": 9, "resize": 8}, "resize must not be less than size, 9 .got 8."),
        ("random_resized_crop", {"size": 9, "scale": (0.5, 0.2)}, r"scale must be two numbers in order .*got \[0.5, 0.2\]"),
        ("random_resized_crop", {"size": 9, "scale": (0.5, 1.2)}, "between 0 and 1"),
        ("random_resized_crop", {"size": 9, "ratio": (0.0, 1.0)}, "ratio must be two positive numbers"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        Augment([{name: options}])
