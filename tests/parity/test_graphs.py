"""Our programs are the ones coremltools' own converter makes of diffusers' networks: operations, wiring and constants.

Compared by Merkle hash: a variable's hash covers its operation, that operation's inputs and, through their hashes,
everything upstream, down to the bytes of every constant; names do not count. Before hashing, what is only spelt
differently is spelt alike:

    axes and permutations count from the front; the shape of a reshape is its result's (converters write -1)

and two differences of substance, wanted ones, are taken out:

    sinusoid     the embedding of t and of SDXL's time_ids is fp32 with us and fp16 with them (0.3 radians off at
                 t = 999). Whatever is computed from those inputs alone, before the first weight, is one leaf. Its
                 values are compared in test_networks.py.
    query scale  they multiply queries by head_dim^-1/2, we multiply the projection's weights: their
                 mul(reshape(linear(x, W, b)), s) is hashed as reshape(linear(x, sW, sb)). Only `einsum` has it.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.frontend.milproto.load import load

from glassine.convert.package import write_package
from glassine.convert.program import lower
from glassine.convert.weights import Arrays
from glassine.models.config import UNetConfig
from glassine.models.unet import unet
from glassine.models.vae import vae_decoder, vae_encoder

Program = Any
Var = Any

HEIGHT, WIDTH, TOKENS = 12, 8, 9
HOST_NUMBERS = {"timestep", "time_ids"}
WITH_WEIGHTS = {"linear", "conv"}


def reloaded(program: Any) -> Program:
    """Our program as coremltools reads it from a package."""
    lowered = lower(program)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.mlpackage"
        write_package(path, lowered, Arrays({}))  # the weights are arrays in the program, see `real_weights`
        spec = ct.utils.load_spec(str(path))
        weights = str(path / "Data/com.apple.CoreML/weights")
        return load(spec, specification_version=spec.specificationVersion, file_weights_dir=weights)


def hashes(program: Program) -> tuple[list[str], Counter[str]]:
    """The hash of every output, and how many operations of each kind there are."""
    function = program.functions["main"]
    known = {var: digest("input", name, var.shape, var.dtype) for name, var in function.inputs.items()}
    host = {var for name, var in function.inputs.items() if name in HOST_NUMBERS}
    count: Counter[str] = Counter()
    for op in function.operations:  # in the order of the data
        if op.op_type == "const":
            known[op.outputs[0]] = constant(op.outputs[0].val)
            continue
        arguments = [var for var in upstream(op) if var.op is None or var.op.op_type != "const"]
        if op.op_type not in WITH_WEIGHTS and all(var in host for var in arguments):
            host.update(op.outputs)
            for var in op.outputs:
                known[var] = digest("sinusoid", var.shape, sorted({one.name for one in sources(var)}))
            continue
        scaled = scaled_query(op)
        if scaled is not None:
            known[op.outputs[0]] = scaled_reshape(op.x.op, scaled, known)
            continue
        count[op.op_type] += 1
        parts = [(name, hash_of(op, name, value, known)) for name, value in arguments_of(op)]
        for i, var in enumerate(op.outputs):
            known[var] = digest(op.op_type, i, parts)
    return [known[out] for out in function.outputs], count


def hash_of(op: Any, name: str, value: Any, known: Mapping[Var, str]) -> Any:
    """The hash of one argument; parameters that have several spellings get one."""
    if isinstance(value, (list, tuple)):
        return [known[one] for one in value]
    if name in {"perm", "axes", "axis"}:
        rank = (op.values[0] if op.op_type == "concat" else op.x).rank
        return [int(axis) % rank for axis in np.atleast_1d(value.val)]
    if (op.op_type, name) == ("reshape", "shape"):
        return [int(size) for size in op.outputs[0].shape]
    return known[value]


def scaled_query(op: Any) -> float | None:
    """The s of mul(reshape(linear), s), which has to be head_dim^-1/2."""
    if op.op_type != "mul" or op.y.val is None or np.ndim(op.y.val) != 0:
        return None
    reshape = op.x.op
    if reshape is None or reshape.op_type != "reshape" or reshape.x.op is None or reshape.x.op.op_type != "linear":
        return None
    scale = op.x.shape[-1] ** -0.5
    assert op.y.val == np.float16(scale)
    return scale


def scaled_reshape(reshape: Any, scale: float, known: Mapping[Var, str]) -> str:
    """The hash `reshape` would have if weight and bias of the linear layer before it were multiplied by `scale`."""
    linear = reshape.x.op
    parts = [
        (name, known[value] if name == "x" else constant((value.val.astype(np.float32) * scale).astype(np.float16)))
        for name, value in arguments_of(linear)
    ]
    x = digest("linear", 0, parts)
    parts = [(n, x if n == "x" else hash_of(reshape, n, value, known)) for n, value in arguments_of(reshape)]
    return digest("reshape", 0, parts)


def arguments_of(op: Any) -> list[tuple[str, Any]]:
    return [(name, op.inputs[name]) for name in sorted(op.inputs) if op.inputs[name] is not None]


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def constant(value: Any) -> str:
    array = np.asarray(value)
    return digest("const", array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).hexdigest())


def upstream(op: Any) -> list[Var]:
    return [one for _, value in arguments_of(op) for one in (value if isinstance(value, (list, tuple)) else [value])]


def sources(var: Var) -> set[Var]:
    """The program's inputs that `var` depends on."""
    if var.op is None:
        return {var}
    return {source for one in upstream(var.op) for source in sources(one)}


