"""`com.microsoft`: attention as ONNX Runtime fuses it. Networks are run on whole sequences: a cache of earlier keys and
values is taken in where it is a tensor like any other, and refused where its length is said apart from its shape."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.compression.formats.onnx.operators.attention import (
    attend,
    combined,
    joined,
    positions,
    rotated,
    scores,
    split_heads,
    weighted,
)
from worker.compression.formats.onnx.table import MICROSOFT, Call, operator


def _key_mask(call: Call, mask: Tensor | None, keys: Any, batch: Any) -> Tensor | None:
    """Numbers to add to the scores, from lengths `[N]` (or ends and starts `[2 N]`) or a mask of ones: `[N, S]`,
    `[N, T, S]`, `[N, 1, T, S]`."""
    if mask is None:
        return None
    if mask.ndim == 1:
        steps = torch.arange(keys)
        allowed = steps < mask[:batch].unsqueeze(1)
        if mask.shape[0] != batch:
            allowed = allowed & (steps >= mask[batch : 2 * batch].unsqueeze(1))
    else:
        allowed = mask > 0
    shape = {2: (slice(None), None, None), 3: (slice(None), None), 4: ()}[allowed.ndim]
    return torch.where(allowed[shape], 0.0, float(call.attribute("mask_filter_value", -10000.0)))


def _attended(
    call: Call, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, past: Any
) -> Tensor:
    """`[N, T, H · D]`. `past`: how many keys come before the first query."""
    causal = bool(call.attribute("unidirectional", 0))
    scale = call.attribute("scale") or None
    if causal and key_mask is None and bias is None and isinstance(past, int) and past == 0:
        return joined(attend(q, k, v, None, True, scale))
    mask = combined(key_mask, bias, positions(q.shape[2], k.shape[2], past) <= 0 if causal else None)
    return joined(attend(q, k, v, mask, False, scale))


@operator("Attention", domain=MICROSOFT, weights={1: "weight", 2: "bias"})
def attention(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None,
    past: Tensor | None = None, scores_bias: Tensor | None = None, length: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """With its projection: `weight [in, Q + K + V]`. `past`, and the second result: `[2, N, H, S, D]`."""
    if call.attribute("do_rotary", 0) or length is not None:
        raise call.error("turns positions, or writes into a cache that it shares")
    heads = call.required("num_heads")
    sizes = call.attribute("qkv_hidden_sizes") or [weight.shape[1] // 3] * 3
    q, k, v = (split_heads(y, heads) for y in F.linear(x, weight.t(), bias).split(sizes, -1))
    before: Any = 0
    if past is not None:
        before = past.shape[3]
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    y = _attended(call, q, k, v, _key_mask(call, mask, k.shape[2], x.shape[0]), scores_bias, before)
    return (y, torch.stack([k, v])) if call.wants(1) else (y,)


@operator("MultiHeadAttention", domain=MICROSOFT, weights={3: "bias"})
def multi_head_attention(
    call: Call, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, bias: Tensor | None = None,
    mask: Tensor | None = None, scores_bias: Tensor | None = None, past_k: Tensor | None = None,
    past_v: Tensor | None = None, length: Any = None, beams: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Each `[N, T, H · D]`; or packed: all three `[N, T, H, 3, D]`, keys and values `[N, S, H, 2, D]`. Keys and values
    may come as heads already."""
    if length is not None or beams is not None:
        raise call.error("writes into a cache that it shares")
    heads = call.required("num_heads")
    if q.ndim == 5:
        q, k, v = (y.flatten(2) for y in q.unbind(3))
    elif k is not None and k.ndim == 5:
        k, v = (y.flatten(2) for y in k.unbind(3))
    if k is None or v is None:
        raise call.error("lacks its keys or values")
    if bias is not None:
        width, deep = q.shape[-1], bias.shape[0] - 2 * q.shape[-1]
        b_q, b_k, b_v = bias.split([width, width, deep])
        q, k, v = q + b_q, k + b_k if k.ndim == 3 else k, v + b_v if v.ndim == 3 else v
    queries = split_heads(q, heads)
    keys, values = (x if x.ndim == 4 else split_heads(x, heads) for x in (k, v))
    before: Any = 0
    if past_k is not None and past_v is not None:
        before = past_k.shape[2]
        keys, values = torch.cat([past_k, keys], 2), torch.cat([past_v, values], 2)
    key_mask = _key_mask(call, mask, keys.shape[2], queries.shape[0])
    return _attended(call, queries, keys, values, key_mask, scores_bias, before), keys, values


