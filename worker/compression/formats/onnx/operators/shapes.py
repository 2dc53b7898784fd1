"""Arrangements: reshaping, joining, cutting, repeating, and tensors made of nothing but a shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker.compression.formats.onnx.graph import Known, Value
from worker.compression.formats.onnx.operators.common import axes as absolute
from worker.compression.formats.onnx.operators.common import axis as absolute_axis
from worker.compression.formats.onnx.operators.common import product, split_count
from worker.compression.formats.onnx.table import EVERY, MICROSOFT, Call, known, operator


@operator("Shape")
def shape(call: Call, x: Tensor) -> Known:
    return known(list(x.shape[call.attribute("start", 0) : call.attribute("end")]))


@operator("Size")
def size(call: Call, x: Tensor) -> Known:
    return known(product(x.shape))


@operator("Identity", raw=True)
def identity(call: Call, x: Value) -> Value:
    return x


@operator("Reshape")
def reshape_attribute(call: Call, x: Tensor) -> Tensor:
    return _reshape(call, x, call.required("shape"))


@operator("Reshape", since=5, known=(1,))
def reshape(call: Call, x: Tensor, sizes: list[Any]) -> Tensor:
    return _reshape(call, x, sizes)


def _reshape(call: Call, x: Tensor, sizes: Sequence[Any]) -> Tensor:
    copies = not call.attribute("allowzero", 0)
    target = [x.shape[i] if copies and isinstance(n, int) and n == 0 else n for i, n in enumerate(sizes)]
    if sum(not isinstance(n, int) for n in target) == 1 and -1 not in [n for n in target if isinstance(n, int)]:
        others = product([n for n in target if isinstance(n, int)])
        if others and not (copies and 0 in sizes):
            target = [n if isinstance(n, int) else -1 for n in target]  # as a .pt2 says it: view(-1, 256)
    return x.reshape(target)


@operator("Flatten")
def flatten(call: Call, x: Tensor) -> Tensor:
    first = absolute_axis(call.attribute("axis", 1), x.ndim)
    if first == 1 and x.ndim > 1:
        return torch.flatten(x, 1)
    return x.reshape([product(x.shape[:first]), product(x.shape[first:])])


@operator("Transpose")
def transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.attribute("perm") or list(range(x.ndim))[::-1])


@operator("Squeeze")
def squeeze_attribute(call: Call, x: Tensor) -> Tensor:
    return _squeeze(call, x, call.attribute("axes"))


@operator("Squeeze", since=13, known=(1,))
def squeeze(call: Call, x: Tensor, axes: list[int] | None = None) -> Tensor:
    return _squeeze(call, x, axes)


def _squeeze(call: Call, x: Tensor, axes: list[int] | None) -> Tensor:
    if axes is None:
        axes = [i for i, n in enumerate(x.shape) if isinstance(n, int) and n == 1]
    where = sorted({absolute_axis(int(a), x.ndim) for a in axes}, reverse=True)
    for i in where:
        if isinstance(x.shape[i], int) and x.shape[i] != 1:
            raise call.error(f"removes axis {i} of {list(x.shape)}")
        x = x.squeeze(i)
    return x


@operator("Unsqueeze")
def unsqueeze_attribute(call: Call, x: Tensor) -> Tensor:
    return _unsqueeze(x, call.required("axes"))


@operator("Unsqueeze", since=13, known=(1,))
def unsqueeze(call: Call, x: Tensor, axes: list[int] | int) -> Tensor:
    return _unsqueeze(x, axes if isinstance(axes, list) else [axes])


def _unsqueeze(x: Tensor, axes: Sequence[int]) -> Tensor:
    for i in sorted(absolute(axes, x.ndim + len(axes))):
        x = x.unsqueeze(i)
    return x


@operator("ExpandDims", domain=MICROSOFT, known=(1,))
def expand_dims(call: Call, x: Tensor, at: int) -> Tensor:
    return x.unsqueeze(at)


@operator("UnfoldTensor", domain=MICROSOFT)
def unfold(call: Call, x: Tensor) -> Tensor:
    """Windows along one axis, which become a new last one."""
    return x.unfold(call.attribute("dim", -1), call.required("size"), call.attribute("step", 1))


@operator("Concat", weights={EVERY: "addend"})
def concat(call: Call, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, call.attribute("axis", 1)) if len(inputs) > 1 else inputs[0]


@operator("Split")
def split_attribute(call: Call, x: Tensor, sizes: Any = None) -> tuple[Tensor, ...]:
    return _split(call, x, call.attribute("split"))


@operator("Split", since=13, known=(1,))
def split(call: Call, x: Tensor, sizes: list[Any] | None = None) -> tuple[Tensor, ...]:
    return _split(call, x, sizes)


def _split(call: Call, x: Tensor, sizes: list[Any] | None) -> tuple[Tensor, ...]:
    axis = call.attribute("axis", 0)
    if sizes is None:
        parts = split_count(call)
        length = -(-x.shape[axis] // parts)
        sizes = [length] * (parts - 1)
        sizes.append(x.shape[axis] - length * (parts - 1))
    return torch.split(x, sizes, axis)


@operator("Slice")
def slice_attributes(call: Call, x: Tensor) -> Tensor:
    return _slice(x, call.required("starts"), call.required("ends"), call.attribute("axes"), None)


@operator("Slice", since=10, known=(1, 2, 3, 4))
def slice_(call: Call, x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    return _slice(x, starts, ends, axes, steps)


def _slice(x: Tensor, starts: Any, ends: Any, axes: Any, steps: Any) -> Tensor:
    starts, ends, axes, steps = (v if isinstance(v, list) or v is None else [v] for v in (starts, ends, axes, steps))
    axes = range(len(starts)) if axes is None else axes
    for i, first, last, step in zip(axes, starts, ends, steps or [1] * len(starts), strict=True):
        i = absolute_axis(int(i), x.ndim)
        if step < 0:
            x = _backwards(x, i, first, last, step)
            continue
        whole = isinstance(first, int) and first == 0 and isinstance(last, int) and last >= 2**31 - 1
        if whole and step == 1:
            continue
        stop = None if isinstance(last, int) and last >= 2**31 - 1 else last
        x = torch.ops.aten.slice.Tensor(x, i, first, stop, step)
    return x


def _backwards(x: Tensor, axis: int, first: Any, last: Any, step: int) -> Tensor:
    length = x.shape[axis]
    start, stop, _ = slice(first, None if last <= -(2**31) else last, step).indices(int(length))
    flipped = x.flip(axis)
    return torch.ops.aten.slice.Tensor(flipped, axis, length - 1 - start, length - 1 - stop, -step)


@operator("Expand", known=(1,), weights={0: "addend"})
def expand(call: Call, x: Tensor, sizes: list[Any]) -> Tensor:
    rank = max(x.ndim, len(sizes))
    have, want = [1] * (rank - x.ndim) + list(x.shape), [1] * (rank - len(sizes)) + list(sizes)
    return x.expand([_broadcast(h, w) for h, w in zip(have, want, strict=True)])


def _broadcast(have: Any, want: Any) -> Any:
    """The size of an axis of `have` that is to be expanded to `want`; 1 leaves it as it is."""
    if isinstance(want, int) and want == 1:
        return have
    if isinstance(have, int) and have == 1:
        return want
    return have


@operator("Tile", since=6, known=(1,))
def tile(call: Call, x: Tensor, repeats: list[Any]) -> Tensor:
    return x.repeat(repeats)


@operator("ConstantOfShape", known=(0,))
def constant_of_shape(call: Call, sizes: list[Any]) -> Tensor:
    value = call.attribute("value") or Known(np.zeros(1, np.float32), torch.float32)
    return torch.full(sizes, value.numbers.ravel()[0].item(), dtype=value.dtype)


@operator("Range", raw=True)
def range_(call: Call, start: Any, limit: Any, delta: Any) -> Tensor:
    if not all(isinstance(x, Known) for x in (start, limit, delta)):
        raise call.error("has limits that depend on the data")
    first, last, step = (x.numbers.reshape(()).item() for x in (start, limit, delta))
    return torch.arange(first, last, step, dtype=start.dtype)


@operator("Pad")
def pad_attributes(call: Call, x: Tensor) -> Tensor:
    return _pad(call, x, call.required("pads"), call.attribute("value", 0.0), None)


@operator("Pad", since=11, known=(1, 3), either=(2,))
@operator("Pad", domain=MICROSOFT, known=(1,), either=(2,))
def pad(call: Call, x: Tensor, pads: list[Any], value: Any = None, axes: list[int] | None = None) -> Tensor:
    if isinstance(value, Tensor):  # computed: the padding is zero, and the value put where nothing was
        there = _pad(call, torch.ones_like(x, dtype=torch.bool), pads, False, axes)
        return torch.where(there, _pad(call, x, pads, 0, axes), value.reshape(()))
    return _pad(call, x, pads, 0 if value is None else value.numbers.reshape(-1)[0].item(), axes)


def _pad(call: Call, x: Tensor, pads: list[Any], value: Any, axes: list[int] | None) -> Tensor:
    count = len(pads) // 2
    where = absolute(axes, x.ndim) if axes is not None else list(range(count))
    before, after = [0] * x.ndim, [0] * x.ndim
    for i, b, a in zip(where, pads[:count], pads[count:], strict=True):
        before[i], after[i] = b, a
    mode = call.attribute("mode", "constant")
    widths = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    while len(widths) > 2 and all(isinstance(n, int) and n == 0 for n in widths[-2:]):
        widths = widths[:-2]
    if mode == "constant":
        return torch.nn.functional.pad(x, widths, value=value)
    kinds = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in kinds:
        raise call.error(f"has the mode {mode!r}")
    return _pad_by_axis(x, before, after, mode)


def _pad_by_axis(x: Tensor, before: Sequence[int], after: Sequence[int], mode: str) -> Tensor:
    """By index, axis by axis: torch's own modes take only some axes and widths. Negative widths cut."""
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        if isinstance(b, int) and isinstance(a, int) and b == a == 0:
            continue
        length = x.shape[i]
        at = torch.arange(-b, length + a, device=x.device)
        if mode == "edge":
            at = at.clamp(0, length - 1)
        elif mode == "wrap":
            at = torch.remainder(at, length)
        else:
            period = 2 * (length - 1)
            at = torch.remainder(at, period) if period else torch.zeros_like(at)
            at = torch.where(at >= length, period - at, at)
        x = torch.index_select(x, i, at)
    return x


