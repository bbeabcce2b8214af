"""Control at work, against sums written out: which rows a net is called for, what its residuals count, what stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glassine.errors import EngineError, RequestError
from glassine.runtime.control import Control, ReadyControl, at_size, mode_weights
from glassine.runtime.control_nets import ControlNets, Hinter, Net
from glassine.runtime.denoiser import NetworkCall, Row

SIDE = 16  # latent cells; pixels are eight times as many
SHAPES = ((3, SIDE, SIDE), (3, SIDE // 2, SIDE // 2), (5, SIDE // 2, SIDE // 2))
RESIDUALS = {f"additional_residual_{j}": shape for j, shape in enumerate(SHAPES)}
FEATURES = {"adapter_residual_0": SHAPES[0], "adapter_residual_1": SHAPES[2]}
RNG = np.random.default_rng(7)
HINT = RNG.random((1, 3, 8 * SIDE, 8 * SIDE)).astype(np.float32)
SAMPLE = RNG.standard_normal((8, 9, SIDE, SIDE)).astype(np.float32)
CONTEXT = RNG.standard_normal((8, 6, 1, 7)).astype(np.float32)


def unet_inputs(rows: int, **further: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    base = {"sample": (rows, 4, SIDE, SIDE), "timestep": (rows,), "encoder_hidden_states": (rows, 6, 1, 7)}
    return {**base, **{name: (rows, *shape) for name, shape in {**RESIDUALS, **further}.items()}}


def answer(j: int, shape: tuple[int, ...], sample: np.ndarray, context: np.ndarray, hint: np.ndarray) -> np.ndarray:
    """One row's residual: another number for every row, residual and hint, another one in every cell."""
    seed = sample.mean() + 3 * context.mean() + 5 * hint.mean() + j
    return np.sin(seed + np.arange(np.prod(shape)).reshape(shape)).astype(np.float32)


class Package:
    """A control network that answers as an engine may: always in the same buffers. Remembers what it was given."""

    def __init__(self, rows: int) -> None:
        self.calls: list[dict[str, np.ndarray]] = []
        self.buffers = {name: np.empty((rows, *shape), np.float32) for name, shape in RESIDUALS.items()}

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        self.calls.append({name: array.copy() for name, array in arrays.items()})
        for j, (name, shape) in enumerate(RESIDUALS.items()):
            for row in range(len(self.buffers[name])):
                given = arrays["sample"][row], arrays["encoder_hidden_states"][row], arrays["controlnet_cond"][row]
                self.buffers[name][row] = answer(j, shape, *given)
        return self.buffers


def net(package: Callable[..., Any], rows: int = 2, name: str = "canny", **about: Any) -> Net:
    inputs = {name: shape for name, shape in unet_inputs(rows).items() if not name.startswith("additional")}
    inputs["controlnet_cond"] = (rows, 3, 8 * SIDE, 8 * SIDE)
    outputs = {name: (rows, *shape) for name, shape in RESIDUALS.items()}
    return Net(name=name, inputs=inputs, outputs=outputs, predict=package, about=about)


def ready(*, hint: np.ndarray = HINT, control_map: np.ndarray | None = None, **settings: Any) -> ReadyControl:
    return ReadyControl(control=Control("canny", **settings), hint=hint, map=control_map)


def network_call(rows: int, wanted: tuple[Row, ...], i: int = 0, channels: int = 4) -> NetworkCall:
    """What a denoiser whose UNet has so many rows is about to ask; what is not wanted is filled up."""
    padded = list(range(len(wanted))) + [len(wanted) - 1] * (rows - len(wanted))
    arrays = {
        "sample": SAMPLE[padded][:, :channels],
        "timestep": np.full(rows, 7, np.float32),
        "encoder_hidden_states": CONTEXT[padded],
    }
    return NetworkCall(i, 1.0, wanted, arrays)


def expected(call: NetworkCall, controls: list[ReadyControl], *, cond_only: bool = False) -> dict[str, np.ndarray]:
    """The sums, one product at a time."""
    sums = {name: np.zeros((len(call.rows), *shape), np.float32) for name, shape in RESIDUALS.items()}
    for one in controls:
        soft = mode_weights(one.control.mode, "controlnet", 3)
        for row, (picture, branch) in enumerate(call.rows):
            if branch != "cond" and (cond_only or one.control.mode in ("control", "guess")):
                continue
            for j, (name, shape) in enumerate(RESIDUALS.items()):
                given = call.inputs["sample"][row, :4], call.inputs["encoder_hidden_states"][row], one.hint[0]
                scale = np.float32(soft[j] * one.control.weight_of(picture))
                where = 1 if one.map is None else at_size(one.map, *shape[1:])
                sums[name][row] += scale * where * answer(j, shape, *given)
    return sums


