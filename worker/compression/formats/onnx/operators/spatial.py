"""Sampling planes at places: GridSample, AffineGrid, DeformConv, RoiAlign. And windows, put back: Col2Im, MaxUnpool.

Planes are `[N, C, H, W]` (`[N, C, D, H, W]` where three axes are supported).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.compression.formats.onnx.operators.common import product
from worker.compression.formats.onnx.operators.convolution import pad
from worker.compression.formats.onnx.table import MICROSOFT, Call, operator

MODES = {"bilinear": "bilinear", "linear": "bilinear", "nearest": "nearest", "bicubic": "bicubic", "cubic": "bicubic"}


@operator("GridSample", since=16)
@operator("GridSample", domain=MICROSOFT)
def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    mode = call.attribute("mode", "bilinear")
    if mode not in MODES or (MODES[mode] == "bicubic" and x.ndim != 4):
        raise call.error(f"has the mode {mode!r} on {x.ndim} axes")
    padding, corners = call.attribute("padding_mode", "zeros"), bool(call.attribute("align_corners", 0))
    return F.grid_sample(x, grid, MODES[mode], padding, corners)


@operator("AffineGrid", since=20, known=(1,))
def affine_grid(call: Call, theta: Tensor, size: list[Any]) -> Tensor:
    return F.affine_grid(theta, size, bool(call.attribute("align_corners", 0)))


@operator("Col2Im", since=18, known=(1, 2))
def col2im(call: Call, x: Tensor, image: list[Any], block: list[Any]) -> Tensor:
    """`[N, C · ∏block, L]` → `[N, C, *image]`: every block is added at its place."""
    count = len(block)
    strides, dilations = call.attribute("strides") or [1] * count, call.attribute("dilations") or [1] * count
    pads = call.attribute("pads") or [0] * 2 * count
    if count == 2 and pads[:2] == pads[2:]:
        return torch.ops.aten.col2im(x, image, block, dilations, pads[:2], strides)
    sizes = [n + a + b for n, a, b in zip(image, pads[:count], pads[count:], strict=True)]
    steps = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(sizes, dilations, block, strides, strict=True)]
    channels = x.shape[1] // math.prod(block)
    at = torch.zeros([1] * 2 * count, dtype=torch.long)
    for i in range(count):
        place = torch.arange(block[i]).unsqueeze(1) * dilations[i] + torch.arange(steps[i]) * strides[i]
        shape = [1] * 2 * count
        shape[i], shape[count + i] = block[i], steps[i]
        at = at * sizes[i] + place.reshape(shape)
    full = torch.zeros([x.shape[0], channels, math.prod(sizes)], dtype=x.dtype)
    full = full.index_add(2, at.reshape(-1), x.reshape(x.shape[0], channels, -1)).reshape(*full.shape[:2], *sizes)
    for i in range(count):
        full = full.narrow(2 + i, pads[i], image[i])
    return full


@operator("DeformConv", since=19, weights={1: "weight", 3: "bias"})
def deform_conv(
    call: Call, x: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Every tap of the kernel is sampled at its own, shifted place: `offset [N, G · ∏k · 2, H', W']`."""
    if x.ndim != 4:
        raise call.error(f"has {x.ndim - 2} spatial axes; 2 are supported")
    (n, channels, height, width), (rows, columns) = x.shape, offset.shape[2:]
    kernel = call.attribute("kernel_shape") or list(weight.shape[2:])
    strides, dilations = call.attribute("strides") or [1, 1], call.attribute("dilations") or [1, 1]
    pads, groups = call.attribute("pads") or [0] * 4, call.attribute("offset_group", 1)
    shifts = offset.reshape(n * groups, kernel[0] * kernel[1], 2, rows, columns)
    masks = None if mask is None else mask.reshape(n * groups, kernel[0] * kernel[1], 1, rows, columns)
    planes = x.reshape(n * groups, channels // groups, height, width)
    taps = []
    for k in range(kernel[0] * kernel[1]):
        i, j = divmod(k, kernel[1])
        y = (torch.arange(rows) * strides[0] - pads[0] + i * dilations[0]).unsqueeze(1) + shifts[:, k, 0]
        z = torch.arange(columns) * strides[1] - pads[1] + j * dilations[1] + shifts[:, k, 1]
        sampled = _bilinear(planes, y, z)
        taps.append(sampled if masks is None else sampled * masks[:, k])
    columns_ = torch.stack(taps, 2).reshape(n, channels * len(taps), rows, columns)
    one = weight.reshape(weight.shape[0], weight.shape[1] * len(taps), 1, 1)
    return F.conv2d(columns_, one, bias, groups=call.attribute("group", 1))


def _bilinear(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """`x [N, C, H, W]` at rows `y` and columns `z` (`[N, H', W']`), zero outside."""
    grid = torch.stack([(2 * z + 1) / x.shape[3] - 1, (2 * y + 1) / x.shape[2] - 1], -1)
    return F.grid_sample(x, grid, "bilinear", "zeros", False)


@operator("RoiAlign", since=10)
def roi_align(call: Call, x: Tensor, rois: Tensor, batch: Tensor) -> Tensor:
    """`rois [R, 4]` (x1 y1 x2 y2) of the samples `batch [R]` → `[R, C, H', W']`: means over sampled places."""
    samples = call.attribute("sampling_ratio", 0)
    if samples <= 0:
        raise call.error("chooses the number of its samples by the data (sampling_ratio = 0)")
    height, width = call.attribute("output_height", 1), call.attribute("output_width", 1)
    half = call.opset >= 16 and call.attribute("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    shift = 0.5 if half else 0.0
    x1, y1, x2, y2 = (rois * call.attribute("spatial_scale", 1.0) - shift).unbind(1)
    w, h = x2 - x1, y2 - y1
    if not half:
        w, h = w.clamp(min=1.0), h.clamp(min=1.0)
    y = _roi_places(y1, h, height, samples).unsqueeze(2).expand(-1, -1, width * samples)
    z = _roi_places(x1, w, width, samples).unsqueeze(1).expand(-1, height * samples, -1)
    sampled = _clamped_bilinear(torch.index_select(x, 0, batch.long()), y, z, call.attribute("mode", "avg") == "max")
    shape = [rois.shape[0], x.shape[1], height, samples, width, samples]
    if call.attribute("mode", "avg") == "max":
        return sampled.reshape(shape).amax([3, 5])
    return sampled.reshape(shape).mean([3, 5])


def _roi_places(first: Tensor, length: Tensor, bins: int, samples: int) -> Tensor:
    at = (torch.arange(bins * samples) + 0.5) / (bins * samples)
    return first.unsqueeze(1) + length.unsqueeze(1) * at


def _clamped_bilinear(x: Tensor, y: Tensor, z: Tensor, largest: bool) -> Tensor:
    """Places up to one beyond the edge take the edge; further ones are zero. `largest`: of the four weighted
    neighbours, as RoiAlign's maximum wants it, instead of their sum."""
    h, w = x.shape[2:]
    inside = (y >= -1) & (y <= h) & (z >= -1) & (z <= w)
    y, z = y.clamp(0, h - 1), z.clamp(0, w - 1)
    low_y, low_z = y.floor(), z.floor()
    share_y, share_z = y - low_y, z - low_z
    total: Any = None
    for dy in (0, 1):
        for dz in (0, 1):
            at = (low_y + dy).clamp(max=h - 1).long() * w + (low_z + dz).clamp(max=w - 1).long()
            flat = at.reshape(at.shape[0], 1, -1).expand(-1, x.shape[1], -1)
            value = torch.gather(x.flatten(2), 2, flat).reshape(*x.shape[:2], *at.shape[1:])
            weight = (share_y if dy else 1 - share_y) * (share_z if dz else 1 - share_z)
            value = value * weight.unsqueeze(1)
            total = value if total is None else torch.maximum(total, value) if largest else total + value
    return total * inside.unsqueeze(1).to(x.dtype)


@operator("MaxUnpool", known=(2,))
def max_unpool(call: Call, x: Tensor, indices: Tensor, shape: list[Any] | None = None) -> Tensor:
    """Every value goes back to its place in the flattened tensor; the rest is zero."""
    kernel = call.required("kernel_shape")
    strides, pads = call.attribute("strides") or [1] * len(kernel), call.attribute("pads") or [0] * 2 * len(kernel)
    own = [
        (n - 1) * s + k - a - b
        for n, s, k, a, b in zip(x.shape[2:], strides, kernel, pads[: len(kernel)], pads[len(kernel) :], strict=True)
    ]
    sizes = [*x.shape[:2], *own]
    flat = torch.zeros([product(sizes)], dtype=x.dtype)
    result = torch.scatter(flat, 0, indices.reshape(-1), x.reshape(-1)).reshape(sizes)
    if shape is None:
        return result
    return pad(result, [0] * x.ndim, [wanted - n for wanted, n in zip(shape, sizes, strict=True)])
