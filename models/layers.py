"""The words the networks are written in: operations of `mil.py` that ask for their weights by canonical name.

A `Scope` is a place in a network: `w / "conv1"` is one level deeper, and `w("weight", shape)` asks for a weight there.
Every function of this folder takes the scope first, appends operations to the function being built, and returns the
MIL variable of the result. Images are (B, C, H, W); tokens are (B, C, 1, S) in the layout `channels_first` and
(B, S, C) in `channels_last`. Everything is fp16 except where a comment says why not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glassine.models import mil as mb
from glassine.models.config import Attention, Layout
from glassine.models.mil import Program

Var = Any  # a `mil.Var`; untyped, as its operations are
Inputs = dict[str, tuple[tuple[int, ...], type[np.generic]]]  # name -> shape, np.float16 or np.float32


class Weights(Protocol):
    """Where a network's weights come from."""

    def __call__(
        self, name: str, shape: tuple[int, ...], *, scale: float = 1.0, dtype: DTypeLike = np.float16
    ) -> NDArray[Any]:
        """Return the weight `name` times `scale`, in this shape and dtype; every name is asked for once.

        name: diffusers' for UNet and VAE, Hugging Face's (with `text_model.`) for text encoders. shape: may differ from
        the source's by dimensions of size 1 (a linear layer's matrix serves a 1x1 convolution). The array may be a
        stand-in without values, so networks hand it to MIL operations as it is.
        """
        ...


@dataclass(frozen=True, slots=True)
class Scope:
    """A place in a network: whose weights, under which prefix, in which form of attention, layout and dtype."""

    weights: Weights
    attention: Attention
    layout: Layout
    path: str = ""
    dtype: type[np.floating[Any]] = np.float16

    def __truediv__(self, name: str | int) -> Scope:
        return replace(self, path=f"{self.path}.{name}" if self.path else str(name))

    def __call__(self, name: str, shape: tuple[int, ...], *, scale: float = 1.0) -> Var:
        """Make a constant of the weight `name` of this place."""
        return mb.const(val=self.weights((self / name).path, shape, scale=scale, dtype=self.dtype), name=self.op(name))

    def op(self, what: str = "") -> str:
        """Name an operation after its place, so that a report that names it says where it is."""
        name = self.path.replace(".", "_")
        return f"{name}_{what}" if name and what else name + what

    @property
    def channels_first(self) -> bool:
        """Whether tokens are (B, C, 1, S)."""
        return self.layout == "channels_first"


def build(inputs: Inputs, body: Callable[..., Mapping[str, Var]], *, attention: Attention = "einsum") -> Program:
    """Make the program that computes body(**inputs); all outputs are cast to fp32.

    The opset is iOS16 (macOS 13), or iOS18 (macOS 15) where the fused attention operation needs it or `newest_opset`
    says so.
    """
    variables = {name: mb.Var(name, (np.dtype(dtype).name, shape)) for name, (shape, dtype) in inputs.items()}
    program = Program(variables, mb.IOS18 if attention == "sdpa" or _NEWEST.get() else mb.IOS16)
    with program:
        results = body(**variables)
        program.outputs = [mb.cast(x=result, dtype="fp32", name=name) for name, result in results.items()]
    return program


_NEWEST: ContextVar[bool] = ContextVar("newest_opset", default=False)


@contextmanager
def newest_opset(wanted: bool = True) -> Iterator[None]:
    """Write the programs of this block in the opset of macOS 15, which a package of several functions needs."""
    token = _NEWEST.set(wanted)
    try:
        yield
    finally:
        _NEWEST.reset(token)


