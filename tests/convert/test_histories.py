"""Any history of a model folder: whatever was put in and taken out, it holds what it says, and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from glassine.convert.addition import add_networks
from glassine.convert.collage import collage_networks
from glassine.convert.control import Control, control_networks
from glassine.convert.extras import Extras
from glassine.convert.folder import ConvertOptions, convert_checkpoint
from glassine.convert.forms import drop_forms, form_of, keep_form
from glassine.convert.index import SUFFIX, read_indices
from glassine.convert.lora import LoraFile
from glassine.convert.swap import add_loras, remove_loras
from glassine.convert.transparency import TransparentFile, transparent_networks
from glassine.errors import PackageError
from glassine.manifest import FILE_NAME, TUNED, WEIGHT_FILE, Manifest

TINY = Path(__file__).parents[2] / "models" / "tiny"
CHECKPOINT = TINY / "tiny.safetensors"
LAYOUTS = {
    "one": {"sizes": ((64, 64),)},
    "einsum": {"sizes": ((64, 64),), "attention": "einsum", "batch": 1},
    "sizes": {"sizes": ((64, 64), (96, 64))},
    "functions": {"sizes": ((64, 64), (96, 64)), "functions": True},
    "chunks": {"sizes": ((64, 64),), "chunks": 2},
}
STRENGTHS = st.sampled_from([-0.5, 0.25, 1.0])


def silent(_: object) -> None:
    pass


@pytest.fixture(scope="module")
def loras(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """The trained one, and one that changes other layers of the UNet, and the text encoder."""
    rng = np.random.default_rng(5)
    block, text = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0", "lora_te_text_model_encoder_layers_0"
    drawn = {
        f"{block}_attn1_to_q.lora_down.weight": (4, 64),
        f"{block}_attn1_to_q.lora_up.weight": (64, 4),
        f"{block}_attn2_to_k.diff": (64, 64),
        "lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": (32, 2, 1, 1),
        f"{text}_mlp_fc1.lora_down.weight": (4, 64),
        f"{text}_mlp_fc1.lora_up.weight": (256, 4),
    }
    tensors = {key: (0.1 * rng.standard_normal(shape)).astype(np.float32) for key, shape in drawn.items()}
    path = tmp_path_factory.mktemp("loras") / "drawn.safetensors"
    return {"drawn": checkpoints.write_safetensors(path, tensors), "tiny_lcm_lora": TINY / "tiny_lcm_lora.safetensors"}


Stored = dict[tuple[str, str, str, float], np.ndarray]


def weights(folder: Path) -> Stored:
    """(package, owner, name, scale) -> what lies where the package's index says, without the scale."""
    found = {}
    for index in read_indices(folder):
        blob = (folder / index.package / WEIGHT_FILE).read_bytes()
        for place in index.places:
            count = place.nbytes // np.dtype(place.dtype).itemsize
            stored = np.frombuffer(blob, place.dtype, count, place.offset).astype(np.float32)
            found[index.package, place.owner, place.name, place.scale] = stored / np.float32(place.scale)
    return found


def by_name(folder: Path) -> dict[str, np.ndarray]:
    """A weight as one of the forms holds it; the first, whose scale is 1 where there is one with that."""
    return {name: stored for (*_, name, _), stored in sorted(weights(folder).items(), key=lambda item: item[0][3])}


