"""Layouts as functions of their coordinates, on random layouts, and the C++ spelling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidrial.errors import LayoutError
from vidrial.layout.algebra import ComposedLayout, Layout, Swizzle, flatten


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """One to three modes, permuted, padded or broadcast, flat or nested."""
    extents = draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 8]), min_size=1, max_size=3))
    order = draw(st.permutations(range(len(extents))))
    strides, step = [0] * len(extents), 1
    for i in order:
        strides[i] = 0 if draw(st.integers(0, 7)) == 0 else step
        step *= extents[i] * draw(st.sampled_from([1, 1, 2, 3]))
    if len(extents) == 3 and draw(st.booleans()):
        return Layout((extents[0], (extents[1], extents[2])), (strides[0], (strides[1], strides[2])))
    return Layout(tuple(extents), tuple(strides))


swizzles = st.builds(lambda bits, base, extra: Swizzle(bits, base, bits + extra), st.integers(0, 3), st.integers(0, 4), st.integers(0, 2))


@given(layouts())
def test_size_cosize_and_coordinates(layout: Layout) -> None:
    values = [int(v) for v in layout.indices()]
    assert len(values) == layout.size and max(values) + 1 == layout.cosize
    extents = flatten(layout.shape)
    strides = flatten(layout.stride)
    for i in range(layout.size):
        rest, index, digits = i, 0, []
        for s, d in zip(extents, strides, strict=True):
            digits.append(rest % s)
            index += rest % s * d
            rest //= s
        assert layout(i) == index == values[i]
        if layout.rank == 3:
            assert layout(*digits) == index
        if layout.rank == 2 and len(extents) == 3:
            assert layout(digits[0], (digits[1], digits[2])) == layout((digits[0], digits[1] + extents[1] * digits[2])) == index


@given(swizzles)
@settings(max_examples=50)
def test_swizzle_is_an_involution_with_its_period(swizzle: Swizzle) -> None:
    x = np.arange(4 * swizzle.period)
    y = swizzle(x)
    assert np.array_equal(swizzle(y), x) and np.array_equal(np.sort(y), x)
    assert np.array_equal(swizzle(x + swizzle.period), y + swizzle.period)
    # Below the bits that are written nothing moves, and only those are written.
    written = ((1 << swizzle.bits) - 1) << swizzle.base
    assert not np.any((x ^ y) & ~written)


def test_swizzle_and_composed_values() -> None:
    swizzle = Swizzle(3, 3, 3)
    assert [swizzle(r * 64) for r in range(9)] == [0, 72, 144, 216, 288, 360, 432, 504, 512]
    tile = ComposedLayout(swizzle, 0, Layout((16, 64), (64, 1)))
    assert (tile(3, 0), tile(3, 8), tile(5, 41)) == (216, 208, 320 + (41 ^ 40))
    assert tile.size == 1024 and ComposedLayout(swizzle, 64, Layout(2))(0) == 72


def test_cpp() -> None:
    layout = Layout((128, (64, 2)), (64, (1, 8192)))
    assert ComposedLayout(Swizzle(3, 3, 3), 0, layout).cpp == (
        "cute::ComposedLayout<cute::Swizzle<3,3,3>, cute::_0, "
        "cute::Layout<cute::Shape<cute::Int<128>,cute::Shape<cute::Int<64>,cute::Int<2>>>, "
        "cute::Stride<cute::Int<64>,cute::Stride<cute::Int<1>,cute::Int<8192>>>>>"
    )
    assert Layout(37, 3).cpp == "cute::Layout<cute::Int<37>, cute::Int<3>>"
    assert ComposedLayout(Swizzle(1, 0, 1), 5, Layout(2)).cpp.split(", ")[1] == "cute::Int<5>"


def test_default_stride_is_compact() -> None:
    assert Layout((3, (5, 2))).stride == (1, (3, 15))


@pytest.mark.parametrize(
    "shape, stride, message",
    [
        ((3, 0), (1, 3), "0 is not an extent"),
        ((3, True), (1, 3), "True is not"),
        (3.0, 1, "3.0 is not"),
        ((3, 2), (1, -1), "-1 is not a stride"),
        ((3, 2), (1, (2, 4)), "nested differently"),
        ((3, 2), 1, "nested differently"),
    ],
)
def test_bad_layouts(shape: object, stride: object, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout(shape, stride)  # type: ignore[arg-type]


def test_what_is_not_a_layout() -> None:
    with pytest.raises(LayoutError, match="coordinate"):
        Layout((3, 2))(1, 1, 1)
    with pytest.raises(LayoutError, match="shift of at least bits"):
        Swizzle(3, 3, 2)