def conv(w: Scope, x: Var, channels: int, *, kernel: int = 3, stride: int = 1) -> Var:
    """Convolve (B, C, H, W) to `channels`; padding keeps the size at stride 1."""
    weight = w("weight", (channels, x.shape[1], kernel, kernel))
    pad = {"pad_type": "custom", "pad": [kernel // 2] * 4} if kernel > 1 else {"pad_type": "valid"}
    return mb.conv(x=x, weight=weight, bias=w("bias", (channels,)), strides=[stride, stride], **pad, name=w.op())


def dense(w: Scope, x: Var, channels: int, *, bias: bool = True, scale: float = 1.0) -> Var:
    """Map every token to `channels`: a linear layer, or a 1x1 convolution where channels come first.

    `scale` multiplies weight and bias before they are rounded to fp16.
    """
    if w.channels_first:
        weight = w("weight", (channels, x.shape[1], 1, 1), scale=scale)
        operation = mb.conv
    else:
        weight = w("weight", (channels, x.shape[-1]), scale=scale)
        operation = mb.linear
    none = None if w.channels_first else np.zeros(channels, w.dtype)  # a linear layer has to have one
    offset = w("bias", (channels,), scale=scale) if bias else none
    return operation(x=x, weight=weight, bias=offset, name=w.op())


def layer_norm(w: Scope, x: Var, *, axis: int = -1) -> Var:
    """Normalise over the channels at `axis`, eps 1e-5, then x*weight + bias (never the division by a weight)."""
    shape = (x.shape[axis],)
    return mb.layer_norm(
        x=x, axes=[axis], gamma=w("weight", shape), beta=w("bias", shape), epsilon=w.dtype(1e-5), name=w.op()
    )


def group_norm(w: Scope, x: Var, groups: int, *, eps: float, flat: bool = False) -> Var:
    """Normalise (B, C, H, W) over groups of channels and all positions; `flat` returns (B, C, H*W).

    Two spellings, because of what fp16 does to the statistics. For the GPU (`einsum`, `sdpa`) it is what coremltools'
    own converter emits, operation by operation. With every operation rounded to fp16 that form overflows where a value
    is 256 from its group's mean, and has 43 dB left where deviations are 1e-3. The one for the Neural Engine (`split`)
    keeps 66 dB from deviations of 1e-3 to 3000.
    """
    if w.attention == "split":
        y = _group_norm_scaled(w, x, groups, eps)
        return mb.reshape(x=y, shape=(*x.shape[:2], x.shape[2] * x.shape[3])) if flat else y
    return _group_norm_plain(w, x, groups, eps, flat)


def _group_norm_plain(w: Scope, x: Var, groups: int, eps: float, flat: bool) -> Var:
    batch, channels, height, width = x.shape
    spatial = (height * width,) if flat else (height, width)
    x = mb.reshape(x=x, shape=(batch, groups, channels // groups, *spatial), name=w.op("groups"))
    axes = list(range(2, x.rank))
    x = mb.sub(x=x, y=mb.reduce_mean(x=x, axes=axes, keep_dims=True, name=w.op("mean")), name=w.op("centred"))
    variance = mb.reduce_mean(x=mb.square(x=x, name=w.op("square")), axes=axes, keep_dims=True, name=w.op("variance"))
    deviation = mb.sqrt(x=mb.add(x=variance, y=w.dtype(eps), name=w.op("eps")), name=w.op("deviation"))
    x = mb.real_div(x=x, y=deviation, name=w.op("normal"))
    x = mb.reshape(x=x, shape=(batch, channels, *spatial), name=w.op("ungrouped"))
    if flat:  # batch_norm is for images
        x = mb.mul(x=x, y=w("weight", (1, channels, 1)), name=w.op("scaled"))
        return mb.add(x=x, y=w("bias", (1, channels, 1)), name=w.op())
    return mb.batch_norm(
        x=x,
        mean=np.zeros(channels, w.dtype),
        variance=np.ones(channels, w.dtype),
        gamma=w("weight", (channels,)),
        beta=w("bias", (channels,)),
        epsilon=w.dtype(1e-5),
        name=w.op(),
    )


def _group_norm_scaled(w: Scope, x: Var, groups: int, eps: float) -> Var:
    """Normalise (B, C, H, W) over groups with statistics that neither overflow nor vanish in fp16.

    Each group is centred and divided by an eighth of its largest deviation before anything is squared. Squares then lie
    in [0, 64] whatever the scale of the activations, and eps, a subnormal number in fp16, grows by the same factor.
    Means are taken axis by axis, so that even sums kept in fp16 stay finite. The picture keeps its shape throughout: no
    rank 5, no view of it that would have to be copied.
    """
    channels = x.shape[1]
    x = mb.sub(x=x, y=_each_group(w, mb.reduce_mean, x, groups, one_by_one=True), name=w.op("centred"))
    largest = _each_group(w, mb.reduce_max, mb.abs(x=x, name=w.op("abs")), groups)
    # The floor keeps the reciprocal finite for groups that are constant.
    largest = mb.maximum(x=largest, y=w.dtype(2**-6), name=w.op("largest"))
    inverse = mb.real_div(x=w.dtype(8), y=largest, name=w.op("inverse"))
    x = mb.mul(x=x, y=inverse, name=w.op("unit"))
    variance = _each_group(w, mb.reduce_mean, mb.square(x=x, name=w.op("square")), groups, one_by_one=True)
    # eps * inverse^2 from its root: eps itself would be rounded to a multiple of 6e-8.
    root = mb.mul(x=inverse, y=w.dtype(math.sqrt(eps)), name=w.op("eps_root"))
    variance = mb.add(x=variance, y=mb.mul(x=root, y=root, name=w.op("eps")), name=w.op("variance"))
    gain = mb.rsqrt(x=variance, epsilon=w.dtype(0), name=w.op("rsqrt"))
    gain = mb.mul(x=gain, y=w("weight", (1, channels, 1, 1)), name=w.op("gain"))
    return mb.add(x=mb.mul(x=x, y=gain, name=w.op("scaled")), y=w("bias", (1, channels, 1, 1)), name=w.op())


def _each_group(w: Scope, reduce: Callable[..., Var], x: Var, groups: int, *, one_by_one: bool = False) -> Var:
    """Reduce (B, C, H, W) to one number a group, repeated for its channels: (B, C, 1, 1)."""
    batch, channels = x.shape[:2]
    for axes in ([3], [2]) if one_by_one else ([2, 3],):
        x = reduce(x=x, axes=axes, keep_dims=True)
    x = mb.reshape(x=x, shape=(batch, groups, channels // groups, 1))
    # Repeated by a broadcast product: `tile` is in none of Apple's packages, so nobody knows where it would run.
    x = mb.mul(x=reduce(x=x, axes=[2], keep_dims=True), y=np.ones((1, 1, channels // groups, 1), w.dtype))
    return mb.reshape(x=x, shape=(batch, channels, 1, 1))


def resnet(w: Scope, x: Var, channels: int, *, groups: int, eps: float, temb: Var | None = None) -> Var:
    """Two convolutions with a skip: norm, SiLU, conv; `temb` (already through SiLU) is added between the two."""
    h = mb.silu(x=group_norm(w / "norm1", x, groups, eps=eps), name=w.op("silu1"))
    h = conv(w / "conv1", h, channels)
    if temb is not None:
        h = mb.add(x=h, y=as_image(dense(w / "time_emb_proj", temb, channels)), name=w.op("temb"))
    h = mb.silu(x=group_norm(w / "norm2", h, groups, eps=eps), name=w.op("silu2"))
    h = conv(w / "conv2", h, channels)
    if x.shape[1] != channels:
        x = conv(w / "conv_shortcut", x, channels, kernel=1)
    return mb.add(x=x, y=h, name=w.op())


def as_image(vector: Var) -> Var:
    """(B, C) -> (B, C, 1, 1); where channels come first it is one already."""
    if vector.rank == 4:
        return vector
    return mb.expand_dims(x=mb.expand_dims(x=vector, axes=[2]), axes=[3])


def upsample(w: Scope, x: Var, *, height: int, width: int) -> Var:
    """Double the size (nearest), cut to (height, width) where a level has an odd size, and convolve."""
    x = mb.upsample_nearest_neighbor(
        x=x, scale_factor_height=np.float32(2), scale_factor_width=np.float32(2), name=w.op("nearest")
    )
    if x.shape[2:] != (height, width):
        x = mb.slice_by_index(x=x, begin=[0, 0, 0, 0], end=[*x.shape[:2], height, width], name=w.op("cut"))
    return conv(w / "conv", x, x.shape[1])


def sinusoid(x: Var, width: int, *, name: str) -> Var:
    """Embed fp32 numbers (N,) as fp16 (N, width): cosines first, then sines, of frequencies 1 to 1/10000.

    In fp32 because the angle of t = 999 is off by up to 0.3 radians in fp16, and sigmas between two training steps
    have fractional t. Source: Ho et al. 2020, appendix B; the order is Stable Diffusion's.
    """
    half = width // 2
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    # float32 exponents, as in training; exp in float64, because NumPy's own float32 exp is an ulp off every other time
    # and a time_id of 4095 multiplies that.
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = mb.mul(x=mb.expand_dims(x=x, axes=[1]), y=frequencies[None], name=f"{name}_angles")
    waves = mb.concat(values=(mb.cos(x=angles), mb.sin(x=angles)), axis=-1, name=f"{name}_waves")
    return mb.cast(x=waves, dtype="fp16", name=name)


def embedding_mlp(w: Scope, x: Var, channels: int) -> Var:
    """Two dense layers with SiLU between: (B, C) -> (B, channels), or (B, channels, 1, 1) where channels come first."""
    if w.channels_first:
        x = mb.expand_dims(x=x, axes=[2, 3])
    h = mb.silu(x=dense(w / "linear_1", x, channels), name=w.op("silu"))
    return dense(w / "linear_2", h, channels)
