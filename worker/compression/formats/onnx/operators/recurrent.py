"""LSTM, GRU and RNN: one `aten.lstm`, `gru` or `rnn_*` call where torch has it, else step by step.

ONNX stacks the weights of the directions and orders gates in its own way; torch's weights are made of them either
here, while the network runs, or once and for all in the file's constants (`unpacking`), whose nodes are in the domain
`UNPACKED` with the inputs `X, sequence_lens, initial_h, initial_c` and then each direction's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.compression.formats.onnx.graph import UNPACKED, Known
from worker.compression.formats.onnx.operators.common import plain_tensor
from worker.compression.formats.onnx.table import EVERY, Call, operator

GATES = {"LSTM": [0, 2, 3, 1], "GRU": [1, 0, 2], "RNN": [0]}
"""Place of torch's gates among ONNX's: i f g o of i o f c, r z n of z r h."""
DEFAULTS = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}
MAX_STEPS = 1000
"""Longer ones, step by step, would make a graph that nobody can train."""


@dataclass(frozen=True)
class Weights:
    """Of one direction, in torch's order: `w_ih [gates · H, in]`, `w_hh [gates · H, H]`, biases `[gates · H]`, and an
    LSTM's peepholes `[3 · H]` (i o f)."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    peepholes: Tensor | None = None

    def used(self) -> list[Tensor]:
        """As torch's layers take them."""
        return [w for w in (self.w_ih, self.w_hh, self.b_ih, self.b_hh) if w is not None]


def unpacked(kind: str, w: Any, r: Any, b: Any, p: Any, join: Callable[[list[Any]], Any]) -> list[list[Any]]:
    """`W [D, gates · H, in]`, `R`, `B [D, 2 · gates · H]`, `P [D, 3 · H]` → each direction's w_ih, w_hh, b_ih, b_hh,
    peepholes (None where there are none). For tensors and arrays alike; `join`: concatenation along axis 0."""
    order, size = GATES[kind], r.shape[-1]

    def ordered(x: Any, first: int = 0) -> Any:
        parts = [x[(first + i) * size : (first + i + 1) * size] for i in order]
        return join(parts) if len(parts) > 1 else parts[0]

    return [
        [
            ordered(w[d]),
            ordered(r[d]),
            None if b is None else ordered(b[d]),
            None if b is None else ordered(b[d], len(order)),
            None if p is None else p[d],
        ]
        for d in range(w.shape[0])
    ]


