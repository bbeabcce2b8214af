"""Recipes: the choice against a search through all of them, and a whole measurement of a small UNet."""

import itertools
import json

import numpy as np
import pytest

from glassine.convert import recipe
from glassine.convert.checkpoint import open_checkpoint
from glassine.convert.detect import detect
from glassine.convert.package import write_package
from glassine.convert.palettize import Form, Palette
from glassine.convert.program import Requests, lower
from glassine.convert.recipe import Group, Judge, choose, group_of, measure, signal_to_noise, write_recipe
from glassine.errors import ConversionError
from glassine.models.unet import unet
from glassine.runtime.engine import EngineOptions, open_engine

FORMS = [Form("palette", bits) for bits in (4, 6, 8)]


@pytest.fixture
def groups():
    rng = np.random.default_rng(0)
    sizes = rng.integers(10, 80, 5) * 1_000_000
    return [
        Group(f"g{i}", (f"g{i}.a", f"g{i}.b"), float(noise), {**{f: int(n) * f.bits for f in FORMS}, None: int(n) * 16})
        for i, (n, noise) in enumerate(zip(sizes, 10.0 ** rng.uniform(-4, -2, 5), strict=True))
    ]


def everything(groups):
    for forms in itertools.product([*FORMS, None], repeat=len(groups)):
        chosen = {group.name: form for group, form in zip(groups, forms, strict=True)}
        yield sum(g.bits[chosen[g.name]] for g in groups) / 8e6, signal_to_noise(groups, chosen, FORMS[0])


@pytest.mark.parametrize("decibels", [18, 22, 26, 32, 45])
def test_few_bytes_for_a_signal_to_noise(groups, decibels):
    chosen = choose(groups, FORMS, decibels=decibels)
    size = sum(group.bits[chosen[group.name]] for group in groups) / 8e6
    assert signal_to_noise(groups, chosen, FORMS[0]) >= decibels
    least = min(size for size, signal in everything(groups) if signal >= decibels)
    assert size <= 1.1 * least  # the greedy choice; measured at most 1.061


@pytest.mark.parametrize("share", [0.3, 0.4, 0.5, 0.7])
def test_little_noise_within_a_size(groups, share):
    megabytes = share * sum(group.bits[None] for group in groups) / 8e6
    chosen = choose(groups, FORMS, megabytes=megabytes)
    assert sum(group.bits[chosen[group.name]] for group in groups) / 8e6 <= megabytes
    best = max(signal for size, signal in everything(groups) if size <= megabytes)
    assert signal_to_noise(groups, chosen, FORMS[0]) >= best - 0.5  # dB; measured at most 0.02


def test_everything_fits(groups):
    assert set(choose(groups, FORMS, megabytes=1e6).values()) == {None}
    assert set(choose(groups, FORMS, decibels=1).values()) == {FORMS[0]}
    assert set(choose(groups, FORMS, decibels=1e6).values()) == {None}


def test_targets_that_cannot_be(groups):
    with pytest.raises(ConversionError, match=r"1 MB: with 4 bits everywhere the weights take \d+ MB already"):
        choose(groups, FORMS, megabytes=1)
    for both in ({}, {"megabytes": 3, "decibels": 3}):
        with pytest.raises(ConversionError, match="one of the two"):
            choose(groups, FORMS, **both)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight", "down_blocks.1.attentions"),
        ("mid_block.resnets.1.conv1.weight", "mid_block.resnets"),
        ("up_blocks.2.upsamplers.0.conv.weight", "up_blocks.2.upsamplers"),
        ("time_embedding.linear_1.weight", "time_embedding"),
    ],
)
def test_layers_of_one_kind_in_one_block_go_together(name, group):
    assert group_of(name) == group


def test_a_recipe_is_read_back(groups, tmp_path):
    chosen = choose(groups, FORMS, decibels=25)
    palette = recipe.recipe(groups, chosen)
    write_recipe(tmp_path / "recipe.json", palette, {"measured_db": 25.1})
    assert Palette.read(str(tmp_path / "recipe.json")) == palette
    assert json.loads((tmp_path / "recipe.json").read_text())["measured"] == {"measured_db": 25.1}
    assert palette.form_of("unknown.weight", (640, 640)) is None


@pytest.mark.slow
def test_the_noise_of_a_unet_adds_up(tiny_checkpoint, tmp_path):
    """The smallest network here: groups alone, then all of them, in 4 bits."""
    detected = detect(open_checkpoint(tiny_checkpoint))

    engines = {}

    def run(package, changed):
        if package not in engines:
            engines[package] = open_engine(package, EngineOptions(engine="portable"))
        engine = engines[package]
        engine.reread(changed)
        rng = np.random.default_rng(0)
        given = {name: rng.standard_normal(spec.shape).astype(np.float32) for name, spec in engine.inputs.items()}
        return np.array(engine.predict(**given)["noise_pred"])

    judge = Judge(detected.family.unet, detected.parts["unet"], tmp_path, run)
    assert judge.noise(Palette(None)) == 0
    groups = measure(judge, FORMS[:1], lambda *_: None)
    assert len(groups) > 5
    assert all(group.noise > 0 for group in groups)
    together = judge.noise(Palette(FORMS[0]))
    assert 0.3 < together / sum(group.noise for group in groups) < 2.0  # measured in the test run
    finer = judge.noise(Palette(Form("palette", 6)))
    assert 6 < 10 * np.log10(together / finer) < 18  # 12 dB for two bits

    # What stands in the weight file is what a package in this form computes with, and it can be taken back.
    mixed = Palette(None, dict.fromkeys(groups[0].weights, FORMS[0]) | dict.fromkeys(groups[-1].weights, FORMS[1]))
    noise = judge.noise(mixed)
    requests = Requests(detected.parts["unet"].shapes)
    program = unet(detected.family.unet, requests, height=8, width=8, batch=1, attention="einsum",
                   layout="channels_last")  # fmt: skip
    write_package(tmp_path / "a.mlpackage", lower(program, palette=mixed), detected.parts["unet"])
    error = run(tmp_path / "a.mlpackage", ()) - judge.plain
    assert noise == np.square(error, dtype=np.float64).mean() / np.square(judge.plain, dtype=np.float64).mean() > 0
    assert judge.noise(Palette(None)) == 0


def test_forms_in_another_order_are_refused(tmp_path):
    judge = Judge.__new__(Judge)
    for forms in ([FORMS[1], FORMS[0]], [Form("int8", 8)], [Form("palette", 4, 16)]):
        with pytest.raises(ConversionError, match="expected some of 4, 6, 8, the fewest bits first"):
            measure(judge, forms, lambda *_: None)
