"""LoRA and kin against their formulas, in all spellings, and what is no LoRA for this model."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from glassine.convert.checkpoint import Tensor, read_header
from glassine.convert.lora import LoraFile, lora_patches, with_loras
from glassine.convert.lora_names import ldm_names
from glassine.convert.weights import Arrays
from glassine.errors import CheckpointError, ConversionError, GlassineError

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR = f"{BLOCK}.attn1.to_q"
SQUARE = f"{BLOCK}.attn1.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
POINT = "down_blocks.0.attentions.0.proj_in"
NORM = f"{BLOCK}.norm1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
UNET = {
    f"{LINEAR}.weight": (12, 8),
    f"{SQUARE}.weight": (8, 8),
    f"{SQUARE}.bias": (8,),
    f"{CONV}.weight": (12, 8, 3, 3),
    f"{POINT}.weight": (12, 8, 1, 1),
    f"{NORM}.weight": (8,),
    f"{NORM}.bias": (8,),
    "down_blocks.0.resnets.1.conv1.weight": (12, 12, 3, 3),
    "conv_in.weight": (8, 9, 3, 3),
}
RNG = np.random.default_rng(7)


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


BASE = {"unet": drawn(UNET), "text_encoder": drawn({f"{TEXT}.weight": (8, 8), f"{TEXT}.bias": (8,)})}


def kohya(module: str, part: str = "unet") -> str:
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + module.replace(".", "_")


def rand(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def merged(checkpoints, tmp_path):
    """merged(tensors, strength, part): the whole changed part, by name."""

    def merge(tensors, strength=1.0, part="unet", metadata=None, base=BASE):
        path = checkpoints.write_safetensors(tmp_path / "l.safetensors", tensors, dtype="F32", metadata=metadata)
        sources = {key: Arrays(arrays) for key, arrays in base.items()}
        stack = with_loras(sources, [LoraFile(path, strength, strength)])[part]
        return {name: stack.read(name, 0, math.prod(shape)).reshape(shape) for name, shape in stack.shapes.items()}

    return merge


def compare(found, expected, base=BASE["unet"]):
    """`expected` holds the changed weights; all others are the base's, bit for bit."""
    for name, array in found.items():
        if name in expected:
            # float32 against float64, measured against the largest value: 2e-7
            peak = float(np.abs(expected[name]).max())
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-6 * peak, err_msg=name)
            assert not np.array_equal(array, base[name])
        else:
            np.testing.assert_array_equal(array, base[name], err_msg=name)


def wide(array):
    return torch.from_numpy(array).double()