@operator("LSTM", either=(4, 5, 6), weights={1: "weight", 2: "weight", 3: "bias", 7: "weight"})
def lstm(
    call: Call, x: Tensor, w: Tensor, r: Tensor, b: Any = None, lens: Any = None, h: Any = None, c: Any = None,
    p: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _layer(call, x, [Weights(*d) for d in unpacked("LSTM", w, r, b, p, torch.cat)], lens, [h, c])


@operator("GRU", "RNN", either=(4, 5), weights={1: "weight", 2: "weight", 3: "bias"})
def gru_or_rnn(
    call: Call, x: Tensor, w: Tensor, r: Tensor, b: Any = None, lens: Any = None, h: Any = None
) -> tuple[Tensor, ...]:
    return _layer(call, x, [Weights(*d) for d in unpacked(call.node.operator, w, r, b, None, torch.cat)], lens, [h])


@operator("LSTM", "GRU", "RNN", domain=UNPACKED, either=(1, 2, 3), weights={EVERY: "weight"})
def layer(call: Call, x: Tensor, lens: Any, h: Any, c: Any, *weights: Any) -> tuple[Tensor, ...]:
    directions = [Weights(*weights[i : i + 5]) for i in range(0, len(weights), 5)]
    return _layer(call, x, directions, lens, [h, c] if call.node.operator == "LSTM" else [h])


def _layer(call: Call, x: Tensor, weights: list[Weights], lens: Any, states: list[Any]) -> tuple[Tensor, ...]:
    """Y `[T, D, B, H]`, Y_h and Y_c `[D, B, H]`; with `layout = 1` the batch comes first."""
    first = bool(call.attribute("layout", 0))
    if first:
        x = x.transpose(0, 1)
        states = [s.transpose(0, 1) if isinstance(s, Tensor) else s for s in states]
    count, size = len(weights), weights[0].w_hh.shape[-1]
    states = [_state(s, x, count, size) for s in states]
    lengths = _lengths(lens, x)
    plain = _is_plain(call, weights) and not (lengths is not None and len(states) == 2 and call.wants(2))
    y, *last = (_at_once if plain else _step_by_step)(call, x, weights, lengths, states)
    y = y.reshape(y.shape[0], -1, count, size)
    y = y.transpose(0, 1) if first else y.permute(0, 2, 1, 3)
    return (y, *(s.transpose(0, 1) if first else s for s in last))


def _state(state: Any, x: Tensor, count: int, size: int) -> Tensor:
    """The first state `[D, B, H]`; a constant one serves any batch."""
    if state is None or (isinstance(state, Known) and not state.is_symbolic and not state.numbers.any()):
        return torch.zeros(count, x.shape[1], size, dtype=x.dtype)
    if isinstance(state, Known):
        state = plain_tensor(state)
        state = state.transpose(0, 1) if state.shape[0] != count else state
    return state.expand(-1, x.shape[1], -1) if state.shape[1] == 1 and x.shape[1] != 1 else state


def _lengths(lens: Any, x: Tensor) -> Tensor | None:
    """None where every sequence is as long as the tensor."""
    if lens is None or (isinstance(lens, Known) and not lens.is_symbolic and (lens.numbers == x.shape[0]).all()):
        return None
    return (plain_tensor(lens) if isinstance(lens, Known) else lens).long()


def _activations(call: Call, count: int) -> list[list[Callable[[Tensor], Tensor]]]:
    """Each direction's activations."""
    kind = call.node.operator
    names = [n.lower() for n in call.attribute("activations") or DEFAULTS[kind] * count]
    alphas, betas = list(call.attribute("activation_alpha") or []), list(call.attribute("activation_beta") or [])
    functions = []
    for name in names:
        if name not in ACTIVATIONS:
            raise call.error(f"has the activation {name!r}")
        function, alpha, beta = ACTIVATIONS[name]
        alpha = alphas.pop(0) if alphas and alpha is not None else alpha
        beta = betas.pop(0) if betas and beta is not None else beta
        functions.append(_bound(function, alpha, beta))
    each = len(DEFAULTS[kind])
    return [functions[i : i + each] for i in range(0, each * count, each)]


def _bound(function: Callable[..., Tensor], alpha: float | None, beta: float | None) -> Callable[[Tensor], Tensor]:
    given = [n for n in (alpha, beta) if n is not None]
    return lambda x: function(x, *given)


ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], float | None, float | None]] = {
    "relu": (F.relu, None, None),
    "tanh": (torch.tanh, None, None),
    "sigmoid": (torch.sigmoid, None, None),
    "affine": (lambda x, a, b: x * a + b, 1.0, 0.0),
    "leakyrelu": (F.leaky_relu, 0.01, None),
    "thresholdedrelu": (lambda x, a: torch.where(x > a, x, 0.0), 1.0, None),
    "scaledtanh": (lambda x, a, b: a * torch.tanh(b * x), 1.0, 1.0),
    "hardsigmoid": (lambda x, a, b: torch.clamp(x * a + b, 0.0, 1.0), 0.2, 0.5),
    "elu": (F.elu, 1.0, None),
    "softsign": (F.softsign, None, None),
    "softplus": (F.softplus, None, None),
}
"""Name → function, alpha, beta where it has them."""


def _is_plain(call: Call, weights: Sequence[Weights]) -> bool:
    """Whether torch has the layer."""
    kind = call.node.operator
    names = [n.lower() for n in call.attribute("activations") or DEFAULTS[kind] * len(weights)]
    usual = names == DEFAULTS[kind] * len(weights) or (kind == "RNN" and set(names) == {"relu"})
    return (
        usual
        and not call.attribute("clip")
        and not call.attribute("input_forget", 0)
        and weights[0].peepholes is None
        and (kind != "GRU" or bool(call.attribute("linear_before_reset", 0)))
    )


# ------------------------------------------------------------------------------------------------------------ at once


def _at_once(
    call: Call, x: Tensor, weights: list[Weights], lengths: Tensor | None, states: list[Tensor]
) -> tuple[Tensor, ...]:
    """`y [T, B, D · H]` and the last states, by torch's own layer."""
    backward = call.attribute("direction", "forward") == "reverse"
    if len(weights) == 2 and lengths is None:
        return _torch_layer(call, x, [*weights[0].used(), *weights[1].used()], states, True)
    outs, lasts = [], []
    for d, one in enumerate(weights):
        turned = backward or d == 1
        y, *last = _torch_layer(
            call, _turned(x, lengths) if turned else x, one.used(), [s[d : d + 1] for s in states], False
        )
        if lengths is not None:
            last = [_at_the_end(y, lengths)]
            y = y * _inside(y, lengths).to(y.dtype)
        outs.append(_turned(y, lengths) if turned else y)
        lasts.append(last)
    if len(weights) == 1:
        return (outs[0], *lasts[0])
    return (torch.cat(outs, -1), *(torch.cat(s, 0) for s in zip(*lasts, strict=True)))


def _torch_layer(call: Call, x: Tensor, weights: list[Tensor], states: list[Tensor], both: bool) -> tuple[Tensor, ...]:
    kind, biases = call.node.operator, len(weights) == (8 if both else 4)
    settings: Any = (weights, biases, 1, 0.0, False, both, False)
    if kind == "LSTM":
        return torch.lstm(x, states, *settings)
    if kind == "GRU":
        return torch.gru(x, states[0], *settings)
    relu = [n.lower() for n in call.attribute("activations") or []][:1] == ["relu"]
    return (torch.rnn_relu if relu else torch.rnn_tanh)(x, states[0], *settings)


