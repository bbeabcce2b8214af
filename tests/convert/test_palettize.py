"""Weights in fewer bits: the bytes, the operations and the packages, each against coremltools."""

import json
import math
import shutil

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.optimize import _utils as packing
from coremltools.optimize.coreml import (
    OpLinearQuantizerConfig,
    OpPalettizerConfig,
    OptimizationConfig,
    linear_quantize_weights,
    palettize_weights,
)

from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.index import read_indices
from glassine.convert.package import write_package
from glassine.convert.palettize import Form, Palette, encode, pack
from glassine.convert.program import Encoded, Requests, lower
from glassine.convert.verify import PartReport, note_palettes, verify_folder
from glassine.convert.weights import Arrays
from glassine.errors import ConversionError
from glassine.manifest import Manifest
from glassine.models import mil as mb
from glassine.models.layers import build, newest_opset
from glassine.runtime.engine import EngineOptions, open_engine
from glassine.runtime.engine.portable.ops import constexpr
from glassine.runtime.engine.portable.weights import unpack_bits

# coremltools leaves its temporary packages to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")

RNG = np.random.default_rng(0)
WEIGHTS = {
    "conv.weight": (0.05 * RNG.standard_t(6, (64, 48, 3, 3))).astype(np.float16),
    "conv.bias": RNG.standard_normal(64).astype(np.float16),
    "mix.weight": (0.1 * RNG.standard_normal((64, 64))).astype(np.float16),
    "few.weight": (0.1 * RNG.standard_normal((8, 64))).astype(np.float16),
}
X = RNG.standard_normal((1, 48, 8, 8)).astype(np.float16).astype(np.float32)
FORMS = ("8", "6", "4", "int8")
EVERYWHERE = [*((words, newest) for words in FORMS for newest in (False, True)), ("4/16", True)]


def network(weights, *, scale=1.0, newest=False):
    def body(x):
        half = mb.cast(x=x, dtype="fp16")
        kernel, bias = mb.const(val=weights("conv.weight", (64, 48, 3, 3))), mb.const(val=weights("conv.bias", (64,)))
        y = mb.conv(x=half, weight=kernel, bias=bias, pad_type="same")
        y = mb.conv(x=y, weight=mb.const(val=weights("mix.weight", (64, 64, 1, 1), scale=scale)))
        return {"out": mb.conv(x=y, weight=mb.const(val=weights("few.weight", (8, 64, 1, 1))))}

    with newest_opset(newest):
        return build({"x": ((1, 48, 8, 8), np.float16)}, body)


def written(path, words, *, scale=1.0, newest=False):
    requests = Requests({name: array.shape for name, array in WEIGHTS.items()})
    palette = None if words is None else Palette(Form.read(words))
    lowered = lower(network(requests, scale=scale, newest=newest), palette=palette)
    write_package(path, lowered, Arrays(WEIGHTS))
    return lowered


def run(path):
    return open_engine(path, EngineOptions(engine="portable")).predict(x=X)["out"].copy()


def stored(weight, form):
    return {item: np.concatenate(list(pieces)) for item, pieces in encode(weight, form).items.items()}


def decoded(weight, form):
    """What `encode` stored, by the portable engine's definition of the operations."""
    items = stored(weight, form)
    shapes = form.items(weight.shape)
    if form.kind == "int8":
        values = items["values"].view(np.int8).reshape(weight.shape)
        return constexpr.blockwise_shift_scale(values, items["scales"].view(np.float16).reshape(shapes["scales"][0]))
    indices = unpack_bits(items["indices"], form.bits, weight.size).reshape(weight.shape)
    return constexpr.lut_to_dense(indices, items["table"].view(np.float16).reshape(shapes["table"][0]))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 4096, 300_001])
def test_bits_are_packed_as_coremltools_packs_them(bits, count):
    indices = RNG.integers(0, 1 << bits, count).astype(np.uint8)
    assert np.array_equal(pack(indices, bits), packing.pack_elements_into_bits(indices, bits))


@pytest.mark.parametrize("words", [*FORMS, "4/16", "6/32"])
@pytest.mark.parametrize("name", ["conv.weight", "mix.weight"])
def test_the_loss_is_what_decoding_shows(words, name):
    weight, form = WEIGHTS[name], Form.read(words)
    exact, lossy = weight.astype(np.float64), decoded(weight, form).astype(np.float64)
    loss = encode(weight, form).loss
    assert loss.elements == weight.size
    assert loss.power == pytest.approx(np.square(exact).sum(), rel=1e-5)
    assert loss.error == pytest.approx(np.square(exact - lossy).sum(), rel=1e-5)  # measured 2e-7
    assert loss.snr == pytest.approx(10 * math.log10(loss.power / loss.error))