def assert_sums(found: Any, wanted: dict[str, np.ndarray]) -> None:
    for name, sums in wanted.items():
        assert np.allclose(found[name][: len(sums)], sums, rtol=0, atol=1e-6), name  # measured 2.4e-7


BOTH = (Row(0, "uncond"), Row(0, "cond"))
TWO = (Row(0, "uncond"), Row(0, "cond"), Row(1, "uncond"), Row(1, "cond"))
RAMP = np.tile(np.linspace(0, 1, 8 * SIDE, dtype=np.float32), (8 * SIDE, 1))


@pytest.mark.parametrize("mode", ["balanced", "prompt", "control", "guess"])
@pytest.mark.parametrize("net_rows", [1, 2, 3])
@pytest.mark.parametrize(("unet_rows", "wanted"), [(1, BOTH[:1]), (1, BOTH[1:]), (2, BOTH), (4, TWO), (4, TWO[:3])])
def test_sums_of_two_nets(mode: str, net_rows: int, unet_rows: int, wanted: tuple[Row, ...]) -> None:
    """Whatever the batches: two nets, one of them twice, a map, and weights that differ from picture to picture."""
    first, second = Package(net_rows), Package(2)
    nets = [net(first, net_rows), net(second, 2, "depth")]
    controls = [
        ready(weight=0.7, mode=mode),
        ready(weight=(1.5, 0.25), hint=1 - HINT, control_map=RAMP),
        ready(weight=1.0, hint=HINT / 2),
    ]
    steered = ControlNets(
        list(zip(controls, [nets[0], nets[1], nets[0]], strict=True)), unet_inputs(unet_rows), steps=4
    )
    for i in range(2):
        call = network_call(unet_rows, wanted, i)
        assert_sums(steered(call), expected(call, controls))


def test_the_negative_prompt_is_left_alone_and_not_computed() -> None:
    package = Package(1)
    steered = ControlNets([(ready(mode="control"), net(package, 1))], unet_inputs(2), steps=4)
    call = network_call(2, BOTH)
    found = steered(call)
    assert_sums(found, expected(call, [ready(mode="control")]))
    assert len(package.calls) == 1
    assert np.array_equal(package.calls[0]["encoder_hidden_states"], CONTEXT[1:2])
    assert not any(array[0].any() for array in found.values())


def test_shuffle_steers_the_prompt_alone_in_every_mode() -> None:
    steered = ControlNets([(ready(), net(Package(2), global_pooling=True))], unet_inputs(2), steps=4)
    call = network_call(2, BOTH)
    assert_sums(steered(call), expected(call, [ready()], cond_only=True))


