"""Does a VAE fit into fp16? SDXL's own does not: its activations exceed 65504, and pictures come out black.

There are fine-tuned VAEs of the same shapes that do fit, and nothing in a file says which one it holds. So a small
picture is decoded and encoded here, in NumPy float32 on the source's own weights, and every activation is looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glassine.convert.weights import WeightSource
from glassine.models.config import VAEConfig

Array = NDArray[np.float32]

# An activation of a small probe beyond an eighth of fp16's range is too near to its end for pictures of all kinds.
BOUND = 65504 / 8
_CELLS = 4  # of the probe's latent a side: enough for every level to see its neighbours
_EPS = 1e-6


class _TooWide(Exception):
    """An activation beyond the bound: the rest need not be computed."""


@dataclass(slots=True)
class _Network:
    """A VAE that keeps an eye on its activations (C, H, W)."""

    weights: WeightSource
    groups: int
    largest: float = 0.0
    where: str = ""

    def seen(self, x: Array, where: str) -> Array:
        """Look at what was computed and hand it on."""
        largest = float(np.abs(x).max())
        if not largest <= self.largest:
            self.largest, self.where = largest, where
        if not largest <= BOUND:
            raise _TooWide
        return x

    def read(self, name: str) -> Array:
        """One weight, in float32."""
        shape = self.weights.shapes[name]
        return self.weights.read(name, 0, math.prod(shape)).astype(np.float32).reshape(shape)

    def conv(self, name: str, x: Array, *, stride: int = 1) -> Array:
        """Convolve: a product for each of the kernel's taps. At stride 2 the padding is below and to the right."""
        weight = self.read(f"{name}.weight")
        weight = weight.reshape(weight.shape if weight.ndim == 4 else (*weight.shape, 1, 1))
        by_tap = np.ascontiguousarray(weight.transpose(2, 3, 0, 1))
        kernel = len(by_tap)
        before = kernel // 2 if stride == 1 else 0
        height, width = x.shape[1] // stride, x.shape[2] // stride
        x = np.pad(x, [(0, 0), *[(before, kernel // 2)] * 2])
        out = np.zeros((len(weight), height * width), np.float32)
        for i in range(kernel):
            for j in range(kernel):
                taps = x[:, i : i + stride * height : stride, j : j + stride * width : stride]
                out += by_tap[i, j] @ taps.reshape(len(x), -1)
        out += self.read(f"{name}.bias")[:, None]
        return self.seen(out.reshape(-1, height, width), name)

    def norm(self, name: str, x: Array) -> Array:
        """GroupNorm."""
        y = x.reshape(self.groups, -1)
        y = (y - y.mean(axis=1, keepdims=True)) / np.sqrt(y.var(axis=1, keepdims=True) + _EPS)
        weight, bias = (self.read(f"{name}.{kind}")[:, None, None] for kind in ("weight", "bias"))
        normal: Array = y.reshape(x.shape) * weight + bias
        return normal

    def resnet(self, name: str, x: Array) -> Array:
        """Two convolutions around a shortcut."""
        y = self.conv(f"{name}.conv1", _silu(self.norm(f"{name}.norm1", x)))
        y = self.conv(f"{name}.conv2", _silu(self.norm(f"{name}.norm2", y)))
        shortcut = f"{name}.conv_shortcut"
        return self.seen((self.conv(shortcut, x) if f"{shortcut}.weight" in self.weights.shapes else x) + y, name)

    def middle(self, name: str, x: Array) -> Array:
        """Two resnets and the attention between them."""
        x = self.resnet(f"{name}.resnets.0", x)
        inner = f"{name}.attentions.0"
        tokens = self.norm(f"{inner}.group_norm", x)
        q, k, v = (self.conv(f"{inner}.to_{letter}", tokens).reshape(len(x), -1) for letter in "qkv")
        scores = self.seen((q * len(x) ** -0.5).T @ k, f"{inner}.scores")
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        y = (v @ (weights / weights.sum(axis=1, keepdims=True)).T).reshape(x.shape)
        x = self.seen(x + self.conv(f"{inner}.to_out.0", y), inner)
        return self.resnet(f"{name}.resnets.1", x)

    def decode(self, config: VAEConfig, z: Array) -> None:
        """Decode (latent_channels, h, w)."""
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z))
        x = self.middle("decoder.mid_block", x)
        for level in range(len(config.channels)):
            for i in range(config.layers + 1):
                x = self.resnet(f"decoder.up_blocks.{level}.resnets.{i}", x)
            if level < len(config.channels) - 1:
                x = self.conv(f"decoder.up_blocks.{level}.upsamplers.0.conv", x.repeat(2, axis=1).repeat(2, axis=2))
        self.conv("decoder.conv_out", _silu(self.norm("decoder.conv_norm_out", x)))

    def encode(self, config: VAEConfig, x: Array) -> None:
        """Encode (3, H, W)."""
        x = self.conv("encoder.conv_in", x)
        for level in range(len(config.channels)):
            for i in range(config.layers):
                x = self.resnet(f"encoder.down_blocks.{level}.resnets.{i}", x)
            if level < len(config.channels) - 1:
                x = self.conv(f"encoder.down_blocks.{level}.downsamplers.0.conv", x, stride=2)
        x = self.middle("encoder.mid_block", x)
        self.conv("quant_conv", self.conv("encoder.conv_out", _silu(self.norm("encoder.conv_norm_out", x))))


def _silu(x: Array) -> Array:
    with np.errstate(over="ignore"):
        y: Array = x / (1 + np.exp(-x))
    return y


def probe_vae(config: VAEConfig, weights: WeightSource, latent_scale: float) -> tuple[bool, str]:
    """Decode and encode a small random picture and say whether fp16 holds all that is computed on the way, and why.

    Args:
        weights: of the whole VAE, by canonical name.
        latent_scale: latents are drawn as wide as the family's are: 1 / `latent_scale`.
    """
    rng = np.random.default_rng(0)
    z = (rng.standard_normal((config.latent_channels, _CELLS, _CELLS)) / latent_scale).astype(np.float32)
    side = config.downscale * _CELLS
    ramp = np.linspace(-0.7, 0.7, side)
    x = (ramp[None, :, None] + 0.3 * rng.uniform(-1, 1, (3, side, side))).astype(np.float32)
    network = _Network(weights, config.norm_groups)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            network.decode(config, z)
            network.encode(config, x)
    except _TooWide:
        return False, f"a probe reached {network.largest:.3g} in {network.where}, too near to float16's 65504"
    return True, f"a probe reached no more than {network.largest:.3g}, in {network.where}"