@pytest.mark.parametrize("words", ["6", "4", "4/16"])
def test_every_value_gets_the_nearest_number_of_its_table(words):
    weight, form = WEIGHTS["mix.weight"], Form.read(words)
    table = stored(weight, form)["table"].view(np.float16).astype(np.float64).reshape(-1, 1 << form.bits)
    groups = weight.astype(np.float64).reshape(len(table), -1)
    least = np.stack([np.abs(part[:, None] - row).min(axis=1) for part, row in zip(groups, table, strict=True)])
    assert np.array_equal(np.abs(weight.astype(np.float64) - decoded(weight, form)).ravel(), least.ravel())
    assert (np.diff(table) >= 0).all()


def test_more_tables_lose_less():
    weight = WEIGHTS["conv.weight"] * np.linspace(0.2, 3, 64, dtype=np.float16)[:, None, None, None]
    snr = [encode(weight, Form.read(words)).loss.snr for words in ("4", "4/32", "4/8")]
    assert snr[0] + 0.5 < snr[1] < snr[2] - 0.5


def test_int8_is_a_scale_a_channel():
    weight = WEIGHTS["conv.weight"]
    items = stored(weight, Form.read("int8"))
    scales = (np.abs(weight.astype(np.float32)).reshape(64, -1).max(axis=1) / 127).astype(np.float16)
    assert np.array_equal(items["scales"].view(np.float16), scales)
    expected = np.rint(weight.astype(np.float32).reshape(64, -1) / scales.astype(np.float32)[:, None])
    assert np.array_equal(items["values"].view(np.int8), np.clip(expected, -127, 127).ravel())


def test_special_weights():
    zeros = np.zeros((64, 64), np.float16)
    for words in (*FORMS, "4/16"):
        assert np.array_equal(decoded(zeros, Form.read(words)), zeros)
    signed = np.tile(np.array([-0.0, 0.0, 1, -1], np.float16), (64, 16))
    assert encode(signed, Form.read("4")).loss.error == 0
    large = np.full((64, 64), 65504, np.float16)
    assert np.array_equal(decoded(large, Form.read("4")), large)
    tiny = np.full((64, 64), 6e-8, np.float16)
    assert np.isfinite(decoded(tiny, Form.read("int8"))).all()


@pytest.mark.parametrize("newest", [False, True])
@pytest.mark.parametrize("words", [*FORMS, "4/16"])
def test_a_package_computes_with_the_decoded_weights(tmp_path, words, newest):
    if "/" in words and not newest:
        with pytest.raises(ConversionError, match="needs the operations of macOS 15"):
            written(tmp_path / "a.mlpackage", words)
        return
    lowered = written(tmp_path / "a.mlpackage", words, scale=0.5, newest=newest)
    form = Form.read(words)
    lossy = dict(WEIGHTS)
    for name, scale in (("conv.weight", 1.0), ("mix.weight", 0.5)):
        half = (WEIGHTS[name].astype(np.float32) * np.float32(scale)).astype(np.float16)
        shape = half.shape if name == "conv.weight" else (64, 64, 1, 1)
        lossy[name] = (decoded(half.reshape(shape), form) / np.float32(scale)).reshape(half.shape)
    requests = Requests({name: array.shape for name, array in lossy.items()})
    arrays = {name: array.astype(np.float32) for name, array in lossy.items()}
    write_package(tmp_path / "b.mlpackage", lower(network(requests, scale=0.5, newest=newest)), Arrays(arrays))
    ours, expected = run(tmp_path / "a.mlpackage"), run(tmp_path / "b.mlpackage")
    # int8 values times a scale are not all fp16 numbers; everything else is the same arithmetic.
    assert np.abs(ours - expected).max() <= (2e-3 if words == "int8" else 0) * np.abs(expected).max()
    assert set(lowered.plan.losses) == {"conv.weight", "mix.weight"}  # few.weight is small, and stays
    assert lowered.parameters == sum(array.size for array in WEIGHTS.values())


def constants(path):
    """Constexpr operations as coremltools reads them: consumer order -> (type, value, stored arrays)."""
    spec = ct.utils.load_spec(str(path))
    weights = str(path / "Data/com.apple.CoreML/weights")
    program = load_program(spec, specification_version=spec.specificationVersion, file_weights_dir=weights)
    (function,) = program.functions.values()
    return [
        (op.op_type, op.materialized_val_inference(), {name: var.val for name, var in op.inputs.items()})
        for op in function.operations
        if op.op_type.startswith("constexpr_")
    ]