def _inside(x: Tensor, lengths: Tensor) -> Tensor:
    """`[T, B, 1]`: whether a step belongs to its sequence."""
    return (torch.arange(x.shape[0], device=x.device).unsqueeze(1) < lengths).unsqueeze(-1)


def _at_the_end(y: Tensor, lengths: Tensor) -> Tensor:
    """The last step of each sequence, `[1, B, H]`; zero where there is none."""
    at = (lengths - 1).clamp(min=0).reshape(1, -1, 1).expand(1, y.shape[1], y.shape[2])
    return torch.gather(y, 0, at) * (lengths > 0).reshape(1, -1, 1).to(y.dtype)


def _turned(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Every sequence backwards; what comes after its end stays."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    at = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return torch.gather(x, 0, at.unsqueeze(-1).expand(-1, -1, x.shape[2]))


# -------------------------------------------------------------------------------------------------------- step by step


def _step_by_step(
    call: Call, x: Tensor, weights: list[Weights], lengths: Tensor | None, states: list[Tensor]
) -> tuple[Tensor, ...]:
    """The same for what torch has no layer for: peepholes, `clip`, other activations, a GRU that resets first."""
    steps = x.shape[0]
    if not isinstance(steps, int):
        raise call.error("is computed step by step (torch has no such layer), and its number of steps is not fixed")
    if steps > MAX_STEPS:
        raise call.error(f"is computed step by step, and has {steps} steps; at most {MAX_STEPS} are supported")
    cell = {"LSTM": _lstm_cell, "GRU": _gru_cell, "RNN": _rnn_cell}[call.node.operator]
    functions = _activations(call, len(weights))
    backward = call.attribute("direction", "forward") == "reverse"
    inside = None if lengths is None else _inside(x, lengths)
    outs, lasts = [], []
    for d, one in enumerate(weights):
        turned = backward or d == 1
        sequence = _turned(x, lengths) if turned else x
        gates = F.linear(sequence, one.w_ih, one.b_ih)
        state, out = [s[d] for s in states], []
        for t in range(steps):
            new = cell(call, gates[t], one, state, functions[d])
            if inside is not None:
                new = [torch.where(inside[t], n, s) for n, s in zip(new, state, strict=True)]
                out.append(torch.where(inside[t], new[0], 0.0))
            else:
                out.append(new[0])
            state = new
        y = torch.stack(out)
        outs.append(_turned(y, lengths) if turned else y)
        lasts.append(state)
    return (torch.cat(outs, -1), *(torch.stack(s) for s in zip(*lasts, strict=True)))


def _clipped(call: Call, x: Tensor) -> Tensor:
    limit = call.attribute("clip")
    return torch.clamp(x, -limit, limit) if limit else x


Functions = list[Callable[[Tensor], Tensor]]


def _lstm_cell(call: Call, gates: Tensor, w: Weights, state: list[Tensor], functions: Functions) -> list[Tensor]:
    h, c = state
    f, g, out = functions
    i_gate, f_gate, c_gate, o_gate = (gates + F.linear(h, w.w_hh, w.b_hh)).chunk(4, -1)
    p_i, p_o, p_f = (0.0, 0.0, 0.0) if w.peepholes is None else w.peepholes.chunk(3)
    i = f(_clipped(call, i_gate + p_i * c))
    keep = 1 - i if call.attribute("input_forget", 0) else f(_clipped(call, f_gate + p_f * c))
    c = keep * c + i * g(_clipped(call, c_gate))
    return [f(_clipped(call, o_gate + p_o * c)) * out(c), c]


def _gru_cell(call: Call, gates: Tensor, w: Weights, state: list[Tensor], functions: Functions) -> list[Tensor]:
    (h,) = state
    f, g = functions
    size = h.shape[-1]
    x_rz, x_n = gates.split([2 * size, size], -1)
    w_rz, w_n = w.w_hh.split([2 * size, size])
    b_rz, b_n = (None, None) if w.b_hh is None else w.b_hh.split([2 * size, size])
    r, z = (f(_clipped(call, gate)) for gate in (x_rz + F.linear(h, w_rz, b_rz)).chunk(2, -1))
    after = bool(call.attribute("linear_before_reset", 0))
    reset = r * F.linear(h, w_n, b_n) if after else F.linear(r * h, w_n, b_n)
    return [(1 - z) * g(_clipped(call, x_n + reset)) + z * h]


def _rnn_cell(call: Call, gates: Tensor, w: Weights, state: list[Tensor], functions: Functions) -> list[Tensor]:
    return [functions[0](_clipped(call, gates + F.linear(state[0], w.w_hh, w.b_hh)))]