def packages(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.glob("*.mlpackage/**/*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Folder(RuleBasedStateMachine):
    """A converted model, and what its owner does to it."""

    def __init__(self, loras: dict[str, Path], models: Path) -> None:
        super().__init__()
        self.files, self.models = loras, models
        self.place = Path(tempfile.mkdtemp(dir=models))
        self.model = self.place / "model"
        self.merged: dict[str, float] = {}

    def teardown(self) -> None:
        if self.model.exists():
            self.take_all_out()
        shutil.rmtree(self.place)

    @initialize(layout=st.sampled_from(sorted(LAYOUTS)))
    def convert(self, layout: str) -> None:
        self.layout = layout
        shutil.copytree(self.fresh(layout, {}), self.model, copy_function=os.link)
        self.remember()

    def fresh(self, layout: str, merged: dict[str, float]) -> Path:
        """The checkpoint converted with these LoRAs; made once."""
        name = "_".join((layout, *(f"{lora}{strength}" for lora, strength in merged.items())))
        if not (self.models / name).exists():
            extras = Extras(loras=tuple(LoraFile(self.files[lora], strength) for lora, strength in merged.items()))
            options = ConvertOptions(tokenizer=TINY, extras=extras, **LAYOUTS[layout])
            convert_checkpoint(CHECKPOINT, self.models / name, options)
        return self.models / name

    @rule(lora=st.sampled_from(["drawn", "tiny_lcm_lora"]), strength=STRENGTHS)
    def add_lora(self, lora: str, strength: float) -> None:
        add_loras(self.model, [LoraFile(self.files[lora], strength)])
        self.merged[lora] = strength

    @precondition(lambda self: self.merged)
    @rule(data=st.data())
    def remove_lora(self, data: st.DataObject) -> None:
        lora = data.draw(st.sampled_from(sorted(self.merged)))
        remove_loras(self.model, [lora])
        del self.merged[lora]

    @rule(name=st.sampled_from(["canny", "edges"]))
    def add_control(self, name: str) -> None:
        control = Control(TINY / "tiny_control_canny.safetensors", name)
        self.add(partial(control_networks, [control]), f"control:{name}")

    @rule(what=st.sampled_from(["attn", "decoder", "encoder"]))
    def add_transparency(self, what: str) -> None:
        file = TransparentFile(path=TINY / f"tiny_transparent_{what}.safetensors")
        self.add(partial(transparent_networks, [file]), f"transparent_{'unet' if what == 'attn' else what}")

    @rule(layers=st.sampled_from([1, 2]))
    def add_collage(self, layers: int) -> None:
        self.add(partial(collage_networks, layers), "collage_unet")

    def add(self, listed, role: str) -> None:
        there = role in Manifest.read(self.model).parts
        refused = "take them out first" if self.merged else "overwrite" if there else None
        expected = pytest.raises(PackageError, match=refused) if refused else contextlib.nullcontext()
        with expected:
            add_networks(self.model, [listed], silent)
            assert role in Manifest.read(self.model).parts
        self.remember()

    @precondition(lambda self: not self.merged)
    @rule(attention=st.sampled_from(["split", "einsum", "sdpa"]), rows=st.sampled_from([1, 2]))
    def tune(self, attention: str, rows: int) -> None:
        manifest = Manifest.read(self.model)
        own = form_of(manifest.parts["unet"], manifest.tokens)
        layout = "channels_first" if attention == "split" else "channels_last"
        form = type(own)(rows=rows, tokens=own.tokens, attention=attention, layout=layout)
        if form != own:
            other = self.layout == "chunks" and attention != "split"  # its weights are asked for in another order
            refused = (
                pytest.raises(PackageError, match="hold their weights in the order")
                if other
                else contextlib.nullcontext()
            )
            with refused:
                keep_form(self.model, manifest.sizes[0], "unet", form, silent)
            self.remember()

    @precondition(lambda self: f"{TUNED}unet" in Manifest.read(self.model).parts)
    @rule()
    def drop(self) -> None:
        drop_forms(self.model, Manifest.read(self.model).sizes[0])
        self.remember()

    def remember(self) -> None:
        """What taking all LoRAs out has to bring back: what the checkpoint holds, and what patches have changed."""
        if self.merged:
            return
        self.plain, self.bare = packages(self.model), weights(self.model)
        self.converted = weights(self.fresh(self.layout, {}))
        for key, stored in self.converted.items():
            np.testing.assert_array_equal(self.bare[key], stored, err_msg=str(key))

    @precondition(lambda self: self.merged)
    @rule()
    def take_all_out(self) -> None:
        remove_loras(self.model, list(self.merged))
        self.merged = {}
        assert packages(self.model) == self.plain

    @invariant()
    def it_holds_what_it_says(self) -> None:
        if not self.model.exists():
            return
        manifest = Manifest.read(self.model)
        assert {lora.name: lora.unet for lora in manifest.loras} == self.merged
        fresh, plain = (by_name(self.fresh(self.layout, merged)) for merged in (self.merged, {}))
        scaled = {key[2:] for key in self.converted}
        found = weights(self.model)
        assert found.keys() == self.bare.keys()
        for key, stored in found.items():
            (_, _, name, scale), bare = key, self.bare[key]
            after, before = (fresh[name], plain[name]) if name in plain else (np.float32(0), np.float32(0))
            # Steps of fp16: at conversion a scale and a LoRA are rounded once, in a folder one after the other.
            largest = np.max(np.abs(np.broadcast_arrays(bare, stored, after, before)), axis=0)
            step = np.spacing((np.float32(scale) * largest).astype(np.float16)).astype(np.float32) / np.float32(scale)
            apart = np.abs(stored - bare - (after - before)) / step
            assert apart.max() <= (2 if (name, scale) in scaled else 4), (
                key
            )  # measured 1.0, and 2.2 where this form scales otherwise

    @invariant()
    def nothing_else_is_there(self) -> None:
        if not self.model.exists():
            return
        manifest = Manifest.read(self.model)
        files = {file for part in manifest.parts.values() for file in part.about.get("chunks", [part.file])}
        indices = {f"{Path(index.package).stem}{SUFFIX}" for index in read_indices(self.model)}
        beside = {FILE_NAME, "vocab.json", "merges.txt", "loras", ".glassine"}
        assert files <= {path.name for path in self.model.iterdir()} <= files | indices | beside
        assert {path.stem for path in (self.model / "loras").glob("*")} >= set(self.merged)


@pytest.mark.parametrize("histories", [3, pytest.param(150, marks=pytest.mark.slow)])
def test_any_history(histories, loras, tmp_path):
    tried = settings(
        max_examples=histories,
        stateful_step_count=8,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # a history takes seconds, and making it shorter many of them
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(partial(Folder, loras, tmp_path), settings=tried)
