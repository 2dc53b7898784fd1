"""`com.microsoft`: what ONNX Runtime's optimizer and exporters fuse, as the operators that it was. Attention is in
`fused_attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.compression.formats.onnx.operators.common import axis
from worker.compression.formats.onnx.operators.convolution import conv
from worker.compression.formats.onnx.operators.linear import gemm
from worker.compression.formats.onnx.operators.norms import rms
from worker.compression.formats.onnx.operators.pooling import max_pool
from worker.compression.formats.onnx.operators.recurrent import ACTIVATIONS
from worker.compression.formats.onnx.table import EVERY, MICROSOFT, Call, operator

# ------------------------------------------------------------------------------------------------------------ products


@operator("FusedMatMul", "TransposeMatMul", domain=MICROSOFT, weights={0: "weight", 1: "weight"})
def fused_matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """α · A' · B'. `transBatch`: the last batch axis changes place with the rows."""
    if call.attribute("transBatchA", 0):
        a = a.movedim(0, -2)
    if call.attribute("transBatchB", 0):
        b = b.movedim(0, -2)
    if call.attribute("transA", 0) and a.ndim > 1:
        a = a.transpose(-1, -2)
    if call.attribute("transB", 0) and b.ndim > 1:
        b = b.transpose(-1, -2)
    alpha = call.attribute("alpha", 1.0)
    return torch.matmul(a, b) if alpha == 1.0 else torch.matmul(a, b) * alpha


@operator("FusedGemm", domain=MICROSOFT, weights={0: "weight", 1: "weight", 2: "bias"})
def fused_gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    parameters = [call.attribute("activation_alpha"), call.attribute("activation_beta")]
    return _activated(call, gemm(call, a, b, c), [p for p in parameters if p is not None])


@operator("GemmFastGelu", domain=MICROSOFT, weights={0: "weight", 1: "weight", 2: "bias"})
def gemm_gelu(call: Call, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    product = torch.matmul(a, b)
    return F.gelu(product if bias is None else product + bias, approximate="tanh")


@operator("FusedConv", domain=MICROSOFT, weights={1: "weight", 2: "bias"})
def fused_conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    y = conv(call, x, weight, bias)
    return _activated(call, y if z is None else y + z, call.attribute("activation_params") or [])


@operator("NhwcConv", "NhwcFusedConv", domain=MICROSOFT, weights={1: "weight", 2: "bias"})
def conv_channels_last(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None, z: Tensor | None = None
) -> Tensor:
    """`[N, H, W, C]` → `[N, H', W', C']`; weights `[C', H, W, C]`."""
    y = conv(call, x.movedim(-1, 1), weight.movedim(-1, 1), bias).movedim(1, -1)
    return _activated(call, y if z is None else y + z, call.attribute("activation_params") or [])


@operator("NhwcMaxPool", domain=MICROSOFT)
def max_pool_channels_last(call: Call, x: Tensor) -> Tensor:
    result = max_pool(call, x.movedim(-1, 1))
    assert isinstance(result, Tensor)
    return result.movedim(1, -1)


def _activated(call: Call, x: Tensor, parameters: list[float]) -> Tensor:
    name = call.attribute("activation", "").lower()
    if not name:
        return x
    if name == "clip":
        return F.relu6(x) if parameters == [0.0, 6.0] else torch.clamp(x, *parameters)
    if name not in ACTIVATIONS:
        raise call.error(f"has the activation {name!r}")
    function, *defaults = ACTIVATIONS[name]
    own = [d for d in defaults if d is not None]
    return function(x, *(parameters[: len(own)] + own[len(parameters) :]))


# ---------------------------------------------------------------------------------------------------------- activations


@operator("BiasGelu", domain=MICROSOFT, weights={1: "bias"})
def bias_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@operator("FastGelu", domain=MICROSOFT, weights={1: "bias"})
def fast_gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain=MICROSOFT)
def quick_gelu(call: Call, x: Tensor) -> Tensor:
    alpha = call.attribute("alpha", 1.702)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(x * alpha)


@operator("BiasSplitGelu", domain=MICROSOFT, weights={1: "bias"})
def bias_split_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    """The left half times GELU of the right one."""
    left, right = (x + bias).chunk(2, -1)
    return left * F.gelu(right)


@operator("BiasAdd", domain=MICROSOFT, weights={1: "bias"})
def bias_add(call: Call, x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    return x + bias + skip


@operator("BiasSoftmax", domain=MICROSOFT)
def bias_softmax(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    """Over all axes from `axis` on; the bias broadcasts over the inner or the outer batch axes."""
    first = axis(call.attribute("axis", 1), x.ndim)
    if not call.attribute("is_inner_broadcast", 1) or first != x.ndim - 1:
        raise call.error("is over several axes, or has a bias for the outer ones")
    return torch.softmax(x + bias, -1)


# -------------------------------------------------------------------------------------------------------- normalisation


@operator("SkipLayerNormalization", domain=MICROSOFT, weights={2: "scale", 3: "bias", 4: "bias"})
def skip_layer_norm(
    call: Call, x: Tensor, skip: Tensor, scale: Tensor, shift: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    total = x + skip if bias is None else x + skip + bias
    epsilon = call.attribute("epsilon", 1e-12)
    mean, deviation = _statistics(call, total, epsilon)
    return F.layer_norm(total, [total.shape[-1]], scale, shift, epsilon), mean, deviation, total


@operator("SkipSimplifiedLayerNormalization", domain=MICROSOFT, weights={2: "scale", 3: "bias"})
def skip_rms_norm(call: Call, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    total = x + skip if bias is None else x + skip + bias
    epsilon = call.attribute("epsilon", 1e-12)
    mean, deviation = _statistics(call, total, epsilon)
    return rms(total, scale, [total.ndim - 1], epsilon), mean, deviation, total


def _statistics(call: Call, x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Only if somebody takes them."""
    if not call.wants(1) and not call.wants(2):
        return x, x
    variance = x.var(-1, correction=0, keepdim=True)
    return x.mean(-1, keepdim=True), torch.rsqrt(variance + epsilon)


