"""Resize and Upsample against ONNX Runtime, over what their attributes allow."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import onnx
from onnx import helper
from tests.compression.formats.onnx.one_node import assert_same, found, model

COORDINATES = [
    "half_pixel",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "half_pixel_symmetric",
    "tf_crop_and_resize",
    "tf_half_pixel_for_nn",
]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
SCALES = [1.0, 0.5, 0.6, 0.75, 1.5, 1.7, 2.0, 3.0]


@st.composite
def resizes(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    mode = draw(st.sampled_from(["nearest", "linear", "cubic"]))
    antialias = mode != "nearest" and draw(st.booleans())
    possible = COORDINATES[:4] if antialias else COORDINATES if mode == "nearest" else COORDINATES[:-1]
    coordinates = draw(st.sampled_from(possible))
    crops = coordinates == "tf_crop_and_resize"
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if antialias:
        attributes["antialias"] = 1
    if mode == "nearest":
        # where a place falls between two, half_pixel_symmetric's float error decides
        symmetric = coordinates == "half_pixel_symmetric"
        attributes["nearest_mode"] = draw(st.sampled_from(ROUNDINGS[:2] if symmetric else ROUNDINGS))
    if mode == "cubic":
        attributes["cubic_coeff_a"] = draw(st.sampled_from([-0.75, -0.5]))
        attributes["exclude_outside"] = draw(st.integers(0, 1))
    shape = (2, 3, draw(st.integers(2, 6)), draw(st.integers(2, 6)))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    axes = draw(st.sampled_from([None, [2, 3], [3, 2], [3], [-2]]))
    before: list[int] = [2, 3] if axes is None else []
    count = 2 if axes is None else len(axes)
    if axes is not None:
        attributes["axes"] = axes
    constants: dict[str, np.ndarray] = {}
    if draw(st.booleans()):
        # cropped, what keeps its size is not cropped in ONNX Runtime
        sizes = [draw(st.integers(7 if crops else 1, 13)) for _ in range(count)]
        # nor does it take negative axes into account when it keeps the ratio, or smooth an axis that keeps its size
        if axes is not None and axes != [-2] and not antialias and not crops:
            attributes["keep_aspect_ratio_policy"] = draw(st.sampled_from(["stretch", "not_larger", "not_smaller"]))
        constants["sizes"] = np.array([*before, *sizes], np.int64)
        names = ["x", "", "", "sizes"]
    else:
        scales = [draw(st.sampled_from(SCALES[1:] if crops else SCALES)) for _ in range(count)]
        constants["scales"] = np.array([*(1 for _ in before), *scales], np.float32)
        names = ["x", "", "scales"]
    if crops:
        attributes["extrapolation_value"] = 2.0
        starts, ends = ([draw(st.sampled_from(places)) for _ in range(count)] for places in ([0.0, 0.2], [0.7, 1.3]))
        constants["roi"] = np.array([*(0 for _ in before), *starts, *(1 for _ in before), *ends], np.float32)
        names[1] = "roi"
    node = helper.make_node("Resize", names, ["y"], **attributes)
    return model([node], {"x": x}, ["y"], constants), {"x": x}


@given(resizes())
@settings(max_examples=100)
def test_resize_computes_what_onnx_runtime_does(case: tuple[onnx.ModelProto, dict[str, np.ndarray]]) -> None:
    assert_same(*case)


def test_a_size_that_keeps_the_ratio_is_rounded() -> None:
    """torch would round down."""
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 9)).astype(np.float32)
    node = helper.make_node(
        "Resize", ["x", "", "", "s"], ["y"], axes=[2, 3], keep_aspect_ratio_policy="not_larger", mode="linear"
    )
    proto = model([node], {"x": x}, ["y"], {"s": np.array([10, 10])})
    assert_same(proto, {"x": x})
    assert found(proto, {"x": x})[0].shape == (2, 3, 8, 10)
