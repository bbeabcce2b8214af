"""OFT, BOFT, GLoRA and (IA)3 against their formulas written with whole matrices, in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.linalg

from glassine.convert.lora import LoraFile, with_loras
from glassine.convert.weights import Arrays
from glassine.errors import ConversionError

RNG = np.random.default_rng(17)
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
SQUARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
FLAT = "down_blocks.0.resnets.0.conv2"
NORM = "down_blocks.0.attentions.0.transformer_blocks.0.norm1"
EMPTY = ((16, 0), (0, 16), (24, 4), (4, 16))  # a GLoRA of rank 0
SHAPES = {
    f"{NORM}.weight": (16,),
    f"{LINEAR}.weight": (24, 16),
    f"{LINEAR}.bias": (24,),
    f"{SQUARE}.weight": (16, 16),
    f"{CONV}.weight": (24, 16, 3, 3),
    f"{CONV}.bias": (24,),
    f"{FLAT}.weight": (24, 24, 3, 3),
}
BASE = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def rand(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def merged(checkpoints, tmp_path):
    """merged({key: array}, strength, config): every weight that changed, by name."""

    def merge(tensors, strength=1.0, config=None):
        path = checkpoints.write_safetensors(tmp_path / "l.safetensors", tensors, dtype="F32")
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        stack = with_loras({"unet": Arrays(BASE)}, [LoraFile(path, strength)])["unet"]
        found = {name: stack.read(name, 0, math.prod(shape)).reshape(shape) for name, shape in SHAPES.items()}
        return {name: array for name, array in found.items() if not np.array_equal(array, BASE[name])}

    return merge


def kohya(module, tensors):
    return {f"lora_unet_{module.replace('.', '_')}.{name}": array for name, array in tensors.items()}


def peft(module, tensors):
    return {f"base_model.model.{module}.{name}": array for name, array in tensors.items()}


def is_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        peak = float(np.abs(array).max())
        # measured at most 3e-7 of the largest
        np.testing.assert_allclose(found[name], array.reshape(SHAPES[name]), rtol=0, atol=1e-6 * peak, err_msg=name)


def wide(name):
    """A weight as a matrix (out, in * kernel)."""
    return BASE[name].reshape(len(BASE[name]), -1).astype(np.float64)


def cayley(q):
    return (np.eye(len(q)) + q) @ np.linalg.inv(np.eye(len(q)) - q)


def diagonal(blocks):
    return scipy.linalg.block_diag(*blocks)


@pytest.mark.parametrize("module", [LINEAR, CONV])
@pytest.mark.parametrize(("stages", "size"), [(1, 8), (2, 4), (3, 2)])
@pytest.mark.parametrize(("strength", "constraint"), [(1.0, 0.0), (0.6, 0.002)])
def test_lycoris_boft(module, stages, size, strength, constraint, merged):
    """Stage i swaps rows that are 2^i half-blocks apart into one block, rotates, and swaps them back."""
    name, count = f"{module}.weight", 24 // size
    blocks, rescale = 0.3 * rand(stages, count, size, size), 1 + 0.1 * rand(24, 1)
    q = (blocks - blocks.swapaxes(2, 3)).astype(np.float64)
    if constraint:
        limit = float(np.float32(constraint)) * 24
        assert np.linalg.norm(q) > limit
        q *= limit / np.linalg.norm(q)
    rows = wide(name)
    for i in range(stages):
        reach = size // 2 << i
        stage = diagonal([np.eye(size) + strength * (cayley(block) - np.eye(size)) for block in q[i]])
        to = np.zeros((24, 24))  # row (c, k, g) of what is rotated is row (c, g, k) of the weight
        for c in range(24 // (2 * reach)):
            for g in range(2):
                for k in range(reach):
                    to[(c * reach + k) * 2 + g, (c * 2 + g) * reach + k] = 1
        rows = to.T @ stage @ to @ rows
    tensors = {"oft_blocks": blocks, "rescale": rescale, "alpha": np.float32(constraint)}
    is_equal(merged(kohya(module, tensors), strength), {name: rows * rescale})


@pytest.mark.parametrize("strength", [1.0, -0.4])
@pytest.mark.parametrize("kind", ["linear", "convolution", "tucker", "older"])
def test_glora(kind, strength, merged):
    module = LINEAR if kind in ("linear", "older") else CONV
    weight = BASE[f"{module}.weight"].astype(np.float64)
    ones, kernel = (1,) * (weight.ndim - 2), weight.shape[2:]
    a1, a2, b1 = rand(16, 4, *ones), rand(4, 16, *ones), rand(24, 4, *ones)
    b2 = rand(4, 16, *(ones if kind == "tucker" else kernel))
    tensors = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": np.float32(2)}
    up, down = b1.reshape(24, 4).astype(np.float64), b2.astype(np.float64)
    if kind == "tucker":
        tensors["bm.weight"] = rand(4, 4, *kernel)
        down = np.einsum("rskl,si->rikl", tensors["bm.weight"].astype(np.float64), down.reshape(4, 16))
    if kind == "older":
        tensors |= {"a1.weight": a2, "a2.weight": a1, "b1.weight": b2, "b2.weight": b1}
    through = np.einsum("oi...,ir,rj->oj...", weight, a1.reshape(16, 4), a2.reshape(4, 16))
    added = (up @ down.reshape(4, -1)).reshape(weight.shape)
    found = merged(kohya(module, tensors), strength)
    is_equal(found, {f"{module}.weight": weight + strength * 0.5 * (through + added)})


@pytest.mark.parametrize("on_input", [0, 1])
@pytest.mark.parametrize("module", [LINEAR, CONV])
def test_lycoris_ia3(module, on_input, merged):
    weight = BASE[f"{module}.weight"].astype(np.float64)
    size, ones = weight.shape[on_input], (1,) * (weight.ndim - 2)
    vector = 0.2 * rand(*((size,) if weight.ndim == 2 else (1, size, *ones)))
    found = merged(kohya(module, {"weight": vector, "on_input": np.float32(on_input)}), 0.7)
    factors = vector.reshape(*((1, size) if on_input else (size, 1)), *ones)
    is_equal(found, {f"{module}.weight": weight * (1 + 0.7 * factors)})


def test_peft_ia3_scales_outputs_with_their_bias_and_the_list_says_which_inputs(merged):
    rows, columns = 1 + 0.2 * rand(24, 1), 1 + 0.2 * rand(1, 16)
    found = merged(peft(LINEAR, {"ia3_l": rows}), 0.5)
    half = 0.5 + 0.5 * rows.astype(np.float64)
    expected = {
        f"{LINEAR}.weight": wide(f"{LINEAR}.weight") * half,
        f"{LINEAR}.bias": BASE[f"{LINEAR}.bias"] * half[:, 0],
    }
    is_equal(found, expected)
    is_equal(merged(peft(LINEAR, {"ia3_l": columns})), {f"{LINEAR}.weight": wide(f"{LINEAR}.weight") * columns})
    both = {"ia3_l": 1 + 0.2 * rand(1, 24, 1, 1)}  # a convolution with as many inputs as outputs
    with pytest.raises(ConversionError, match=r"a list feedforward_modules in PEFT's adapter_config\.json"):
        merged(peft(FLAT, both))
    for named, shape in ((["conv2"], (1, 24, 1, 1)), ([], (24, 1, 1, 1))):
        weight = BASE[f"{FLAT}.weight"].astype(np.float64) * both["ia3_l"].reshape(shape)
        is_equal(merged(peft(FLAT, both), config={"feedforward_modules": named}), {f"{FLAT}.weight": weight})


@pytest.mark.parametrize("module", [LINEAR, CONV])
@pytest.mark.parametrize("shared", [False, True])
def test_peft_oft_of_0_14(module, shared, merged):
    """R = (I - S)(I + S)^-1 on the columns, and a factor for every row."""
    name = f"{module}.weight"
    columns = wide(name).shape[1]
    blocks, factors = 0.4 * rand(1 if shared else columns // 8, 8, 8), 1 + 0.1 * rand(24, 1)
    s = 0.5 * (blocks - blocks.swapaxes(1, 2)).astype(np.float64)
    rotation = diagonal([cayley(-s[0 if shared else i]) for i in range(columns // 8)])
    target = (rotation @ wide(name).T).T * factors
    found = merged(peft(module, {"oft_r": blocks, "oft_s": factors}), 0.5)
    is_equal(found, {name: 0.5 * (wide(name) + target)})


@pytest.mark.parametrize(("count", "size"), [(4, 6), (5, 5), (1, 7)])
@pytest.mark.parametrize("module", [LINEAR, CONV])
def test_peft_oft_before_0_14(module, count, size, merged):
    """The rows are rotated; the last block is cut where they are no multiple of its size."""
    name = f"{module}.weight"
    blocks = 0.4 * rand(count, size, size)
    s = 0.5 * (blocks - blocks.swapaxes(1, 2)).astype(np.float64)
    rotation = diagonal([cayley(-s[i if count > 1 else 0]) for i in range(-(-24 // size))])[:24, :24]
    is_equal(merged(peft(module, {"oft_r": blocks})), {name: (wide(name).T @ rotation).T})


def test_what_does_not_fit_is_refused(merged):
    cases = [
        (kohya(LINEAR, {"oft_blocks": rand(2, 4, 4, 4)}), r"oft_blocks\" has shape \(2, 4, 4, 4\), but the weight is"),
        (kohya(LINEAR, {"oft_blocks": rand(5, 12, 2, 2)}), r"oft_blocks\" has shape"),
        (kohya(LINEAR, {"oft_blocks": rand(0, 6, 4, 4)}), r"oft_blocks\" has shape \(0, 6, 4, 4\)"),
        (peft(NORM, {"ia3_l": rand(16)}), r"ia3_l\" has shape \(16,\), but the weight is \(16,\)"),
        (
            kohya(LINEAR, {f"{x}.weight": rand(*s) for x, s in zip(("a1", "a2", "b1", "b2"), EMPTY, strict=True)}),
            r"a1.weight\" has shape \(16, 0\)",
        ),
        (peft(LINEAR, {"oft_R.weight": rand(2, 28)}), r"none lies beside the file"),
        (peft(LINEAR, {"oft_R.weight": rand(2, 27)}), r"oft_R.weight\" has shape \(2, 27\), but the weight is"),
        (peft(LINEAR, {"boft_R": rand(1, 2, 8, 8), "boft_s": rand(16, 1)}), r"boft_s\" has shape"),
        (peft(LINEAR, {"boft_R": rand(3, 2, 8, 8), "boft_s": rand(24, 1)}), r"boft_R\" has shape"),
        (peft(LINEAR, {"ia3_l": rand(16, 1)}), r"ia3_l\" has shape \(16, 1\), but the weight is \(24, 16\)"),
        (peft(LINEAR, {"oft_r": np.full((2, 12, 12), np.nan, np.float32)}), "not finite; no rotation"),
        (kohya(LINEAR, {"a1.weight": rand(4, 8), "a2.weight": rand(8, 4)}), "make no LoRA.*GLoRA"),
        (kohya(LINEAR, {"on_input": np.float32(1)}), "make no LoRA"),
    ]
    for tensors, message in cases:
        with pytest.raises(ConversionError, match=message):
            merged(tensors)
    with pytest.raises(ConversionError, match="expected 1 to 64"):
        merged(peft(LINEAR, {"oft_R.weight": rand(2, 28)}), config={"num_cayley_neumann_terms": 1 << 40})
    with pytest.raises(ConversionError, match="constrained OFT of PEFT before"):
        merged(peft(LINEAR, {"oft_r": rand(3, 8, 8)}), config={"coft": True})
