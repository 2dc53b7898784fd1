"""Weights that are stored without their zeros, as weights with them: nothing else knows of sparse ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx

from worker.compression.errors import UnsafeModel, UnsupportedModel
from worker.compression.formats.onnx.reading import MAX_RANK, Source

MAX_NUMBERS = 2**26
"""Of all of them together: a few bytes may ask for any size."""


def densify(source: Source) -> None:
    """In place. Raises `UnsupportedModel` where they would be too large, `UnsafeModel` where they are damaged."""
    count = 0
    for graph in _graphs(source.model):
        for sparse in graph.sparse_initializer:
            count += _count(sparse, count)
            graph.initializer.append(_dense(source, sparse))
        del graph.sparse_initializer[:]
    for node in _nodes(source.model):
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") and node.op_type == "Constant":
                count += _count(attribute.sparse_tensor, count)
                dense = _dense(source, attribute.sparse_tensor)
                attribute.CopyFrom(onnx.helper.make_attribute("value", dense))


def _count(sparse: onnx.SparseTensorProto, others: int) -> int:
    """Numbers, zeros among them."""
    count = math.prod(max(n, 1) for n in sparse.dims)
    if others + count > MAX_NUMBERS:
        raise UnsupportedModel(
            f"The sparse weights {sparse.values.name[:100]!r} and those before are {others + count} numbers with their "
            f"zeros; {MAX_NUMBERS} can be read.",
            hint="Export the network with dense weights.",
        )
    return count


def _dense(source: Source, sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """`values [k]`; `indices [k]`, into the numbers in a row, or `[k, rank]`."""
    name, shape = sparse.values.name, tuple(sparse.dims)
    values, indices = source.array(sparse.values), source.array(sparse.indices)
    by_axis = indices.ndim == 2
    bounds = np.array(shape if by_axis else [math.prod(shape)], np.int64)
    if (
        len(shape) > MAX_RANK
        or any(n < 0 for n in shape)
        or indices.dtype != np.int64
        or values.ndim != 1
        or indices.shape != ((len(values), len(shape)) if by_axis else (len(values),))
        or (indices < 0).any()
        or (indices >= bounds).any()
    ):
        raise UnsafeModel(f"The sparse weights {name[:100]!r} have numbers outside of their shape {list(shape)[:40]}.")
    dense = np.zeros(shape, values.dtype)
    if by_axis:
        dense[tuple(indices.T)] = values
    else:
        dense.reshape(-1)[indices] = values
    return onnx.numpy_helper.from_array(dense, name)


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The model's own, and those in nodes. (How deep they are was checked before.)"""
    yield model.graph
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from [attribute.g] if attribute.HasField("g") else []
            yield from attribute.graphs


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    todo = [model.graph.node, *(function.node for function in model.functions)]
    while todo:
        for node in todo.pop():
            yield node
            for attribute in node.attribute:
                todo += [attribute.g.node] if attribute.HasField("g") else []
                todo += [graph.node for graph in attribute.graphs]
