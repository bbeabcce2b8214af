"""Attention biased by layers (Collage Diffusion): the words of a layer are drawn to where it lies and nowhere else.

Before the softmax of every cross-attention a score s(q, k), of the query q to the token k, becomes

    s(q, k) + W(q, k) M(k)      M(k) = the largest score of k, over all heads and all queries

so that what W asks for is as strong as what is there. W has a rank of one for every mask: W(q, k) = sum over r of
mask_r(q) table(k, r). The masks are fed at the size of each level that attends, the table anew at every step; zeros
leave every score as it is.

Source: Collage Diffusion (Sarukkai et al. 2023, arXiv 2303.00262), after the paint-with-words of eDiff-I (Balaji et al.
2022, arXiv 2211.01324).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glassine.models import mil as mb
from glassine.models.attention import (
    attention,
    channels_last_from_heads,
    heads_from_channels_last,
    join,
    query_chunks,
    query_scale,
    split_heads,
)
from glassine.models.config import Attention, Layout, UNetConfig
from glassine.models.layers import Scope, Var, dense

MASKS, TABLE = "collage_masks_", "collage_table"  # inputs; behind MASKS stands the level
MASKS_A_LAYER = 2  # where its words are drawn to, and where they are kept away from


def mask_sizes(config: UNetConfig, height: int, width: int) -> dict[int, tuple[int, int]]:
    """Level -> (rows, columns), of the levels at which a UNet reads its text."""
    sizes = {}
    for level, depths in enumerate(config.down_depths):
        deepest = level == len(config.channels) - 1
        if any(depths) or any(config.up_depths[-1 - level]) or (deepest and config.mid_depth):
            sizes[level] = (height, width)
        height, width = -(-height // 2), -(-width // 2)
    return sizes


@dataclass(frozen=True, slots=True)
class LayerBias:
    """The inputs that W is made of, and what has been made.

    masks: number of queries -> (B, masks, h, w). table: (B, tokens, 1, masks).
    """

    masks: Mapping[int, Var]
    table: Var
    _made: dict[int, Var] = field(default_factory=dict)

    def of(self, w: Scope, queries: int) -> Var:
        """W for so many queries, shaped as the scores of the form of attention; all attentions of a size share it."""
        if queries not in self._made:
            self._made[queries] = self._product(w, self.masks[queries], queries)
        return self._made[queries]

    def _product(self, w: Scope, masks: Var, queries: int) -> Var:
        batch, tokens, _, count = self.table.shape
        name = f"collage_bias_{queries}"
        if w.attention == "split" and w.channels_first:
            masks = mb.reshape(x=masks, shape=(batch, count, 1, queries))
            return mb.einsum(values=(self.table, masks), equation="nchw,nwhu->nchu", name=name)
        masks = mb.reshape(x=masks, shape=(batch, count, queries))
        table = mb.reshape(x=self.table, shape=(batch, tokens, count))
        bias = mb.matmul(x=masks, y=table, transpose_x=True, transpose_y=True, name=name)
        return bias if w.attention == "split" else mb.expand_dims(x=bias, axes=[1])  # the same for every head


def biased_attention(w: Scope, x: Var, context: Var, *, heads: int, bias: LayerBias) -> Var:
    """Attend from the tokens `x` to `context`: to text with biased scores, to themselves as always."""
    if context is x:
        return attention(w, x, context, heads=heads)
    channels, queries = (x.shape[1], x.shape[3]) if w.channels_first else (x.shape[2], x.shape[1])
    q = dense(w / "to_q", x, channels, bias=False, scale=query_scale(w.attention, channels // heads))
    k, v = (dense(w / name, context, channels, bias=False) for name in ("to_k", "to_v"))
    form = w.attention
    if form == "sdpa":  # the fused operation shows no scores, and scales by itself: the weights stay as it has them
        form = "einsum"
        q = mb.mul(x=q, y=w.dtype(query_scale(form, channels // heads)), name=w.op("scaled"))
    return dense(w / "to_out.0", _FORMS[form, w.layout](w, q, k, v, heads, bias.of(w, queries)), channels)


def _split_channels_first(w: Scope, q: Var, k: Var, v: Var, heads: int, bias: Var) -> Var:
    """Scores are (B, keys, 1, queries), head by head."""
    k = mb.transpose(x=k, perm=[0, 3, 2, 1], name=w.op("k_rows"))
    chunks = [query_chunks(qi, axis=3, keys=k.shape[1]) for qi in split_heads(q, heads, 1)]
    scores = [
        [
            mb.einsum(values=(ki, c), equation="nchw,nwhu->nchu", name=w.op(f"head{i}_{j}_scores"))
            for j, c in enumerate(row)
        ]
        for i, (ki, row) in enumerate(zip(split_heads(k, heads, 3), chunks, strict=True))
    ]
    outs = [
        join([mb.einsum(values=(vi, mb.softmax(x=s, axis=1)), equation="nchw,nwhu->nchu") for s in row], axis=3)
        for vi, row in zip(split_heads(v, heads, 1), _biased(w, scores, bias, keys=1, queries=3), strict=True)
    ]
    return join(outs, axis=1)


def _split_channels_last(w: Scope, q: Var, k: Var, v: Var, heads: int, bias: Var) -> Var:
    """Scores are (B, queries, keys), head by head."""
    chunks = [query_chunks(qi, axis=1, keys=k.shape[1]) for qi in split_heads(q, heads, 2)]
    scores = [
        [mb.matmul(x=c, y=ki, transpose_y=True, name=w.op(f"head{i}_{j}_scores")) for j, c in enumerate(row)]
        for i, (ki, row) in enumerate(zip(split_heads(k, heads, 2), chunks, strict=True))
    ]
    outs = [
        join([mb.matmul(x=mb.softmax(x=s, axis=-1), y=vi) for s in row], axis=1)
        for vi, row in zip(split_heads(v, heads, 2), _biased(w, scores, bias, keys=2, queries=1), strict=True)
    ]
    return join(outs, axis=2)


def _einsum_channels_first(w: Scope, q: Var, k: Var, v: Var, heads: int, bias: Var) -> Var:
    """Scores are (B, heads, queries, keys)."""
    q, k, v = (mb.reshape(x=x, shape=(x.shape[0], heads, x.shape[1] // heads, x.shape[3])) for x in (q, k, v))
    scores = mb.matmul(x=q, y=k, transpose_x=True, transpose_y=False, name=w.op("scores"))
    ((scores,),) = _biased(w, [[scores]], bias, keys=3, queries=2)
    out = mb.matmul(x=v, y=mb.softmax(x=scores, axis=-1), transpose_x=False, transpose_y=True, name=w.op("heads"))
    return mb.reshape(x=out, shape=(out.shape[0], heads * out.shape[2], 1, out.shape[3]))


def _einsum_channels_last(w: Scope, q: Var, k: Var, v: Var, heads: int, bias: Var) -> Var:
    """As above for (B, S, C)."""
    q, k, v = (heads_from_channels_last(x, heads) for x in (q, k, v))
    scores = mb.matmul(x=q, y=k, transpose_x=False, transpose_y=True, name=w.op("scores"))
    ((scores,),) = _biased(w, [[scores]], bias, keys=3, queries=2)
    return channels_last_from_heads(mb.matmul(x=mb.softmax(x=scores, axis=-1), y=v, name=w.op("heads")))


def _biased(w: Scope, scores: Sequence[Sequence[Var]], bias: Var, *, keys: int, queries: int) -> list[list[Var]]:
    """Add W M to scores that may be in pieces, of heads and in them of queries: M is the maximum over all of them.

    keys, queries: the axes of the scores and of W.
    """
    rank = bias.rank
    others = [axis for axis in range(1, rank) if axis != keys]
    peaks = [mb.reduce_max(x=s, axes=others, keep_dims=True) for row in scores for s in row]
    largest = peaks[0]
    if len(peaks) > 1:
        largest = mb.reduce_max(x=join(peaks, axis=queries), axes=[queries], keep_dims=True, name=w.op("largest"))
    added = mb.mul(x=bias, y=largest, name=w.op("bias"))
    pieces = query_chunks(added, axis=queries, keys=bias.shape[keys])
    return [[mb.add(x=s, y=piece) for s, piece in zip(row, pieces, strict=True)] for row in scores]


_FORMS: dict[tuple[Attention, Layout], Callable[[Scope, Any, Any, Any, int, Any], Any]] = {
    ("split", "channels_first"): _split_channels_first,
    ("split", "channels_last"): _split_channels_last,
    ("einsum", "channels_first"): _einsum_channels_first,
    ("einsum", "channels_last"): _einsum_channels_last,
}
