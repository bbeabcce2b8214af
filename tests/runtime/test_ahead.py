"""What a picture will need is loaded while the parts before it work: once, in order, and nothing is left behind."""

import random
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from glassine.errors import EngineError, RequestError
from glassine.runtime import pipeline
from glassine.runtime.engine import EngineOptions, Realised
from glassine.runtime.inputs import MapSource, read_inputs
from glassine.runtime.pipeline import Pipeline
from glassine.runtime.plan import Need, memory
from glassine.runtime.request import Request
from glassine.runtime.residency import Residents, Wanted


def threads():
    """The threads that load, once those that have nothing left to do have ended."""
    found = [thread for thread in threading.enumerate() if thread.name.startswith("glassine-ahead")]
    for thread in found:
        thread.join(10)
    return [thread for thread in found if thread.is_alive()]


class Loader:
    """Loads engines that are only names; a load waits until it is let go where `slow` says so."""

    def __init__(self, *slow, refused=()):
        self.slow = {name: threading.Event() for name in slow}
        self.refused = set(refused)
        self.begun = {name: threading.Event() for name in slow}
        self.loaded, self.closed = Counter(), Counter()
        self.by: dict[str, str] = {}
        self.stubborn = False

    def wanted(self, name, stage="denoise"):
        return Wanted(name, stage, (), lambda given_up: self.load(name, given_up))

    def load(self, name, given_up):
        self.by[name] = threading.current_thread().name
        if name in self.slow:
            self.begun[name].set()
            while not self.slow[name].wait(0.01):
                if given_up.is_set() and not self.stubborn:
                    raise EngineError(f"{name}: given up")
        if name in self.refused:
            raise EngineError(f"{name}: refused")
        self.loaded[name] += 1
        return SimpleNamespace(name=name, close=lambda: self.closed.update([name]))


def test_what_is_being_loaded_is_waited_for():
    loader, residents = Loader("unet"), Residents(one_stage=False)
    residents.ahead([loader.wanted("unet")])
    loader.begun["unet"].wait(10)
    threading.Timer(0.05, loader.slow["unet"].set).start()
    assert residents.get(loader.wanted("unet")).name == "unet"
    assert loader.loaded == {"unet": 1}
    assert loader.by["unet"] != threading.current_thread().name
    residents.close()
    assert loader.closed == {"unet": 1}
    assert threads() == []


def test_what_has_not_been_begun_is_loaded_by_the_one_who_needs_it():
    loader, residents = Loader("text"), Residents(one_stage=False)
    residents.ahead([loader.wanted("text"), loader.wanted("unet"), loader.wanted("vae")])
    loader.begun["text"].wait(10)
    assert residents.get(loader.wanted("unet")).name == "unet"
    assert loader.by["unet"] == threading.current_thread().name
    loader.slow["text"].set()
    for name in ("text", "vae"):
        residents.get(loader.wanted(name))
    assert loader.loaded == {"text": 1, "unet": 1, "vae": 1}
    residents.close()


def test_an_error_is_said_where_the_part_is_needed_and_another_try_is_made():
    loader, residents = Loader(refused=["unet", "vae"]), Residents(one_stage=False)
    residents.ahead([loader.wanted(name) for name in ("text", "unet", "vae")])
    assert residents.get(loader.wanted("text")).name == "text"
    with pytest.raises(EngineError, match="unet: refused"):
        residents.get(loader.wanted("unet"))
    loader.refused.clear()
    assert residents.get(loader.wanted("unet")).name == "unet"
    residents.close()  # what nobody asked for says nothing
    assert loader.closed["text"] == loader.closed["unet"] == 1


@pytest.mark.parametrize("gives_up", [True, False])
def test_closing_leaves_no_thread_and_no_engine(gives_up):
    loader, residents = Loader("unet"), Residents(one_stage=False)
    loader.stubborn = not gives_up  # loading that cannot be stopped is waited for, and undone
    residents.ahead([loader.wanted(name) for name in ("text", "unet", "vae")])
    loader.begun["unet"].wait(10)
    if loader.stubborn:
        threading.Timer(0.05, loader.slow["unet"].set).start()
    residents.close()
    assert loader.loaded == loader.closed == ({"text": 1} if gives_up else {"text": 1, "unet": 1})
    assert threads() == []
    # It can be used again, as a pipeline can after `close`.
    loader.slow.clear()
    residents.ahead([loader.wanted("vae")])
    assert residents.get(loader.wanted("vae")).name == "vae"
    residents.close()