@operator("DepthToSpace")
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    """`[N, C · b², H, W]` → `[N, C, H · b, W · b]`."""
    block, (n, c, h, w) = call.required("blocksize"), x.shape
    if call.attribute("mode", "DCR") == "CRD":
        return torch.nn.functional.pixel_shuffle(x, block)
    y = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // block**2, h * block, w * block)


@operator("SpaceToDepth")
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    """`[N, C, H · b, W · b]` → `[N, C · b², H, W]`."""
    block, (n, c, h, w) = call.required("blocksize"), x.shape
    if call.attribute("mode", "DCR") == "CRD":
        return torch.nn.functional.pixel_unshuffle(x, block)
    y = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * block**2, h // block, w // block)


@operator("Trilu", since=14, known=(1,))
@operator("Trilu", domain=MICROSOFT, known=(1,))
def trilu(call: Call, x: Tensor, diagonal: Any = None) -> Tensor:
    k = 0 if diagonal is None else diagonal[0] if isinstance(diagonal, list) else diagonal
    k = max(min(k, 2**31 - 1), -(2**31)) if isinstance(k, int) else k
    return torch.triu(x, k) if call.attribute("upper", 1) else torch.tril(x, k)


@operator("EyeLike", since=9)
def eye_like(call: Call, x: Tensor) -> Tensor:
    dtype = call.dtype("dtype", x.dtype)
    rows = torch.arange(x.shape[0]).unsqueeze(1) + call.attribute("k", 0)
    return (rows == torch.arange(x.shape[1])).to(dtype)