@operator("SimplifiedLayerNormalization", weights={1: "scale"})
@operator("SimplifiedLayerNormalization", domain=MICROSOFT, weights={1: "scale"})
def simplified_layer_norm(call: Call, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """ONNX Runtime puts it into ONNX's own domain."""
    over, epsilon = list(range(axis(call.attribute("axis", -1), x.ndim), x.ndim)), call.attribute("epsilon", 1e-5)
    y = rms(x, scale, over, epsilon)
    if not call.wants(1):
        return (y,)
    return y, torch.rsqrt(x.square().mean(over, keepdim=True) + epsilon)


@operator(
    "EmbedLayerNormalization",
    domain=MICROSOFT,
    weights={2: "weight", 3: "weight", 4: "weight", 5: "scale", 6: "bias"},
)
def embed_layer_norm(
    call: Call, tokens: Tensor, segments: Tensor | None, words: Tensor, places: Tensor, kinds: Tensor | None,
    scale: Tensor, bias: Tensor, mask: Tensor | None = None, at: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of `tokens [N, T]`; also how many of them count."""
    where = torch.arange(tokens.shape[1]).unsqueeze(0) if at is None else at.long()
    total = F.embedding(tokens.long(), words) + F.embedding(where, places)
    if segments is not None and kinds is not None:
        total = total + F.embedding(segments.long(), kinds)
    count = torch.zeros_like(tokens[:, 0]) if mask is None else mask.sum(1).to(torch.int32)
    epsilon = call.attribute("epsilon", 1e-12)
    return F.layer_norm(total, [total.shape[-1]], scale, bias, epsilon), count.to(torch.int32), total


@operator("GroupNorm", domain=MICROSOFT, weights={1: "scale", 2: "bias"})
def group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    last = bool(call.attribute("channels_last", 1))
    planes = x.movedim(-1, 1) if last else x
    y = F.group_norm(planes, call.required("groups"), scale, bias, call.attribute("epsilon", 1e-5))
    y = F.silu(y) if call.required("activation") else y
    return y.movedim(1, -1) if last else y


@operator("SkipGroupNorm", domain=MICROSOFT, weights={1: "scale", 2: "bias", 4: "bias"})
def skip_group_norm(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor, skip: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The skip is `[N, H, W, C]` or `[N, C]`, of every place."""
    last = bool(call.attribute("channels_last", 1))
    if skip.ndim == 2:
        skip = skip.unsqueeze(1).unsqueeze(1) if last else skip[..., None, None]
    total = x + skip
    if shift is not None:
        total = total + (shift if last else shift[:, None, None])
    return group_norm(call, total, scale, bias), total


# --------------------------------------------------------------------------------------- ONNX's own, under another name


@operator("BiasDropout", domain=MICROSOFT, known=(3, 4), weights={1: "bias"})
def bias_dropout(
    call: Call, x: Tensor, bias: Tensor, skip: Tensor | None = None, ratio: Any = None, training: Any = None
) -> tuple[Tensor, ...]:
    """Also which numbers were kept: all of them, as no network here comes in training mode."""
    if training:
        raise call.error("is in training mode")
    y = F.dropout(x + bias, 0.5 if ratio is None else ratio, training=False)
    y = y if skip is None else y + skip
    return (y, torch.ones_like(y, dtype=torch.bool)) if call.wants(1) else (y,)


@operator("Inverse", domain=MICROSOFT)
def inverse(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.inv_ex(x).inverse  # inv fails at zeros, with which networks are tried


@operator("CDist", domain=MICROSOFT, weights={EVERY: "weight"})
def distances(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Of every row to every row."""
    found = torch.cdist(a, b)
    return found if call.attribute("metric", "euclidean") == "euclidean" else found.square()