def test_with_little_memory_nothing_is_loaded_ahead():
    loader, residents = Loader(), Residents(one_stage=True)
    residents.ahead([loader.wanted("unet")])
    assert threads() == []
    assert not loader.loaded


def test_nothing_is_loaded_twice_whoever_is_quicker():
    names = [f"part {i}" for i in range(60)]
    order = random.Random(0)
    for _ in range(10):
        loader, residents = Loader(), Residents(one_stage=False)
        asked = order.sample(names, len(names))
        for at in range(0, len(names), 20):
            residents.ahead([loader.wanted(name) for name in names[: at + 20]])
            for name in asked[at : at + 20]:
                assert residents.get(loader.wanted(name)).name == name
                time.sleep(order.choice((0, 0, 1e-4)))
        residents.close()
        assert set(loader.loaded) == set(names)
        assert set(loader.loaded.values()) == {1}
        assert loader.closed == loader.loaded


@pytest.fixture
def stubbed(monkeypatch):
    """Packages that load as nothing, and the threads that loaded them by name."""
    by = {}

    def opening(path, options, refused=()):
        by[path.stem] = threading.current_thread() is threading.main_thread()
        return SimpleNamespace(
            realised=Realised(engine="none", device="", precision="", load_seconds=0.0), close=lambda: None
        )

    monkeypatch.setattr(pipeline, "open_engine", opening)
    return by


def picture():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def drawn(folder, monkeypatch, *, ahead):
    monkeypatch.setattr(pipeline, "engine_name", lambda options: "coreml")  # the portable engine is not loaded ahead
    if not ahead:
        monkeypatch.setattr(Pipeline, "load_ahead", lambda self, needed: None)
    with Pipeline.load(folder, EngineOptions(engine="portable"), refiner=folder) as pipe:
        inputs = read_inputs(picture(), MapSource(map="gradient:left-right"), *pipe.size)
        return pipe.run(Request(prompt="a boat", steps=4, seed=7), inputs).finish()


def test_pictures_are_the_same_to_the_byte(tiny_folder, monkeypatch):
    ours, theirs = (drawn(tiny_folder, monkeypatch, ahead=ahead) for ahead in (True, False))
    np.testing.assert_array_equal(ours.latents, theirs.latents)
    np.testing.assert_array_equal(ours.pixels, theirs.pixels)
    assert ours.notices == theirs.notices
    assert threads() == []


def test_what_cannot_be_drawn_loads_nothing(tiny_folder, stubbed):
    with Pipeline.load(tiny_folder, EngineOptions(engine="coreml")) as pipe, pytest.raises(RequestError, match="eta"):
        pipe.run(Request(prompt="a boat", sampler="unipc", eta=0.5))
    assert stubbed == {}


def test_where_it_brings_nothing_nothing_is_loaded_ahead(tiny_folder, stubbed):
    for options in (EngineOptions(engine="portable"), EngineOptions(engine="coreml", low_memory=True)):
        with Pipeline.load(tiny_folder, options) as pipe:
            pipe.load_ahead([Need("unet")])
            assert threads() == []
    with Pipeline.load(tiny_folder, EngineOptions(engine="coreml")) as pipe:
        pipe.load_ahead([Need("unet")])
        pipe.engine("unet")
    assert list(stubbed) == ["Unet"]


def test_memory_counts_what_is_shared_once():
    text, unet, controlled = Need("text_encoder"), Need("unet"), Need("controlled_unet")
    refiner, decoder = Need("unet", refines=True), Need("vae_decoder")
    weights = {text: {"t": 3}, unet: {"u": 10}, controlled: {"u": 10, "c": 1}, refiner: {"r": 9}, decoder: {"d": 2}}
    assert memory(weights, weights) == (25, 11)
    assert memory([text, decoder], weights) == (5, 3)
    assert memory([], weights) == (0, 0)