@pytest.mark.parametrize(("words", "newest"), [*EVERYWHERE, ("6/16", True)])
def test_coremltools_decodes_the_same(tmp_path, words, newest):
    written(tmp_path / "a.mlpackage", words, newest=newest)
    found = constants(tmp_path / "a.mlpackage")
    assert len(found) == 2
    for (_, value, _), name in zip(found, ("conv.weight", "mix.weight"), strict=True):
        ours = decoded(WEIGHTS[name].reshape(value.shape), Form.read(words))
        assert value.dtype == np.float16
        assert np.array_equal(value, ours.astype(np.float16))


@pytest.mark.parametrize(("words", "newest"), EVERYWHERE)
def test_operations_are_written_as_coremltools_writes_them(tmp_path, words, newest):
    written(tmp_path / "plain.mlpackage", None, newest=newest)
    written(tmp_path / "ours.mlpackage", words, newest=newest)
    form = Form.read(words)
    if form.kind == "int8":
        how = OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
        compress = linear_quantize_weights
    else:
        grouped = {"granularity": "per_grouped_channel", "group_size": form.group, "channel_axis": 0}
        how = OpPalettizerConfig(mode="uniform", nbits=form.bits, **(grouped if form.group else {}))
        compress = palettize_weights
    model = ct.models.MLModel(str(tmp_path / "plain.mlpackage"), skip_model_load=True)
    compress(model, OptimizationConfig(global_config=how)).save(str(tmp_path / "theirs.mlpackage"))
    described = [
        [
            (type_, value.shape, {name: (np.asarray(v).dtype, np.shape(v)) for name, v in stored.items()})
            for type_, value, stored in constants(tmp_path / f"{whose}.mlpackage")
        ]
        for whose in ("ours", "theirs")
    ]
    assert described[0] == described[1]


def operations(spec):
    function = spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


def test_a_plain_package_has_the_same_bytes_as_ever(tmp_path):
    written(tmp_path / "a.mlpackage", None)
    spec = ct.utils.load_spec(str(tmp_path / "a.mlpackage"))
    assert not [op for op in operations(spec) if op.type.startswith("constexpr_")]


def test_records_share_and_their_bits_are_counted():
    requests = Requests({name: array.shape for name, array in WEIGHTS.items()})
    plan = lower(network(requests, newest=True), palette=Palette(Form.read("6"))).plan
    encoded = {(r.content.weight.name, r.content.item): r for r in plan.records if isinstance(r.content, Encoded)}
    indices, table = encoded["conv.weight", "indices"], encoded["conv.weight", "table"]
    assert (indices.dtype, indices.shape, indices.nbytes) == ("uint6", (64, 48, 3, 3), 64 * 48 * 9 * 6 // 8)
    assert (table.dtype, table.shape, table.nbytes) == ("float16", (1, 1, 1, 1, 64, 1), 128)
    assert plan.parameters == sum(array.size for array in WEIGHTS.values())
    assert all(record.offset % 64 == 0 for record in plan.records)


@pytest.mark.parametrize("words", ["5", "6/0", "int4", "6/", "", "8/x", "int8/16"])
def test_other_words_are_refused(words):
    with pytest.raises(ConversionError, match="expected 8, 6, 4, int8"):
        Form.read(words)


def test_a_recipe_says_more(tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"form": "4", "other": {"mix.weight": "8", "few.weight": None}}))
    palette = Palette.read(str(recipe))
    assert palette.form_of("conv.weight", (64, 48, 3, 3)) == Form("palette", 4)
    assert palette.form_of("control:mix.weight", (64, 64)) == Form("palette", 8)
    assert palette.form_of("few.weight", (4096, 64)) is None
    assert palette.form_of("norm.weight", (4096,)) is None
    assert str(palette) == "mixed"
    for text in ("[]", "{", '{"form": "5", "other": {}}', '{"form": "4"}', '{"form": "4", "other": {"a": 3}}'):
        recipe.write_text(text)
        with pytest.raises(ConversionError):
            Palette.read(str(recipe))
    with pytest.raises(ConversionError, match="cannot be used as a recipe"):
        Palette.read(str(tmp_path / "nothing.json"))


def test_groups_that_do_not_divide_become_one_table():
    palette = Palette(Form.read("4/16"))
    assert palette.form_of("a", (320, 320)) == Form("palette", 4, 16)
    assert palette.form_of("b", (40, 320)) == Form("palette", 4)
    assert palette.form_of("c", (16, 320)) == Form("palette", 4)