def through_convolutions(down, mid, up, weight_shape):
    """The weight of a convolution that does what the small ones do one after the other, by its impulse responses."""
    channels, kernel = weight_shape[1], weight_shape[2]
    size = 2 * kernel + 1
    impulses = torch.zeros(channels, channels, size, size, dtype=torch.float64)
    for i in range(channels):
        impulses[i, i, kernel, kernel] = 1
    x = torch.nn.functional.conv2d(impulses, wide(down), padding=down.shape[-1] // 2)
    if mid is not None:
        x = torch.nn.functional.conv2d(x, wide(mid), padding=kernel // 2)
    x = torch.nn.functional.conv2d(x, wide(up))
    reach = kernel // 2
    cut = x[:, :, kernel - reach : kernel + reach + 1, kernel - reach : kernel + reach + 1]
    return cut.flip(2, 3).permute(1, 0, 2, 3).numpy()


# Kind -> (module, tensors, its difference before strength, in float64); alpha / rank is 0.5 where there is one.
def plain(module=LINEAR):
    down, up = rand(4, 8), rand(12, 4)
    return (
        module,
        {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.float32(2)},
        0.5 * (wide(up) @ wide(down)),
    )


def locon():
    down, up = rand(4, 8, 3, 3), rand(12, 4, 1, 1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.float32(2)}
    return CONV, tensors, 0.5 * through_convolutions(down, None, up, (12, 8, 3, 3))


def tucker():
    down, mid, up = rand(4, 8, 1, 1), rand(4, 4, 3, 3), rand(12, 4, 1, 1)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": np.float32(2)}
    return CONV, tensors, 0.5 * through_convolutions(down, mid, up, (12, 8, 3, 3))


def point():
    """A matrix for what is a 1x1 convolution here."""
    module, tensors, delta = plain(POINT)
    return module, tensors, delta[:, :, None, None]


def loha():
    a, b, c, d = rand(12, 4), rand(4, 72), rand(12, 4), rand(4, 72)
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": np.float32(2)}
    return CONV, tensors, 0.5 * ((wide(a) @ wide(b)) * (wide(c) @ wide(d))).reshape(12, 8, 3, 3)


def loha_tucker():
    t1, t2, a, b, c, d = rand(4, 4, 3, 3), rand(4, 4, 3, 3), rand(4, 12), rand(4, 8), rand(4, 12), rand(4, 8)
    names = ("hada_t1", "hada_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {**dict(zip(names, (t1, t2, a, b, c, d), strict=True)), "alpha": np.float32(2)}
    first = torch.einsum("ijkl,ip,jr->prkl", wide(t1), wide(a), wide(b))
    return CONV, tensors, 0.5 * first * torch.einsum("ijkl,ip,jr->prkl", wide(t2), wide(c), wide(d))


def lokr():
    w1, a, b = rand(3, 2), rand(4, 2), rand(2, 4)
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": np.float32(1)}
    return LINEAR, tensors, 0.5 * torch.kron(wide(w1), wide(a) @ wide(b))


def lokr_full():
    w1, w2 = rand(3, 2), rand(4, 4, 3, 3)  # nothing is of low rank: alpha counts for nothing
    tensors = {"lokr_w1": w1, "lokr_w2": w2, "alpha": np.float32(1)}
    return CONV, tensors, torch.kron(wide(w1)[:, :, None, None], wide(w2))


def lokr_tucker():
    a1, b1, t2, a2, b2 = rand(3, 2), rand(2, 2), rand(2, 2, 3, 3), rand(2, 4), rand(2, 4)
    tensors = {
        "lokr_w1_a": a1,
        "lokr_w1_b": b1,
        "lokr_t2": t2,
        "lokr_w2_a": a2,
        "lokr_w2_b": b2,
        "alpha": np.float32(1),
    }
    w2 = torch.einsum("ijkl,ip,jr->prkl", wide(t2), wide(a2), wide(b2))
    return CONV, tensors, 0.5 * torch.kron((wide(a1) @ wide(b1))[:, :, None, None], w2.contiguous())


def full():
    diff = rand(12, 8, 3, 3)
    return CONV, {"diff": diff}, diff


def norm():
    diff = rand(8)
    return NORM, {"w_norm": diff}, diff


KINDS = [plain, locon, tucker, point, loha, loha_tucker, lokr, lokr_full, lokr_tucker, full, norm]


@pytest.mark.parametrize("strength", [1.0, -0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_additive_kinds(kind, strength, merged):
    module, tensors, delta = kind()
    found = merged({f"{kohya(module)}.{name}": array for name, array in tensors.items()}, strength)
    name = f"{module}.weight"
    compare(found, {name: BASE["unet"][name].astype(np.float64) + strength * np.asarray(delta)})


@pytest.mark.parametrize("side", ["rows", "columns", "vector"])
@pytest.mark.parametrize("kind", [plain, locon, loha, lokr])
def test_dora(kind, side, merged):
    module, tensors, delta = kind()
    weight = BASE["unet"][f"{module}.weight"].astype(np.float64)
    ones = (1,) * (weight.ndim - 2)
    shape = {"rows": (12, 1, *ones), "columns": (1, 8, *ones), "vector": (12,)}[side]
    scale = np.abs(rand(*shape))
    moved = weight + np.asarray(delta)
    axes = tuple(axis for axis in range(weight.ndim) if axis != (1 if side == "columns" else 0))
    target = moved * scale.reshape(1 if side == "columns" else 12, -1, *ones)
    target = target / np.sqrt((moved**2).sum(axis=axes, keepdims=True))
    found = merged({f"{kohya(module)}.{name}": array for name, array in {**tensors, "dora_scale": scale}.items()}, 0.6)
    compare(found, {f"{module}.weight": weight + 0.6 * (target - weight)})


@pytest.mark.parametrize("constraint", [None, 0.01])
@pytest.mark.parametrize("module", [LINEAR, CONV])
def test_oft(module, constraint, merged):
    blocks, scale = 0.3 * rand(3, 4, 4), 1 + 0.1 * rand(12, 1)
    tensors = {"oft_blocks": blocks, "rescale": scale}
    q = wide(blocks) - wide(blocks).transpose(1, 2)
    if constraint is not None:
        tensors["alpha"] = np.float32(constraint)
        assert q.norm() > constraint * 12  # or nothing would be tested
        q = q * (float(tensors["alpha"]) * 12 / q.norm())
    eye = torch.eye(4, dtype=torch.float64)
    rotation = torch.block_diag(*torch.bmm(eye + q, torch.linalg.inv(eye - q)))
    assert torch.allclose(rotation @ rotation.T, torch.eye(12, dtype=torch.float64))
    weight = BASE["unet"][f"{module}.weight"].astype(np.float64)
    target = scale * np.einsum("oi,op->pi", weight.reshape(12, -1), rotation.numpy())
    found = merged({f"{kohya(module)}.{name}": array for name, array in tensors.items()}, 0.5)
    compare(found, {f"{module}.weight": weight + 0.5 * (target.reshape(weight.shape) - weight)})


def test_biases_and_norms(merged):
    down, up, bias, diff = rand(2, 8), rand(8, 2), rand(8), rand(8)
    found = merged(
        {
            f"{kohya(SQUARE)}.lora_down.weight": down,
            f"{kohya(SQUARE)}.lora_up.weight": up,  # no alpha: as it is
            f"{kohya(SQUARE)}.diff_b": bias,
            f"{kohya(NORM)}.b_norm": diff,
        },
        0.5,
    )
    base = BASE["unet"]
    compare(
        found,
        {
            f"{SQUARE}.weight": base[f"{SQUARE}.weight"] + 0.5 * (up.astype(np.float64) @ down),
            f"{SQUARE}.bias": base[f"{SQUARE}.bias"] + 0.5 * bias.astype(np.float64),
            f"{NORM}.bias": base[f"{NORM}.bias"] + 0.5 * diff.astype(np.float64),
        },
    )


def test_a_lora_of_the_plain_model_goes_into_the_latents_channels_of_an_inpainting_model(merged):
    down, up = rand(2, 4, 3, 3), rand(8, 2, 1, 1)
    found = merged({"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up})
    expected = BASE["unet"]["conv_in.weight"].astype(np.float64)
    expected[:, :4] += np.einsum("or,rikl->oikl", up[:, :, 0, 0].astype(np.float64), down)
    compare(found, {"conv_in.weight": expected})


def test_several_loras_add_up_each_at_its_strength(checkpoints, tmp_path):
    files, expected = (
        [],
        {part: {name: a.astype(np.float64) for name, a in arrays.items()} for part, arrays in BASE.items()},
    )
    for i, (unet, text) in enumerate([(0.8, 0.3), (-0.5, 0.0)]):
        tensors = {}
        for part, module, strength, out in (("unet", LINEAR, unet, 12), ("text_encoder", TEXT, text, 8)):
            down, up = rand(3, 8), rand(out, 3)
            tensors |= {f"{kohya(module, part)}.lora_down.weight": down, f"{kohya(module, part)}.lora_up.weight": up}
            expected[part][f"{module}.weight"] += strength * (up.astype(np.float64) @ down)
        path = checkpoints.write_safetensors(tmp_path / f"{i}.safetensors", tensors, dtype="F32")
        files.append(LoraFile.parse(f"{path}={unet},{text}"))
    stack = with_loras({part: Arrays(arrays) for part, arrays in BASE.items()}, files)
    for part, weights in expected.items():
        for name, array in weights.items():
            found = stack[part].read(name, 0, array.size).reshape(array.shape)
            np.testing.assert_allclose(found, array, rtol=1e-6, atol=1e-6)
    assert "0.safetensors (0.8) with" in stack["unet"].origin(f"{LINEAR}.weight")
    assert "(0.3)" in stack["text_encoder"].origin(f"{TEXT}.weight")
    assert "1.safetensors" not in stack["text_encoder"].origin(f"{TEXT}.weight")  # its strength is 0


SPELLINGS = {
    "kohya": ("lora_unet_{u}.lora_down.weight", "lora_unet_{u}.lora_up.weight", "lora_te_{t}"),
    "kohya, SDXL": ("lora_unet_{l}.lora_down.weight", "lora_unet_{l}.lora_up.weight", "lora_te1_{t}"),
    "PEFT in diffusers": ("unet.{d}.lora_A.weight", "unet.{d}.lora_B.weight", "text_encoder.{T}"),
    "PEFT": ("base_model.model.{d}.lora_A.weight", "base_model.model.{d}.lora_B.weight", "base_model.model.{T}"),
    "older diffusers": ("unet.{p}_lora.down.weight", "unet.{p}_lora.up.weight", "text_encoder.{T}"),
    "oldest diffusers": ("{p}_lora.down.weight", "{p}_lora.up.weight", "text_encoder.{T}"),
    "ComfyUI": ("diffusion_model.{L}.lora_down.weight", "diffusion_model.{L}.lora_up.weight", "text_encoder.{s}"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling, merged):
    ldm = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    words = {
        "u": LINEAR.replace(".", "_"), "d": LINEAR, "l": ldm.replace(".", "_"), "L": ldm,
        "p": LINEAR.replace("attn1.to_q", "attn1.processor.to_q"),
        "t": TEXT.replace(".", "_"), "T": TEXT, "s": TEXT.removeprefix("text_model."),
    }  # fmt: skip
    down_key, up_key, text = (template.format(**words) for template in SPELLINGS[spelling])
    endings = ("lora_linear_layer.down", "lora_linear_layer.up") if "older" in spelling else ("lora_A", "lora_B")
    down, up, text_down, text_up = rand(3, 8), rand(12, 3), rand(3, 8), rand(8, 3)
    tensors = {
        down_key: down,
        up_key: up,
        f"{text}.{endings[0]}.weight": text_down,
        f"{text}.{endings[1]}.weight": text_up,
    }
    compare(merged(tensors), {f"{LINEAR}.weight": BASE["unet"][f"{LINEAR}.weight"] + up.astype(np.float64) @ down})
    base = BASE["text_encoder"]
    expected = base[f"{TEXT}.weight"] + text_up.astype(np.float64) @ text_down
    compare(merged(tensors, part="text_encoder"), {f"{TEXT}.weight": expected}, base)


def test_both_encoders_of_sdxl_are_told_apart(merged):
    base = {"text_encoder": BASE["text_encoder"], "text_encoder_2": drawn({f"{TEXT}.weight": (8, 8)})}
    tensors, deltas = {}, {}
    for prefix, part in (("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2")):
        down, up = rand(2, 8), rand(8, 2)
        module = prefix + TEXT.replace(".", "_")
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        deltas[part] = up.astype(np.float64) @ down
    for part, delta in deltas.items():
        expected = {f"{TEXT}.weight": base[part][f"{TEXT}.weight"] + delta}
        compare(merged(tensors, part=part, base=base), expected, base[part])


@pytest.mark.parametrize("sizes", ["TINY", "SD15"])
def test_every_module_of_the_unet_is_found_by_its_ldm_name(sizes, checkpoints):
    shapes = checkpoints.ldm_unet(getattr(checkpoints, sizes))
    canonical = checkpoints.diffusers_names("unet", getattr(checkpoints, sizes))
    for key in shapes:
        assert key.removesuffix(".weight") in ldm_names(canonical[key].removesuffix(".weight"), 3) or "bias" in key


@pytest.mark.parametrize(
    ("stabilised", "pattern", "expected"),
    [(False, {}, 2.0), (True, {}, 8 / 4**0.5 / 1), (False, {"attn1.to_q": 6}, 1.5)],
)
def test_alphas_in_the_header(stabilised, pattern, expected, merged):
    said = {"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": stabilised, "unet.alpha_pattern": pattern}
    down, up = rand(4, 8), rand(12, 4)
    tensors = {f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}
    found = merged(tensors, metadata={"lora_adapter_metadata": json.dumps(said)})
    compare(found, {f"{LINEAR}.weight": BASE["unet"][f"{LINEAR}.weight"] + expected * (up.astype(np.float64) @ down)})


PAIR = {f"{kohya(LINEAR)}.lora_down.weight": rand(2, 8), f"{kohya(LINEAR)}.lora_up.weight": rand(12, 2)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**PAIR, "lora_unet_nowhere.lora_up.weight": rand(2, 2)}, r"1 of 3 keys change nothing .*lora_unet_nowhere"),
        ({**PAIR, f"{kohya(LINEAR)}.secret": rand(2)}, r"1 of 3 keys change nothing .*secret"),
        ({**PAIR, f"unet.{LINEAR}.lora_B.weight": rand(12, 2)}, "the same tensor under two names"),
        ({f"{kohya(LINEAR)}.lora_down.weight": rand(2, 8)}, "make no LoRA"),
        ({**PAIR, f"{kohya(LINEAR)}.hada_w1_a": rand(12, 2)}, "make no LoRA"),
        ({**PAIR, f"{kohya(LINEAR)}.lora_up.weight": rand(12, 3)}, "do not fit one another"),
        ({**PAIR, f"{kohya(LINEAR)}.lora_up.weight": rand(16, 2)}, r"shape \(16, 8\), the model's .* is \(12, 8\)"),
        ({**PAIR, f"{kohya(LINEAR)}.dora_scale": rand(5, 1)}, "dora_scale"),
        ({f"{kohya(LINEAR)}.oft_blocks": rand(3, 3, 3)}, r"oft_blocks.* has shape \(3, 3, 3\)"),
        ({f"{kohya(LINEAR)}.diff_b": rand(12)}, "the model has no such bias"),
        ({**PAIR, f"{kohya(LINEAR)}.alpha": rand(3)}, "is no number"),
        ({f"{kohya(LINEAR)}.lokr_w1": rand(3, 2)}, "neither lokr_w2 nor"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tensors, message, merged):
    with pytest.raises(ConversionError, match=message):
        merged(tensors)


def test_an_underscored_name_that_means_two_modules_is_refused(merged):
    base = {"unet": drawn({"a.b_c.weight": (4, 4), "a.b.c.weight": (4, 4)})}
    with pytest.raises(ConversionError, match=r"may mean a\.b\.c or a\.b_c"):
        merged({"lora_unet_a_b_c.diff": rand(4, 4)}, base=base)


def test_a_text_encoder_that_is_not_there_is_left_out_only_when_asked(checkpoints, tmp_path):
    tensors = {**PAIR, f"{kohya(TEXT, 'text_encoder')}.diff": rand(8, 8)}
    path = checkpoints.write_safetensors(tmp_path / "l.safetensors", tensors, dtype="F32")
    unet = {"unet": Arrays(BASE["unet"])}
    with pytest.raises(ConversionError, match=r"=0\.8,0 merges it without its text encoder"):
        lora_patches(LoraFile(path), unet)
    assert set(lora_patches(LoraFile(path, text=0.0), unet)) == {"unet"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0, 1.0)),
        ("a.safetensors=0.8", ("a.safetensors", 0.8, 0.8)),
        ("a=b.safetensors", ("a=b.safetensors", 1.0, 1.0)),
        ("dir/a=b.safetensors=-1,0", ("dir/a=b.safetensors", -1.0, 0.0)),
    ],
)
def test_file_and_strengths(words, expected):
    assert LoraFile.parse(words) == LoraFile(Path(expected[0]), *expected[1:])


@pytest.mark.parametrize("words", ["a=1,2,3", "a=nan", "=0.5", "a=inf"])
def test_strengths_that_are_none(words):
    with pytest.raises(ConversionError, match=r"expected FILE, FILE=STRENGTH or FILE=UNET,TEXT"):
        LoraFile.parse(words)


def test_damaged_files_are_refused_and_never_worse(checkpoints, tmp_path):
    """1000 files with bytes turned over in the header, cut short, or with sizes that lie."""
    tensors = {}
    for kind in KINDS:
        module, parts, _ = kind()
        if not any(key.startswith(kohya(module)) for key in tensors):
            tensors |= {f"{kohya(module)}.{name}": array for name, array in parts.items()}
    good = checkpoints.write_safetensors(tmp_path / "good.safetensors", tensors, dtype="F16").read_bytes()
    length = int.from_bytes(good[:8], "little")
    chance, path, refused = random.Random(1), tmp_path / "bad.safetensors", 0
    sources = {part: Arrays(arrays) for part, arrays in BASE.items()}
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(8 + length)] = chance.choice(
                b'0123456789[]{},:"\x00\xff' + bytes([chance.randrange(256)])
            )
        path.write_bytes(data[: chance.randrange(len(data))] if chance.random() < 0.1 else data)
        try:
            stack = with_loras(sources, [LoraFile(path)])
            for name, shape in stack["unet"].shapes.items():
                assert stack["unet"].read(name, 0, math.prod(shape)).size == math.prod(shape)
        except GlassineError:
            refused += 1
    assert refused > 900  # measured 985: the rest are values and alphas of the right form


def test_sizes_that_lie_do_not_make_memory(tmp_path):
    """A Kronecker product or low-rank pair can claim a weight a million times the file: refused by its shape alone."""
    from glassine.convert import lora_kinds

    def tensor(key, *shape):
        return Tensor(path=tmp_path, key=key, dtype="F16", shape=shape, offset=0, nbytes=2 * math.prod(shape))

    claims = {"lokr_w1": tensor("w1", 100000, 1), "lokr_w2": tensor("w2", 1, 100000)}
    tracemalloc.start()
    assert lora_kinds.delta_of(lora_kinds.Tensors("m", claims)).shape == (100000, 100000)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_big_weight_is_changed_in_place(merged, checkpoints, tmp_path):
    """The largest matrix of SD 1.5: 52 MB in float32, and a few more while a rank-32 LoRA goes in."""
    module = f"{BLOCK}.ff.net.0.proj"
    base = {"unet": Arrays({f"{module}.weight": np.zeros((10240, 1280), np.float16)})}
    tensors = {f"{kohya(module)}.lora_down.weight": rand(32, 1280), f"{kohya(module)}.lora_up.weight": rand(10240, 32)}
    path = checkpoints.write_safetensors(tmp_path / "l.safetensors", tensors)
    stack = with_loras(base, [LoraFile(path)])["unet"]
    tracemalloc.start()
    stack.read(f"{module}.weight", 0, 100)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert peak < 90  # measured 65 MB


def test_a_checkpoint_is_no_lora(tiny_checkpoint):
    with pytest.raises(ConversionError, match="keys change nothing in this model"):
        lora_patches(LoraFile(tiny_checkpoint), {part: Arrays(arrays) for part, arrays in BASE.items()})
    with pytest.raises(CheckpointError, match="no such file"):
        lora_patches(LoraFile(Path("nowhere.safetensors")), {})
    assert read_header(tiny_checkpoint)