@operator("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(
    call: Call, q: Tensor, k: Tensor | None, v: Tensor | None, past_k: Tensor | None, past_v: Tensor | None,
    lengths: Any, total: Any, cos: Tensor | None = None, sin: Tensor | None = None, at: Tensor | None = None,
    scores_bias: Tensor | None = None, *others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A whole sequence, without a cache: what is padded comes last, and nothing before it looks there."""
    if any(x is not None for x in (past_k, past_v)) and not _is_empty(past_k):
        raise call.error("continues a sequence from a cache; only whole sequences can be trained on")
    if any(x is not None for x in others) or call.attribute("smooth_softmax", 0) == 1:
        raise call.error("has an attention sink, norms of its own, or a quantized cache")
    heads, own = call.required("num_heads"), call.required("kv_num_heads")
    if k is None or v is None:
        size = q.shape[-1] // (heads + 2 * own)
        q, k, v = q.split([heads * size, own * size, own * size], -1)
    queries, keys, values = split_heads(q, heads), split_heads(k, own), split_heads(v, own)
    if call.attribute("do_rotary", 0):
        assert cos is not None
        assert sin is not None
        turn = [_at(t, at, queries.shape[2]) for t in (cos, sin)]
        size, interleaved = 2 * cos.shape[1], bool(call.attribute("rotary_interleaved", 0))
        queries, keys = (rotated(x, turn[0], turn[1], size, interleaved) for x in (queries, keys))
    scale, softcap = call.attribute("scale") or None, call.attribute("softcap", 0.0)
    window = call.attribute("local_window_size", -1)
    if window < 0 and scores_bias is None and not softcap:
        return joined(attend(queries, keys, values, None, True, scale)), keys, values
    ahead = positions(queries.shape[2], keys.shape[2])
    allowed = ahead <= 0 if window < 0 else (ahead <= 0) & (ahead > -window)
    mask = combined(allowed, scores_bias)
    if softcap:
        return joined(weighted(scores(queries, keys, scale, softcap)[1], values, mask)[0]), keys, values
    return joined(attend(queries, keys, values, mask, False, scale)), keys, values


def _is_empty(past: Tensor | None) -> bool:
    return past is None or (isinstance(past.shape[2], int) and past.shape[2] == 0)


def _at(table: Tensor, at: Tensor | None, steps: Any) -> Tensor:
    """Rows of a table of angles for every place, `[N or 1, 1, T, D]`."""
    if at is None:
        return table[:steps].unsqueeze(0).unsqueeze(0)
    return F.embedding(at.long(), table).unsqueeze(1)


@operator("RotaryEmbedding", domain=MICROSOFT)
def rotary(call: Call, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`at`: every place `[N, T]`, or the first one `[1]`."""
    if call.attribute("is_packed_batching", 0):
        raise call.error("has sequences packed one after another")
    size, heads = call.attribute("rotary_embedding_dim", 0), call.attribute("num_heads", 0)
    flat = x.ndim == 3
    if flat:
        x = split_heads(x, heads or x.shape[-1] // (2 * cos.shape[1]))
    if at.ndim == 1:
        at = (at + torch.arange(x.shape[2])).unsqueeze(0)
    y = rotated(x, _at(cos, at, None), _at(sin, at, None), size, bool(call.attribute("interleaved", 0)))
    return joined(y) if flat else y


# --------------------------------------------------------------------------------------------------- relative positions


@operator("RelativePositionBias", domain=MICROSOFT, known=(1, 2), weights={0: "weight"})
def relative_position_bias(call: Call, table: Tensor, queries: Any, keys: Any) -> Tensor:
    """T5's: near distances have a bucket each, far ones share them by their logarithm. `[1, H, T, S]`; the table's
    numbers lie as `[H, buckets]`, whatever its shape says (ONNX Runtime's fusion writes them so)."""
    count, heads = table.shape
    ahead = positions(*(n[0] if isinstance(n, list) else n for n in (queries, keys)))
    both = bool(call.attribute("is_bidirectional", 0))
    each = count // 2 if both else count
    distance = ahead.abs() if both else (-ahead).clamp(min=0)
    near = each // 2
    share = torch.log(distance.clamp(min=1) / near) / math.log(call.required("max_distance") / near)
    bucket = torch.where(distance < near, distance, (near + (share * (each - near)).long()).clamp(max=each - 1))
    if both:
        bucket = bucket + (ahead > 0) * each
    return table.reshape(heads, count)[:, bucket].unsqueeze(0)


@operator("GatedRelativePositionBias", domain=MICROSOFT, weights={1: "bias", 3: "weight", 4: "bias", 5: "scale"})
def gated_relative_position_bias(
    call: Call, q: Tensor, bias: Tensor, relative: Tensor, weight: Tensor, shift: Tensor, scale: Tensor,
    offsets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """WavLM's: `relative [1, H, T, T]`, times what two gates make of each query."""
    if offsets is not None:
        raise call.error("has sequences packed one after another")
    queries = split_heads(q + bias, call.required("num_heads"))
    gates = torch.sigmoid((torch.matmul(queries, weight) + shift).unflatten(-1, (2, -1)).sum(-1))
    update, reset = gates.chunk(2, -1)
    return (update * (reset * scale - 1.0) + 2.0) * relative