def emitted(module: torch.nn.Module, inputs: Mapping[str, tuple[np.ndarray, type]], attention: str) -> Program:
    """What coremltools makes of a traced network."""
    example = tuple(torch.from_numpy(array) for array, _ in inputs.values())
    with torch.no_grad():
        traced = torch.jit.trace(module, example, check_trace=False)
    return ct.convert(
        traced,
        inputs=[ct.TensorType(name, array.shape, dtype=dtype) for name, (array, dtype) in inputs.items()],
        outputs=[ct.TensorType("out", dtype=np.float32)],
        minimum_deployment_target=ct.target.iOS18 if attention == "sdpa" else ct.target.iOS16,
        compute_precision=ct.precision.FLOAT16,
        convert_to="milinternal",
    )


def assert_same_graph(ours: Any, theirs: Program) -> None:
    (our_hashes, our_count), (their_hashes, their_count) = hashes(reloaded(ours)), hashes(theirs)
    assert our_count == their_count
    assert our_hashes == their_hashes


def real_weights(arrays: Mapping[str, np.ndarray]) -> Any:
    """The arrays themselves in the place of stand-ins."""

    def weights(name: str, shape: tuple[int, ...], *, scale: float = 1.0, dtype: Any = np.float16) -> np.ndarray:
        return (arrays[name].astype(np.float32) * np.float32(scale)).astype(dtype).reshape(shape)

    return weights


