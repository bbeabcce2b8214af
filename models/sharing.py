"""Attention sharing (LayerDiffuse on Stable Diffusion 1.5): the frames of one sample, drawn together, see each other.

The rows of a batch are (sample, frame). Each of the UNet's attentions works row by row, but with weights of its own for
every frame; then each position of a frame attends to the same position of its sample's other frames. With one frame
that second attention has nothing to choose from: what is left of it is one affine map, which the weights hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from glassine.models import mil as mb
from glassine.models.attention import FORMS, query_scale
from glassine.models.config import UNetConfig
from glassine.models.layers import Scope, Var, dense

EPS = 1e-6  # of the LayerNorm before the attention over frames


@dataclass(frozen=True, slots=True)
class Frames:
    """How many frames a sample has, and what a given picture adds to the attentions of each, by `control_name`."""

    count: int
    control: Mapping[str, Var] = field(default_factory=dict)


def attention_units(config: UNetConfig) -> list[tuple[str, int, int]]:
    """Every attention of a UNet: canonical name, channels, level; down, then up, then the middle."""
    last = len(config.channels) - 1
    levels = [
        *((f"down_blocks.{i}", i, depths) for i, depths in enumerate(config.down_depths)),
        *((f"up_blocks.{i}", last - i, depths) for i, depths in enumerate(config.up_depths)),
        ("mid_block", last, (config.mid_depth,) if config.mid_depth is not None else ()),
    ]
    return [
        (f"{place}.attentions.{i}.transformer_blocks.{block}.{kind}", config.channels[level], level)
        for place, level, depths in levels
        for i, depth in enumerate(depths)
        for block in range(depth)
        for kind in ("attn1", "attn2")
    ]


def control_name(unit: str) -> str:
    """The input of the UNet with what a given picture adds to the attention `unit`."""
    return f"{unit.replace('.', '_')}_control"


def shared_attention(w: Scope, x: Var, context: Var, *, heads: int, frames: Frames) -> Var:
    """Attend from the tokens `x` to `context` (which may be `x`), then across frames; the result has x's shape."""
    control = frames.control.get(control_name(w.path))
    if control is not None:
        control, to_itself = _for_all_samples(w, control, x), context is x
        x = mb.add(x=x, y=control, name=w.op("controlled"))
        context = x if to_itself else context
    channels = x.shape[1 if w.channels_first else -1]
    q = _dense_by_frame(w / "to_q", x, channels, frames.count, scale=query_scale(w.attention, channels // heads))
    k, v = (_dense_by_frame(w / name, context, channels, frames.count) for name in ("to_k", "to_v"))
    attended = FORMS[w.attention, w.layout](w, q, k, v, heads)
    attended = _dense_by_frame(w / "to_out.0", attended, channels, frames.count, bias=True)
    across = _across_frames(w, mb.add(x=x, y=attended, name=w.op("attended")), heads, frames.count)
    result = mb.add(x=attended, y=across, name=w.op("shared"))
    return result if control is None else mb.add(x=result, y=control, name=w.op())


def _for_all_samples(w: Scope, control: Var, x: Var) -> Var:
    """(F, C, h, w) -> tokens of all rows of `x`: every sample is drawn to the same picture."""
    frames, channels, height, width = control.shape
    control = mb.cast(x=control, dtype="fp16")
    if w.channels_first:
        control = mb.reshape(x=control, shape=(frames, channels, 1, height * width))
    else:
        control = mb.transpose(x=control, perm=[0, 2, 3, 1])
        control = mb.reshape(x=control, shape=(frames, height * width, channels))
    samples = x.shape[0] // frames
    return control if samples == 1 else mb.concat(values=[control] * samples, axis=0, name=w.op("control"))


def _dense_by_frame(w: Scope, x: Var, channels: int, frames: int, *, bias: bool = False, scale: float = 1.0) -> Var:
    """Map every token to `channels`, each frame by its own matrix; the matrices lie one below the other."""
    if frames == 1:
        return dense(w, x, channels, bias=bias, scale=scale)
    rows, samples = x.shape[0], x.shape[0] // frames
    inner = x.shape[1 if w.channels_first else -1]
    matrices = w.weights(f"{w.path}.weight", (frames * channels, inner), scale=scale)
    if w.channels_first:
        x = mb.reshape(x=x, shape=(samples, frames * inner, 1, x.shape[3]))
        offset = {"bias": w("bias", (frames * channels,), scale=scale)} if bias else {}
        weight = mb.const(val=matrices.reshape(frames * channels, inner, 1, 1), name=w.op("weight"))
        x = mb.conv(x=x, weight=weight, **offset, groups=frames, name=w.op("frames"))
        return mb.reshape(x=x, shape=(rows, channels, 1, x.shape[3]), name=w.op())
    x = mb.reshape(x=x, shape=(samples, frames, x.shape[1], inner))
    weight = mb.const(val=matrices.reshape(frames, channels, inner), name=w.op("weight"))
    x = mb.matmul(x=x, y=weight, transpose_x=False, transpose_y=True, name=w.op("frames"))
    if bias:
        offsets = w.weights(f"{w.path}.bias", (frames * channels,), scale=scale).reshape(frames, 1, channels)
        x = mb.add(x=x, y=mb.const(val=offsets, name=w.op("bias")), name=w.op("with_bias"))
    return mb.reshape(x=x, shape=(rows, x.shape[2], channels), name=w.op())


def _across_frames(w: Scope, x: Var, heads: int, frames: int) -> Var:
    """What each position learns of the same position in its sample's frames."""
    axis = 1 if w.channels_first else -1
    channels = x.shape[axis]
    if frames == 1:
        x = mb.layer_norm(x=x, axes=[axis], epsilon=np.float16(EPS), name=w.op("temporal_norm"))
        return dense(w / "temporal", x, channels)
    place, shape = w / "temporal_n", (channels,)
    x = mb.layer_norm(
        x=x,
        axes=[axis],
        gamma=place("weight", shape),
        beta=place("bias", shape),
        epsilon=np.float16(EPS),
        name=place.op(),
    )
    x = dense(w / "temporal_i", x, channels)
    q, k, v = (
        _frames_by_head(w, dense(w / f"temporal_{name}", x, channels, scale=scale), heads, frames)
        for name, scale in (("q", (channels // heads) ** -0.5), ("k", 1.0), ("v", 1.0))
    )
    return dense(w / "temporal_o", _joined(w, [_seen(w, i, qi, k, v) for i, qi in enumerate(q)], x), channels)


def _frames_by_head(w: Scope, x: Var, heads: int, frames: int) -> list[Var]:
    """Tokens of all rows -> each frame's, all heads apart: (samples, heads, d, S), or (samples, S, heads, d)."""
    samples = x.shape[0] // frames
    if w.channels_first:
        _, channels, _, tokens = x.shape
        x = mb.reshape(x=x, shape=(samples, frames * channels, 1, tokens))
        shape = (samples, heads, channels // heads, tokens)
    else:
        _, tokens, channels = x.shape
        x = mb.reshape(x=x, shape=(samples, frames, tokens, channels))
        shape = (samples, tokens, heads, channels // heads)
    return [mb.reshape(x=frame, shape=shape) for frame in mb.split(x=x, num_splits=frames, axis=1)]


def _seen(w: Scope, frame: int, q: Var, k: list[Var], v: list[Var]) -> Var:
    """Attend from one frame to all, element by element: matrices of frames x frames would be one a position."""
    axis = 2 if w.channels_first else 3
    name = w.op(f"frame{frame}")
    products = [mb.reduce_sum(x=mb.mul(x=q, y=kj), axes=[axis], keep_dims=True) for kj in k]
    weights = mb.softmax(x=mb.concat(values=products, axis=axis), axis=axis, name=f"{name}_softmax")
    total, *others = (
        mb.mul(x=vj, y=weight) for vj, weight in zip(v, mb.split(x=weights, num_splits=len(v), axis=axis), strict=True)
    )
    for other in others:
        total = mb.add(x=total, y=other)
    return total


def _joined(w: Scope, frames: list[Var], like: Var) -> Var:
    """The frames' tokens as rows again, shaped as `like`."""
    samples, tokens = frames[0].shape[0], like.shape[3] if w.channels_first else like.shape[1]
    channels = like.shape[1] if w.channels_first else like.shape[2]
    shape = (samples, channels, 1, tokens) if w.channels_first else (samples, 1, tokens, channels)
    rows = mb.concat(values=[mb.reshape(x=frame, shape=shape) for frame in frames], axis=1, name=w.op("frames"))
    return mb.reshape(x=rows, shape=like.shape)