@operator("CenterCropPad", since=18, known=(1,))
def center_crop_pad(call: Call, x: Tensor, sizes: list[Any]) -> Tensor:
    for i, wanted in zip(absolute(call.attribute("axes") or range(x.ndim), x.ndim), sizes, strict=True):
        length = x.shape[i]
        if length > wanted:
            x = x.narrow(i, (length - wanted) // 2, wanted)
        elif length < wanted:
            before = (wanted - length) // 2
            x = torch.nn.functional.pad(x, [0, 0] * (x.ndim - 1 - i) + [before, wanted - length - before])
    return x


@operator("ReverseSequence", since=10)
def reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    time, batch = call.attribute("time_axis", 0), call.attribute("batch_axis", 1)
    steps = torch.arange(x.shape[time]).reshape([-1 if i == time else 1 for i in range(x.ndim)])
    ends = lengths.long().reshape([-1 if i == batch else 1 for i in range(x.ndim)])
    at = torch.where(steps < ends, ends - 1 - steps, steps)
    return torch.gather(x, time, at.expand(x.shape))


@operator("Compress", since=9, known=(1,))
def compress(call: Call, x: Tensor, condition: list[Any]) -> Tensor:
    axis = call.attribute("axis")
    at = torch.tensor([i for i, keep in enumerate(condition) if keep], dtype=torch.long)
    return torch.index_select(x.reshape(-1) if axis is None else x, axis or 0, at)


@operator("NonZero", known=(0,))
def nonzero(call: Call, x: Any) -> Tensor:
    raise call.error("looks for zeros among sizes that are free")  # what is known is done by `arithmetic`
