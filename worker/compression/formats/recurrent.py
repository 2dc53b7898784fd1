"""Recurrent layers in exports, whose number of steps stays free: torch runs them step by step to find out how large
their results are, which fixes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import decomposition_table
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_symbols

aten = torch.ops.aten
LAYERS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)


@contextlib.contextmanager
def free_steps() -> Iterator[None]:
    """Within it, tracing takes the sizes of recurrent layers' results from those of their inputs. Nothing may be
    computed, and every `aten.rnn_*` has to be kept whole (`translations`)."""
    kernels = {layer: dict(layer.py_kernels) for layer in LAYERS}
    decompositions: dict[Any, Any] = {layer: decomposition_table[layer] for layer in LAYERS}
    try:
        for layer in LAYERS:
            layer.py_kernels.update(dict.fromkeys(KEYS, _empty_results))
            layer._dispatch_cache.clear()
            decomposition_table[layer] = _empty_results
        yield
    finally:
        decomposition_table.update(decompositions)
        for layer, before in kernels.items():
            layer.py_kernels.clear()
            layer.py_kernels.update(before)
            layer._dispatch_cache.clear()


def steps_over_the_batch(exported: ExportedProgram) -> bool:
    """Whether a layer takes the samples of a batch for the steps of one sequence."""
    nodes = list(exported.graph.nodes)
    first = next(node for node in nodes if node.name == exported.graph_signature.user_inputs[0])
    batch = free_symbols(first.meta["val"].shape[0])
    layers = (node for node in nodes if node.target in LAYERS)
    return any(batch & free_symbols(n.args[0].meta["val"].shape[1 if n.args[-1] else 0]) for n in layers)


def _empty_results(
    x: Tensor, hx: Tensor | Sequence[Tensor], params: Any, has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    states = [hx] if isinstance(hx, Tensor) else hx
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    return (x.new_empty([*x.shape[:-1], width]), *(torch.empty_like(state) for state in states))