class AppleUNet(torch.nn.Module):
    """diffusers' UNet behind Apple's inputs."""

    def __init__(self, module: torch.nn.Module, config: UNetConfig) -> None:
        super().__init__()
        self.module, self.config = module, config

    def forward(self, sample: Any, timestep: Any, context: Any, *rest: Any) -> Any:
        names = (["time_ids", "text_embeds"] if self.config.time_ids is not None else []) + (
            ["timestep_cond"] if self.config.timestep_cond_dim is not None else []
        )
        given = dict(zip(names, rest, strict=True))
        cond = given.pop("timestep_cond", None)
        context = context.squeeze(2).transpose(1, 2)
        return self.module(sample, timestep, context, timestep_cond=cond, added_cond_kwargs=given, return_dict=False)[0]


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("sd1", "einsum"),
        ("sdxl", "sdpa"),
        *(
            pytest.param(family, attention, marks=pytest.mark.slow)
            for family, attention in itertools.product(("sd1", "sd2", "sdxl", "pruned"), ("einsum", "sdpa"))
            if (family, attention) not in {("sd1", "einsum"), ("sdxl", "sdpa")}
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of tracing and of coremltools' frontend, about code that is not ours
def test_unet(networks: Any, family: str, attention: str) -> None:
    config, module = networks.unet(family)
    ours = unet(
        config,
        real_weights(networks.state(module)),
        height=HEIGHT,
        width=WIDTH,
        tokens=TOKENS,
        attention=attention,
        layout="channels_last",
    )
    inputs = {
        "sample": (np.ones((2, config.in_channels, HEIGHT, WIDTH), np.float32), np.float16),
        "timestep": (np.ones(2, np.float32), np.float32),
        "encoder_hidden_states": (np.ones((2, config.context_dim, 1, TOKENS), np.float32), np.float16),
    }
    if config.time_ids is not None:
        inputs["time_ids"] = (np.ones((2, config.time_ids), np.float32), np.float32)
        inputs["text_embeds"] = (np.ones((2, config.pooled_dim), np.float32), np.float16)
    assert_same_graph(ours, emitted(AppleUNet(module, config).eval(), inputs, attention))


@pytest.mark.parametrize("attention", ["einsum", pytest.param("sdpa", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # of tracing and of coremltools' frontend, about code that is not ours
def test_vae_decoder(networks: Any, attention: str) -> None:
    class Decoder(torch.nn.Module):
        def forward(self, z: Any) -> Any:
            return module.decode(z, return_dict=False)[0]

    config, module = networks.vae()
    weights = real_weights(networks.state(module))
    ours = vae_decoder(config, weights, height=HEIGHT, width=WIDTH, attention=attention, layout="channels_last")
    z = np.ones((1, config.latent_channels, HEIGHT, WIDTH), np.float32)
    assert_same_graph(ours, emitted(Decoder().eval(), {"z": (z, np.float16)}, attention))


@pytest.mark.parametrize("attention", [pytest.param("einsum", marks=pytest.mark.slow), "sdpa"])
@pytest.mark.filterwarnings("ignore")  # of tracing and of coremltools' frontend, about code that is not ours
def test_vae_encoder(networks: Any, attention: str) -> None:
    class Encoder(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return module.quant_conv(module.encoder(x))

    config, module = networks.vae()
    weights = real_weights(networks.state(module))
    ours = vae_encoder(config, weights, height=HEIGHT, width=WIDTH, attention=attention, layout="channels_last")
    x = np.ones((1, 3, HEIGHT, WIDTH), np.float32)
    assert_same_graph(ours, emitted(Encoder().eval(), {"x": (x, np.float16)}, attention))


def test_the_hash_sees_every_difference(networks: Any) -> None:
    """One bit of one weight, one factor, one wire: each changes the hash."""
    config, module = networks.vae()
    arrays = networks.part_of(networks.state(module), "encoder.", "quant_conv.")
    form = {"height": HEIGHT, "width": WIDTH, "attention": "sdpa", "layout": "channels_last"}

    def hashed(changed: Mapping[str, np.ndarray], **sizes: Any) -> list[str]:
        return hashes(reloaded(vae_encoder(config, real_weights(changed), **(form | sizes))))[0]

    same = hashed(arrays)
    assert hashed(dict(arrays)) == same
    bits = arrays["encoder.mid_block.resnets.0.norm1.bias"].astype(np.float16).view(np.uint16).copy()
    bits[-1] ^= 1
    touched = {**arrays, "encoder.mid_block.resnets.0.norm1.bias": bits.view(np.float16)}
    assert hashed(touched) != same
    swapped = {
        name: arrays[name.replace("to_k", "to_v") if "to_k" in name else name.replace("to_v", "to_k")]
        for name in arrays
    }
    assert hashed(swapped) != same
    assert hashed(arrays, attention="einsum") != same
    assert hashed(arrays, layout="channels_first") != same
    assert hashed(arrays, width=WIDTH + 8) != same