def test_what_does_nothing_is_refused(tiny_checkpoint, tmp_path):
    def convert(words, part="unet"):
        options = ConvertOptions(sizes=((64, 64),), part=part, palette=Palette.read(words))
        convert_checkpoint(tiny_checkpoint, tmp_path / "small", options)

    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"form": "6", "other": {"conv_in.weight": "8", "layers.7.weight": "8"}}))
    with pytest.raises(ConversionError, match=r"that this model does not have \(1, the first is layers.7.weight\)"):
        convert(str(recipe))
    with pytest.raises(ConversionError, match="6/7: no weight has channels that make several whole groups of 7"):
        convert("6/7")
    with pytest.raises(ConversionError, match="is for UNets and control networks, and none is converted"):
        convert("6", part="vae")
    assert not (tmp_path / "small").exists()


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory):
    """The UNet of the tiny checkpoint, plain, and in 4 bits at two sizes."""
    place = tmp_path_factory.mktemp("palettes")
    for name, palette in (("plain", None), ("small", Palette(Form.read("4")))):
        sizes = ((64, 64),) if palette is None else ((64, 64), (64, 128))
        options = ConvertOptions(sizes=sizes, part="unet", palette=palette)
        convert_checkpoint(tiny_checkpoint, place / name, options)
    return place


def test_a_folder_says_what_was_lost(folders):
    part = Manifest.read(folders / "small").parts["unet"]
    told = part.about["palette"]
    assert part.palette == "4"
    assert set(told["weights"]) == {"4"}
    assert 15 < told["worst"]["snr_db"] <= told["snr_db"] < 40
    assert Manifest.read(folders / "small").parts["unet_64x128"].about["palette"] == told
    assert Manifest.read(folders / "plain").parts["unet"].palette is None
    assert "palette" not in Manifest.read(folders / "plain").parts["unet"].about


def test_it_is_smaller_shared_and_its_index_has_its_forms(folders):
    blobs = {
        name: folders / name / "Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin" for name in ("plain", "small")
    }
    assert blobs["small"].stat().st_size < 0.6 * blobs["plain"].stat().st_size  # small weights stay as they are
    other = folders / "small/Unet_64x128.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert other.stat().st_ino == blobs["small"].stat().st_ino
    (plain,), (small, _) = (read_indices(folders / name) for name in ("plain", "small"))
    kept, packed = {place.name for place in small.places}, {weight.name: weight for weight in small.packed}
    assert kept | packed.keys() == {place.name for place in plain.places}
    assert not kept & packed.keys()
    assert plain.packed == ()
    for place in plain.places:
        if place.name in packed:
            assert (packed[place.name].shape, packed[place.name].scale) == (place.shape, place.scale)
            assert str(packed[place.name].form) == "4"


def test_the_small_network_answers_nearly_the_same(folders):
    rng = np.random.default_rng(0)
    engines = [
        open_engine(folders / n / "Unet.mlpackage", EngineOptions(engine="portable")) for n in ("plain", "small")
    ]
    given = {name: rng.standard_normal(spec.shape).astype(np.float32) for name, spec in engines[0].inputs.items()}
    plain, small = (engine.predict(**given)["noise_pred"].copy() for engine in engines)
    signal = 10 * np.log10(np.square(plain).sum() / np.square(plain - small).sum())
    assert 8 < signal < 40  # measured in the test run: 4 bits of random weights


def test_verify_notes_what_palettes_do_to_the_output(folders, tiny_checkpoint, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(folders / "small", folder)
    lost = Manifest.read(folder).parts["unet"].about["palette"]["snr_db"]
    for psnr in (30.0, 31.5):
        needed = note_palettes(folder, [PartReport("unet", psnr, 0.1)], 60.0)
        assert needed == {"unet": pytest.approx(lost - 6)}
        assert Manifest.read(folder).parts["unet"].about["palette"]["output_psnr_db"] == psnr
    assert note_palettes(folder, [PartReport("unet", 30.0, 0.1)], 3.0) == {"unet": 3.0}
    before = (folders / "plain/glassine.json").read_bytes()
    assert note_palettes(folders / "plain", [PartReport("unet", 90.0, 0.1)], 60.0) == {"unet": 60.0}
    assert (folders / "plain/glassine.json").read_bytes() == before
    (report,) = verify_folder(folder, tiny_checkpoint, parts=["unet"])
    assert lost - 6 < report.psnr < 60