def test_what_one_step_adds_does_not_stay_for_the_next() -> None:
    """Both rows in the first half of the run, the prompt's alone in the second: the other row is 0 again."""
    controls = [ready(stop=0.5, weight=0.5), ready(start=0.5, mode="control", hint=1 - HINT)]
    nets = [net(Package(2)), net(Package(1), 1, "depth")]
    steered = ControlNets(list(zip(controls, nets, strict=True)), unet_inputs(2), first=3, steps=4)
    for i in range(4):
        call = network_call(2, BOTH, 3 + i)
        found = steered(call)
        assert_sums(found, expected(call, [controls[i // 2]]))
        assert not any(found[name][0].any() for name in RESIDUALS) or i < 2


def test_buffers_are_used_again() -> None:
    steered = ControlNets([(ready(weight=0.5), net(Package(2)))], unet_inputs(2), steps=4)
    first = dict(steered(network_call(2, BOTH, 0)))
    second = steered(network_call(2, BOTH, 1))
    assert all(second[name] is array for name, array in first.items())


def test_one_plain_net_is_not_copied_at_all() -> None:
    package = Package(2)
    found = ControlNets([(ready(), net(package))], unet_inputs(2), steps=4)(network_call(2, BOTH))
    assert all(found[name] is array for name, array in package.buffers.items())


@pytest.mark.parametrize(
    "settings",
    [{"weight": 0.0}, {"weight": (0.0, 0.0)}, {"stop": 0.0}, {"start": 1.0}, {"control_map": np.zeros_like(RAMP)}],
)
def test_a_net_without_weight_or_interval_is_never_called(settings: dict[str, Any]) -> None:
    package = Package(2)
    steered = ControlNets([(ready(**settings), net(package))], unet_inputs(2), steps=8)
    assert [dict(steered(network_call(2, BOTH, i))) for i in range(8)] == [{}] * 8
    assert package.calls == []


def test_a_picture_without_weight_is_not_computed() -> None:
    package = Package(1)
    control = ready(weight=(0.0, 1.0))
    steered = ControlNets([(control, net(package, 1))], unet_inputs(4), steps=4)
    call = network_call(4, TWO)
    assert_sums(steered(call), expected(call, [control]))
    assert [given["encoder_hidden_states"][0, 0, 0, 0] for given in package.calls] == list(CONTEXT[2:4, 0, 0, 0])


def residuals(control_map: np.ndarray | None, **settings: Any) -> dict[str, np.ndarray]:
    steered = ControlNets([(ready(control_map=control_map, **settings), net(Package(2)))], unet_inputs(2), steps=4)
    return {name: array.copy() for name, array in steered(network_call(2, BOTH)).items()}


@pytest.mark.parametrize("mode", ["balanced", "prompt"])
def test_a_white_map_is_no_map_and_a_grey_one_a_weight(mode: str) -> None:
    white, none = residuals(np.ones_like(RAMP), mode=mode), residuals(None, mode=mode)
    assert all(np.array_equal(white[name], none[name]) for name in RESIDUALS)
    grey, lighter = residuals(np.full_like(RAMP, 0.3), mode=mode), residuals(None, weight=0.3, mode=mode)
    assert all(np.allclose(grey[name], lighter[name], rtol=1e-6, atol=1e-7) for name in RESIDUALS)


def test_a_map_says_where() -> None:
    left = np.zeros_like(RAMP)
    left[:, : 4 * SIDE] = 1
    found, whole = residuals(left), residuals(None)
    for name, (_, _, width) in RESIDUALS.items():
        assert np.array_equal(found[name][..., : width // 2], whole[name][..., : width // 2])
        assert not found[name][..., width // 2 :].any()


def test_a_map_is_averaged_over_what_a_cell_covers() -> None:
    checks = np.indices((64, 64)).sum(axis=0) % 2
    assert np.allclose(at_size(checks.astype(np.float32), 8, 8), 0.5)
    assert np.allclose(at_size(RAMP, 5, 5), at_size(RAMP, 5, 5)[:1])  # an odd size: 9 cells halve to 5
    assert np.allclose(at_size(RAMP, 5, 5)[0], (np.arange(5) + 0.5) / 5, atol=3e-3)  # measured 1.6e-3


def test_an_adapter_runs_once_for_every_row() -> None:
    shapes = {name: (1, *shape) for name, shape in FEATURES.items()}
    features = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    calls: list[dict[str, np.ndarray]] = []

    def predict(**arrays: np.ndarray) -> dict[str, np.ndarray]:
        calls.append(arrays)
        return features

    adapter = Net(
        name="sketch",
        inputs={"controlnet_cond": (1, 1, 8 * SIDE, 8 * SIDE)},
        outputs=shapes,
        predict=predict,
        about={"kind": "t2i_adapter"},
    )
    controls = [ready(weight=0.5, mode="prompt"), ready(stop=0.5)]
    nets = [adapter, net(Package(2))]
    steered = ControlNets(list(zip(controls, nets, strict=True)), unet_inputs(2, **FEATURES), steps=4)
    for i in range(4):
        call = network_call(2, BOTH, i)
        found = steered(call)
        for soft, (name, feature) in zip((0.25, 0.62), features.items(), strict=True):
            assert np.allclose(found[name], 0.5 * soft * feature, rtol=1e-6, atol=0)
        assert_sums(found, expected(call, [controls[1]] if i < 2 else []))
    assert len(calls) == 1
    luminance = np.tensordot(np.array((0.299, 0.587, 0.114), np.float32), HINT[0], axes=1)
    assert np.allclose(calls[0]["controlnet_cond"][0, 0], luminance, atol=1e-6)


def test_inputs_that_nothing_feeds_are_zero() -> None:
    package = Package(2)
    found = ControlNets([(ready(), net(package))], unet_inputs(2, **FEATURES), steps=4)(network_call(2, BOTH))
    assert set(found) == {*RESIDUALS, *FEATURES}
    assert all(found[name].shape == (2, *shape) and not found[name].any() for name, shape in FEATURES.items())


def test_a_net_reads_the_latents_alone() -> None:
    """An inpainting UNet's sample has nine channels."""
    package = Package(2)
    ControlNets([(ready(), net(package))], unet_inputs(2), steps=4)(network_call(2, BOTH, channels=9))
    assert np.array_equal(package.calls[0]["sample"], SAMPLE[:2, :4])


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"control_type": "tile"}, 2), ({"preprocess": "canny,low=50"}, 1), ({"preprocess": "depth=D.onnx,near=low"}, 3)],
)
def test_a_union_net_is_told_what_it_sees(settings: dict[str, Any], kind: int) -> None:
    package = Package(2)
    plain = net(package, kind="union", control_types=["openpose", "hard_edge", "tile", "depth"])
    union = Net(
        name="union", inputs={**plain.inputs, "control_type": (2, 4)}, outputs=plain.outputs,
        predict=lambda control_type, **arrays: (types.append(control_type), package(**arrays))[1], about=plain.about,
    )  # fmt: skip
    types: list[np.ndarray] = []
    ControlNets([(ready(**settings), union)], unet_inputs(2), steps=4)(network_call(2, BOTH))
    assert np.array_equal(types[0], np.tile(np.eye(4)[kind], (2, 1)))
    with pytest.raises(RequestError, match="say which with type=, one of openpose, hard_edge, tile, depth"):
        ControlNets([(ready(), union)], unet_inputs(2), steps=4)
    with pytest.raises(RequestError, match="is for one kind of hint; leave type= out"):
        ControlNets([(ready(control_type="tile"), net(package))], unet_inputs(2), steps=4)


def test_hints_of_a_union_net_that_count_alike_are_one_call() -> None:
    """Made ready once a picture, added up, and their kinds said together; one with a map of its own is another call."""
    package, made, given = Package(2), [], []
    plain = net(package, kind="union", control_types=["openpose", "hard_edge", "tile", "depth"])
    inputs = {name: shape for name, shape in plain.inputs.items() if name != "controlnet_cond"}
    fused = RNG.standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)

    def ready_hint(**arrays: np.ndarray) -> dict[str, np.ndarray]:
        made.append(arrays)
        return {"fused_hint": fused * float(arrays["control_weight"][0])}

    def predict(fused_hint: np.ndarray, control_type: np.ndarray, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        given.append((fused_hint.copy(), control_type.copy()))
        return package(controlnet_cond=np.zeros(plain.inputs["controlnet_cond"], np.float32), **arrays)

    union = Net(
        name="union", inputs={**inputs, "fused_hint": (2, 3, SIDE, SIDE), "control_type": (2, 4)}, predict=predict,
        outputs=plain.outputs, about=plain.about,
        hinter=Hinter({"controlnet_cond": (1, 3, 8 * SIDE, 8 * SIDE)}, ready_hint),
    )  # fmt: skip
    controls = [
        ready(weight=0.5, control_type="depth"),
        ready(weight=1.5, control_type="tile"),
        ready(weight=0.0, control_type="openpose"),
        ready(control_type="hard_edge", control_map=RAMP),
    ]
    steered = ControlNets([(control, union) for control in controls], unet_inputs(2), steps=4)
    for i in range(2):
        steered(network_call(2, BOTH, i))
    assert [float(arrays["control_weight"][0]) for arrays in made] == [0.5, 1.5, 1.0]
    assert [int(arrays["control_type"].argmax()) for arrays in made] == [3, 2, 1]
    assert len(given) == 4  # two calls a step: the two hints together, and the one with a map
    for (hint, kinds), (factor, named) in zip(given, [(2.0, [0, 0, 1, 1]), (1.0, [0, 1, 0, 0])] * 2, strict=True):
        assert np.allclose(hint, np.repeat(factor * fused, 2, axis=0), rtol=1e-6)
        assert kinds.tolist() == [named, named]


def test_a_net_that_returns_nan_is_named() -> None:
    class Broken(Package):
        def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
            found = super().__call__(**arrays)
            found["additional_residual_1"][0, 0, 0, :2] = np.nan
            return found

    good = (ready(), net(Package(2), name="depth"))
    steered = ControlNets([good, (ready(), net(Broken(2)))], unet_inputs(2), steps=4)
    message = r'step 3 \(sigma 1\): control net "canny" returned 2 of 384 numbers of additional_residual_1 as NaN'
    with pytest.raises(EngineError, match=message):
        steered(network_call(2, BOTH, 2))
    alone = ControlNets([(ready(), net(Broken(2)))], unet_inputs(2), steps=4)  # its outputs themselves
    with pytest.raises(EngineError, match=message):
        alone(network_call(2, BOTH, 2))
    ControlNets([good], unet_inputs(2), steps=4)(network_call(2, BOTH, 2))


def test_nets_that_do_not_fit() -> None:
    def refused(unet: dict[str, tuple[int, ...]], match: str, hint: np.ndarray = HINT) -> None:
        with pytest.raises(RequestError, match=match):
            ControlNets([(ready(hint=hint), net(Package(2)))], unet, steps=4)

    unet = unet_inputs(2)
    fewer = {name: shape for name, shape in unet.items() if name != "additional_residual_2"}
    refused(fewer, r'"canny" returns 3 residuals, this model\'s UNet takes 2 \(it has no input additional_residual_2\)')
    refused(
        {**unet, "encoder_hidden_states": (2, 2048, 1, 7)},
        r"reads encoder_hidden_states of shape \(6, 1, 7\), this model has \(2048, 1, 7\); .* another family",
    )
    refused(
        {**unet, "additional_residual_0": (2, 4, SIDE, SIDE)},
        r"returns additional_residual_0 of shape \(3, 16, 16\), this model's UNet takes \(4, 16, 16\)",
    )
    refused(unet, "wants a hint of 128x128 pixels, this one has 128x64", HINT[:, :, :64])


@pytest.mark.parametrize("steps", [1, 3, 10, 20])
@pytest.mark.parametrize("start", [0.0, 0.1, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("stop", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_intervals(steps: int, start: float, stop: float) -> None:
    """diffusers keeps `1.0 - float(i / n < start or (i + 1) / n > end)`; A1111 start <= i / n <= stop."""
    if start > stop:
        with pytest.raises(RequestError, match="stops before"):
            Control("canny", start=start, stop=stop)
        return
    for i in range(steps):
        theirs = 1.0 - float(i / steps < start or (i + 1) / steps > stop)
        assert Control("canny", start=start, stop=stop).acts(i, steps) == bool(theirs)
        a1111 = Control("canny", start=start, stop=stop, interval="a1111")
        assert a1111.acts(i, steps) == (start <= i / steps <= stop)


def test_soft_weights_are_those_of_sd_webui_controlnet_and_of_diffusers() -> None:
    assert set(mode_weights("balanced", "controlnet", 13)) == {1.0}
    weights = mode_weights("prompt", "controlnet", 13)
    assert weights == mode_weights("control", "controlnet", 13)
    assert (round(weights[0], 4), weights[12]) == (0.0994, 1.0)
    assert np.allclose(weights, mode_weights("guess", "controlnet", 13), atol=1e-3)  # measured 9e-4
    assert mode_weights("guess", "controlnet", 10) == tuple(np.logspace(-1, 0, 10))
    assert round(mode_weights("control", "controlnet", 10)[-1], 4) == 0.5615  # SDXL's middle
    assert mode_weights("prompt", "t2i_adapter", 4) == (0.25, 0.62, 0.825, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 2.5}, r"weight is 2.5, expected 0 \(off\) to 2"),
        ({"weight": (1.0, -1.0)}, "weight is -1.0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"start": -0.1}, "start is -0.1, expected 0 to 1, a share of the steps"),
        ({"stop": 1.5}, "stop is 1.5"),
        ({"mode": "mine"}, "mode is 'mine', expected one of balanced, prompt, control, guess"),
        ({"interval": "mine"}, "interval is 'mine', expected one of diffusers, a1111"),
        ({"fit": "mine"}, "fit is 'mine', expected one of crop, fit, stretch"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Control("canny", **settings)


def test_too_few_weights_for_the_pictures() -> None:
    steered = ControlNets([(ready(weight=(1.0, 1.0)), net(Package(2)))], unet_inputs(2), steps=4)
    with pytest.raises(RequestError, match="2 weights, but a picture 3"):
        steered(network_call(2, (Row(2, "cond"),)))
