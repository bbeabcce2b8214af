"""Attention in three forms and two token layouts.

    split    for the Neural Engine: one small product a head, queries in chunks, nothing of rank 5 and no big transpose
    einsum   for the GPU: all heads in one batched product
    sdpa     for the GPU from macOS 15: the fused operation

Tokens are (B, C, 1, S) (`channels_first`) or (B, S, C) (`channels_last`). The factor head_dim^-1/2 is in the weights of
the query, not in the graph: a product of unscaled fp16 queries and keys can overflow. Only `sdpa` scales by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from glassine.models import mil as mb
from glassine.models.config import Attention, Layout
from glassine.models.layers import Scope, Var, dense, layer_norm

# `split` computes scores for this many queries at a time, where there are more keys than that: the Neural Engine's
# own memory holds such a block. The last chunk is what remains, so every number of tokens is right.
QUERY_CHUNK = 512


def attention(w: Scope, x: Var, context: Var, *, heads: int, bias: bool = False) -> Var:
    """Attend from the tokens `x` to the tokens `context`; the result has the width of `x`.

    `bias` says whether the projections to query, key and value have one (the VAE's do).
    """
    channels = x.shape[1 if w.channels_first else -1]
    q = dense(w / "to_q", x, channels, bias=bias, scale=query_scale(w.attention, channels // heads))
    k = dense(w / "to_k", context, channels, bias=bias)
    v = dense(w / "to_v", context, channels, bias=bias)
    return dense(w / "to_out.0", FORMS[w.attention, w.layout](w, q, k, v, heads), channels)


def query_scale(form: Attention, head_dim: int) -> float:
    """The factor to fold into the query's projection."""
    return 1.0 if form == "sdpa" else head_dim**-0.5


class Attend(Protocol):
    """How tokens attend: `attention`, or what takes its place."""

    def __call__(self, w: Scope, x: Var, context: Var, *, heads: int) -> Var:
        """Attend from the tokens `x` to the tokens `context`; the result has the shape of `x`."""
        ...


def transformer_block(w: Scope, x: Var, context: Var, *, heads: int, attend: Attend = attention) -> Var:
    """Self-attention, cross-attention, feed-forward, each behind a LayerNorm and added to its input."""
    axis = 1 if w.channels_first else -1
    h = layer_norm(w / "norm1", x, axis=axis)
    x = mb.add(x=attend(w / "attn1", h, h, heads=heads), y=x, name=w.op("self"))
    h = layer_norm(w / "norm2", x, axis=axis)
    x = mb.add(x=attend(w / "attn2", h, context, heads=heads), y=x, name=w.op("cross"))
    return mb.add(x=_feed_forward(w / "ff.net", layer_norm(w / "norm3", x, axis=axis)), y=x, name=w.op())


def _feed_forward(w: Scope, x: Var) -> Var:
    """GEGLU with four times the width: (a, b) = proj(x); out(a * gelu(b)) with the exact GELU (Shazeer 2020)."""
    axis = 1 if w.channels_first else -1
    channels = x.shape[axis]
    h = dense(w / "0.proj", x, 8 * channels)
    h, gate = mb.split(x=h, split_sizes=[4 * channels, 4 * channels], axis=axis, name=w.op("halves"))
    h = mb.mul(x=h, y=mb.gelu(x=gate, mode="EXACT", name=w.op("gelu")), name=w.op("gated"))
    return dense(w / "2", h, channels)


def to_tokens(w: Scope, x: Var) -> Var:
    """(B, C, H, W) -> tokens, row by row."""
    batch, channels, height, width = x.shape
    if w.channels_first:
        return mb.reshape(x=x, shape=(batch, channels, 1, height * width), name=w.op("tokens"))
    x = mb.transpose(x=x, perm=[0, 2, 3, 1], name=w.op("channels_last"))
    return mb.reshape(x=x, shape=(batch, height * width, channels), name=w.op("tokens"))


def to_image(w: Scope, x: Var, *, height: int, width: int) -> Var:
    """Tokens -> (B, C, height, width), the inverse of `to_tokens`."""
    if w.channels_first:
        return mb.reshape(x=x, shape=(*x.shape[:2], height, width), name=w.op("image"))
    x = mb.reshape(x=x, shape=(x.shape[0], height, width, x.shape[2]), name=w.op("image"))
    return mb.transpose(x=x, perm=[0, 3, 1, 2], name=w.op("channels_first"))


def _split_channels_first(w: Scope, q: Var, k: Var, v: Var, heads: int) -> Var:
    """Scores are (B, keys, 1, queries): with keys in the channel axis both products are einsums without a transpose."""
    k = mb.transpose(x=k, perm=[0, 3, 2, 1], name=w.op("k_rows"))
    outs = []
    pieces = (split_heads(x, heads, axis) for x, axis in ((q, 1), (k, 3), (v, 1)))
    for i, (qi, ki, vi) in enumerate(zip(*pieces, strict=True)):
        chunks = []
        for j, chunk in enumerate(query_chunks(qi, axis=3, keys=k.shape[1])):
            name = w.op(f"head{i}_{j}")
            scores = mb.einsum(values=(ki, chunk), equation="nchw,nwhu->nchu", name=f"{name}_scores")
            weights = mb.softmax(x=scores, axis=1, name=f"{name}_softmax")
            chunks.append(mb.einsum(values=(vi, weights), equation="nchw,nwhu->nchu", name=name))
        outs.append(join(chunks, axis=3))
    return join(outs, axis=1)


def _split_channels_last(w: Scope, q: Var, k: Var, v: Var, heads: int) -> Var:
    """As above for (B, S, C): scores are (B, queries, keys)."""
    outs = []
    pieces = (split_heads(x, heads, axis) for x, axis in ((q, 2), (k, 2), (v, 2)))
    for i, (qi, ki, vi) in enumerate(zip(*pieces, strict=True)):
        chunks = []
        for j, chunk in enumerate(query_chunks(qi, axis=1, keys=k.shape[1])):
            name = w.op(f"head{i}_{j}")
            scores = mb.matmul(x=chunk, y=ki, transpose_y=True, name=f"{name}_scores")
            chunks.append(mb.matmul(x=mb.softmax(x=scores, axis=-1, name=f"{name}_softmax"), y=vi, name=name))
        outs.append(join(chunks, axis=1))
    return join(outs, axis=2)


def split_heads(x: Var, heads: int, axis: int) -> list[Var]:
    """Cut the channels, which are at `axis`, into heads."""
    return [x] if heads == 1 else list(mb.split(x=x, num_splits=heads, axis=axis))


def query_chunks(q: Var, *, axis: int, keys: int) -> list[Var]:
    """Cut the queries, which are at `axis`, so that no score matrix has more than QUERY_CHUNK rows and columns."""
    queries = q.shape[axis]
    if keys <= QUERY_CHUNK or queries <= QUERY_CHUNK:
        return [q]
    whole, rest = divmod(queries, QUERY_CHUNK)
    return list(mb.split(x=q, split_sizes=[QUERY_CHUNK] * whole + [rest] * (rest > 0), axis=axis))


def join(parts: list[Var], *, axis: int) -> Var:
    """Put what was cut back together."""
    return parts[0] if len(parts) == 1 else mb.concat(values=parts, axis=axis)


def _einsum_channels_first(w: Scope, q: Var, k: Var, v: Var, heads: int) -> Var:
    """Heads are (B, heads, d, S), a view of (B, C, 1, S)."""
    q, k, v = (mb.reshape(x=x, shape=(x.shape[0], heads, x.shape[1] // heads, x.shape[3])) for x in (q, k, v))
    scores = mb.matmul(x=q, y=k, transpose_x=True, transpose_y=False, name=w.op("scores"))
    weights = mb.softmax(x=scores, axis=-1, name=w.op("softmax"))
    out = mb.matmul(x=v, y=weights, transpose_x=False, transpose_y=True, name=w.op("heads"))
    return mb.reshape(x=out, shape=(out.shape[0], heads * out.shape[2], 1, out.shape[3]))


def einsum_channels_last(w: Scope, q: Var, k: Var, v: Var, heads: int, mask: Var | None = None) -> Var:
    """Attend with all heads at once; `mask` is added to the scores, (1, 1, queries, keys)."""
    q, k, v = (heads_from_channels_last(x, heads) for x in (q, k, v))
    scores = mb.matmul(x=q, y=k, transpose_x=False, transpose_y=True, name=w.op("scores"))
    if mask is not None:
        scores = mb.add(x=scores, y=mask, name=w.op("masked"))
    weights = mb.softmax(x=scores, axis=-1, name=w.op("softmax"))
    out = mb.matmul(x=weights, y=v, transpose_x=False, transpose_y=False, name=w.op("heads"))
    return channels_last_from_heads(out)


def _sdpa_channels_first(w: Scope, q: Var, k: Var, v: Var, heads: int) -> Var:
    """The fused operation wants (B, heads, S, d)."""
    q, k, v = (
        mb.transpose(x=mb.reshape(x=x, shape=(x.shape[0], heads, x.shape[1] // heads, x.shape[3])), perm=[0, 1, 3, 2])
        for x in (q, k, v)
    )
    out = mb.scaled_dot_product_attention(query=q, key=k, value=v, name=w.op("heads"))
    out = mb.transpose(x=out, perm=[0, 1, 3, 2])
    return mb.reshape(x=out, shape=(out.shape[0], heads * out.shape[2], 1, out.shape[3]))


def _sdpa_channels_last(w: Scope, q: Var, k: Var, v: Var, heads: int) -> Var:
    q, k, v = (heads_from_channels_last(x, heads) for x in (q, k, v))
    return channels_last_from_heads(mb.scaled_dot_product_attention(query=q, key=k, value=v, name=w.op("heads")))


def heads_from_channels_last(x: Var, heads: int) -> Var:
    """(B, S, C) -> (B, heads, S, d)."""
    batch, tokens, channels = x.shape
    return mb.transpose(x=mb.reshape(x=x, shape=(batch, tokens, heads, channels // heads)), perm=[0, 2, 1, 3])


def channels_last_from_heads(x: Var) -> Var:
    """(B, heads, S, d) -> (B, S, C)."""
    batch, heads, tokens, width = x.shape
    return mb.reshape(x=mb.transpose(x=x, perm=[0, 2, 1, 3]), shape=(batch, tokens, heads * width))


FORMS: dict[tuple[Attention, Layout], Callable[[Scope, Any, Any, Any, int], Any]] = {
    ("split", "channels_first"): _split_channels_first,
    ("split", "channels_last"): _split_channels_last,
    ("einsum", "channels_first"): _einsum_channels_first,
    ("einsum", "channels_last"): einsum_channels_last,
    ("sdpa", "channels_first"): _sdpa_channels_first,
    ("sdpa", "channels_last"): _sdpa_channels_last,
}
