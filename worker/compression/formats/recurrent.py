"""Recurrent layers in exports: the number of their steps stays free, and each layer one operator.

torch runs them step by step to find out how large their results are, which fixes the number of steps, and has no ONNX
for a plain `RNN`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnxscript
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
    computed, and every `aten.rnn_*` has to be kept whole (`TRANSLATIONS`)."""
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


def _translation(activation: str) -> Callable[..., Any]:
    """`aten.rnn_*` as one ONNX RNN a layer: `W [D, H, in]`, `R [D, H, H]`, `B [D, 2 · H]`."""
    op: Any = onnxscript.opset18

    def rnn(
        input: Any, hx: Any, params: Sequence[Any], has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> tuple[Any, Any]:  # fmt: skip
        directions, each = 2 if bidirectional else 1, 4 if has_biases else 2
        y = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
        lasts = []
        for layer in range(num_layers):
            first = layer * directions
            weights = [params[(first + d) * each : (first + d + 1) * each] for d in range(directions)]
            w, r = (op.Concat(*(op.Unsqueeze(one[i], [0]) for one in weights), axis=0) for i in (0, 1))
            both = [op.Unsqueeze(op.Concat(*one[2:], axis=0), [0]) for one in weights if has_biases]
            y, last = op.RNN(
                y,
                w,
                r,
                op.Concat(*both, axis=0) if has_biases else None,
                None,
                op.Slice(hx, [first], [first + directions], [0]),
                activations=[activation] * directions,
                direction="bidirectional" if bidirectional else "forward",
                hidden_size=hx.shape[2],
            )
            y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1])
            lasts.append(last)
        return op.Transpose(y, perm=[1, 0, 2]) if batch_first else y, op.Concat(*lasts, axis=0)

    return rnn


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.rnn_tanh.input: _translation("Tanh"),
    aten.rnn_relu.input: _translation("Relu"),
}
"""For `torch.onnx.export(custom_translation_table=…)`."""
