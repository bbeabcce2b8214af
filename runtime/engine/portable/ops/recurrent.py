"""Recurrent layers, one step after the other as their definitions read.

Reversed layers return their sequence in the order they computed it, last input first; the backward half of a
bidirectional one stands at its inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glassine.runtime.engine.portable.registry import op

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "scaled_tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "sigmoid_hard": lambda x: (0.2 * x + 0.5).clamp(0, 1),
}


def _run(
    x: Tensor, state: tuple[Tensor, ...], step: Callable[..., tuple[Tensor, ...]], reverse: bool, output_sequence: bool
) -> tuple[Tensor, ...]:
    """Return (every h or the last, (1 or s, b, H)), then the final state."""
    outputs = []
    for row in x.flip(0) if reverse else x:
        state = step(row, *state)
        outputs.append(state[0])
    sequence = torch.stack(outputs if output_sequence else outputs[-1:])
    return (sequence, *state)


@op("rnn")
def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, ...]:
    """x (s, b, I), initial_h (b, H)."""
    offset = torch.zeros_like(weight_ih[:, 0]) if bias is None else bias

    def step(row: Tensor, h: Tensor) -> tuple[Tensor]:
        return (_ACTIVATIONS[activation](row @ weight_ih.T + h @ weight_hh.T + offset),)

    return _run(x, (initial_h,), step, direction == "reverse", output_sequence)


@op("gru")
def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = False,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x (s, b, I), initial_h (b, H); gates in the order reset, output, update.

    `bias` belongs to the hidden side; `reset_after` (iOS 18) applies the reset gate after that side's product.
    """
    zeros = torch.zeros_like(weight_ih[:, 0])
    hidden_bias = (zeros if bias is None else bias).chunk(3)
    x_bias = (zeros if input_bias is None else input_bias).chunk(3)
    (w_r, w_o, w_z), (u_r, u_o, u_z) = weight_ih.chunk(3), weight_hh.chunk(3)
    gate, output = _ACTIVATIONS[recurrent_activation], _ACTIVATIONS[activation]

    def step(row: Tensor, h: Tensor) -> tuple[Tensor]:
        r = gate(row @ w_r.T + x_bias[0] + h @ u_r.T + hidden_bias[0])
        z = gate(row @ w_z.T + x_bias[2] + h @ u_z.T + hidden_bias[2])
        if reset_after:
            o = output(row @ w_o.T + x_bias[1] + r * (h @ u_o.T + hidden_bias[1]))
        else:
            o = output(row @ w_o.T + x_bias[1] + (r * h) @ u_o.T + hidden_bias[1])
        return ((1 - z) * o + z * h,)

    return _run(x, (initial_h,), step, direction == "reverse", output_sequence)


@op("lstm")
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: float | None = None,
) -> tuple[Tensor, ...]:
    """x (s, b, I), initial_h and initial_c (b, directions*H); gates in the order input, forget, output, cell."""
    names = (recurrent_activation, cell_activation, activation)

    def one_way(h: Tensor, c: Tensor, weights: tuple[Tensor | None, ...], reverse: bool) -> tuple[Tensor, ...]:
        return _run(x, (h, c), _lstm_step(weights, names, clip), reverse, output_sequence)

    forward = (weight_ih, weight_hh, bias, peephole)
    if direction != "bidirectional":
        return one_way(initial_h, initial_c, forward, direction == "reverse")
    backward = (weight_ih_back, weight_hh_back, bias_back, peephole_back)
    (h, h_back), (c, c_back) = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
    there, back = one_way(h, c, forward, False), one_way(h_back, c_back, backward, True)
    back = (back[0].flip(0), *back[1:])
    return tuple(torch.cat(pair, -1) for pair in zip(there, back, strict=True))


def _lstm_step(
    weights: tuple[Tensor | None, ...], names: tuple[str, str, str], clip: float | None
) -> Callable[..., tuple[Tensor, ...]]:
    weight_ih, weight_hh, bias, peephole = weights
    assert weight_ih is not None
    assert weight_hh is not None
    offset = torch.zeros_like(weight_ih[:, 0]) if bias is None else bias
    p_i, p_f, p_o = (torch.zeros_like(offset[: offset.shape[0] // 4 * 3]) if peephole is None else peephole).chunk(3)
    recurrent, cell, output = (_ACTIVATIONS[name] for name in names)

    def step(row: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, z = (row @ weight_ih.T + h @ weight_hh.T + offset).chunk(4, -1)
        c_next = recurrent(f + p_f * c) * c + recurrent(i + p_i * c) * cell(z)
        c_next = c_next if clip is None else c_next.clamp(-clip, clip)
        return recurrent(o + p_o * c_next) * output(c_next), c_next

    return step
