"""The CLIP text transformer: token ids -> a hidden state for every layer, and one pooled vector for the prompt."""

from __future__ import annotations

import numpy as np

from glassine.models import mil as mb
from glassine.models.attention import einsum_channels_last, query_scale
from glassine.models.config import Activation, TextEncoderConfig
from glassine.models.layers import Scope, Var, Weights, build, dense, layer_norm
from glassine.models.mil import Program

# Added to the scores of tokens that lie ahead. Not -inf: it breaks palettes and poisons fp16 arithmetic.
MASKED = -1e4


def text_encoder(config: TextEncoderConfig, weights: Weights) -> Program:
    """Write the text encoder as a program.

    Input: input_ids (1, tokens) fp32 (Apple's dtype for them).

    Outputs, fp32:
        last_hidden_state (1, tokens, width): after all layers but the last `skip`, through the final LayerNorm; called
            hidden_embeds and not normalised without `final_norm`, as in Apple's packages of SDXL.
        pooled_outputs (1, width or projection_dim): the last layer's state at the first end-of-text token (the
            largest id), through the final LayerNorm, projected if `projection_dim`.
        hidden_states (layers, tokens, width): the state after every layer, the first layer first, each through the
            final LayerNorm if `final_norm`. Not in Apple's packages: clip skip can be chosen for each picture.
    """
    root = Scope(weights, "einsum", "channels_last")

    def encode(input_ids: Var) -> dict[str, Var]:
        w = root / "text_model"
        states = _states(config, w, _embed(config, w / "embeddings", input_ids))
        stack = mb.concat(values=states, axis=0, name="states")
        if config.final_norm:
            stack = layer_norm(w / "final_layer_norm", stack)
            last = _layer(stack, config.layers - 1)
        else:
            last = layer_norm(w / "final_layer_norm", states[-1])
        end = mb.reduce_argmax(x=_own_ids(config, input_ids), axis=1, keep_dims=False, name="end_of_text")
        pooled = mb.squeeze(x=mb.gather(x=last, indices=end, axis=1), axes=[1], name="pooled")
        if config.projection_dim is not None:
            pooled = dense(root / "text_projection", pooled, config.projection_dim, bias=False)
        chosen = "last_hidden_state" if config.final_norm else "hidden_embeds"
        return {
            chosen: _layer(stack, config.layers - 1 - config.skip),
            "pooled_outputs": pooled,
            "hidden_states": stack,
        }

    return build({"input_ids": ((1, config.tokens), np.float32)}, encode)


def _embed(config: TextEncoderConfig, w: Scope, input_ids: Var) -> Var:
    """Look every token up and add its place: (1, tokens, width)."""
    table = (w / "token_embedding")("weight", (config.vocab_size, config.width))
    places = (w / "position_embedding")("weight", (config.tokens, config.width))
    ids = mb.cast(x=input_ids, dtype="int32", name="ids")
    return mb.add(x=mb.gather(x=table, indices=ids, axis=0, name=w.op("tokens")), y=places, name=w.op())


def _own_ids(config: TextEncoderConfig, input_ids: Var) -> Var:
    """Set added tokens to 0: their ids are above that of the end of text, which is the largest of CLIP's own."""
    if not config.added_tokens:
        return input_ids
    largest = np.float32(config.vocab_size - config.added_tokens - 1)
    own = mb.cast(x=mb.less_equal(x=input_ids, y=largest), dtype="fp32", name="is_own")
    return mb.mul(x=input_ids, y=own, name="own_ids")


def _states(config: TextEncoderConfig, w: Scope, x: Var) -> list[Var]:
    """The state after every layer, (1, tokens, width) each."""
    ahead = np.triu(np.full((config.tokens, config.tokens), MASKED, np.float16), k=1)
    mask = mb.const(val=ahead[None, None], name="causal_mask")
    states = []
    for i in range(config.layers):
        layer = w / "encoder.layers" / i
        x = mb.add(x=x, y=_attention(config, layer, layer_norm(layer / "layer_norm1", x), mask), name=layer.op("self"))
        x = mb.add(x=x, y=_mlp(config, layer / "mlp", layer_norm(layer / "layer_norm2", x)), name=layer.op())
        states.append(x)
    return states


def _attention(config: TextEncoderConfig, layer: Scope, x: Var, mask: Var) -> Var:
    """Every token looks at itself and at those before it."""
    w = layer / "self_attn"
    q = dense(w / "q_proj", x, config.width, scale=query_scale(w.attention, config.width // config.heads))
    k = dense(w / "k_proj", x, config.width)
    v = dense(w / "v_proj", x, config.width)
    return dense(w / "out_proj", einsum_channels_last(w, q, k, v, config.heads, mask), config.width)


def _mlp(config: TextEncoderConfig, w: Scope, x: Var) -> Var:
    return dense(w / "fc2", _activate(w, dense(w / "fc1", x, config.intermediate), config.activation), config.width)


def _activate(w: Scope, x: Var, activation: Activation) -> Var:
    """OpenAI's CLIP approximates GELU by x*sigmoid(1.702x) (quick_gelu); OpenCLIP's later ones use the exact GELU."""
    if activation == "gelu":
        return mb.gelu(x=x, mode="EXACT", name=w.op("gelu"))
    gate = mb.sigmoid(x=mb.mul(x=x, y=np.float16(1.702), name=w.op("slope")), name=w.op("gate"))
    return mb.mul(x=x, y=gate, name=w.op("quick_gelu"))


def _layer(stack: Var, index: int) -> Var:
    """Layer `index` of (layers, tokens, width), as (1, tokens, width)."""
    _, tokens, width = stack.shape
    return mb.slice_by_index(x=stack, begin=[index, 0, 0], end=[index + 1, tokens, width])
