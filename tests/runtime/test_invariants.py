"""What must hold for every sampler and every change map, to the last bit where the number is 0; six ways to break it.

The denoisers are analytic; `mixing` lets neighbours see each other, as attention and convolutions do. Some invariants
are functions that return the largest deviation, so that the mutations at the end can be shown to trip them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glassine.runtime import loop
from glassine.runtime.change_map import combine, n_table
from glassine.runtime.denoiser import Conditioning, Denoiser, Guidance
from glassine.runtime.history import Call, Past
from glassine.runtime.loop import denoising_steps
from glassine.runtime.samplers import SAMPLERS, Sampler
from glassine.runtime.schedule import STABLE_DIFFUSION, make_sigmas

STEPS = 20
SHAPE = (1, 4, 8, 12)
SIGMAS = make_sigmas(STABLE_DIFFUSION, STEPS, "karras")
RNG = np.random.default_rng(1)
SOURCE, NOISE = RNG.standard_normal((2, *SHAPE))
RANDOM_MAP = RNG.integers(0, 256, SHAPE[2:]) / 255
RAMP = np.broadcast_to(np.linspace(0, 1, SHAPE[3]), SHAPE[2:])
LATE_MAP = 0.6 * RANDOM_MAP
EVERY = pytest.mark.parametrize("name", SAMPLERS)
MULTISTEP = [name for name, sampler in SAMPLERS.items() if sampler.history]

Model = Callable[[np.ndarray, float, int], np.ndarray]


def mixing(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
    """A curved, circular convolution over space and channels."""
    wide = x + np.roll(x, 1, 2) - 0.5 * np.roll(x, -2, 3) + 0.25 * x[:, ::-1]
    return 0.8 * np.tanh(wide / np.sqrt(1 + sigma**2)) + 0.2 / (1 + sigma**2) * x


def pointwise(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
    return 0.8 * np.tanh(x / np.sqrt(1 + sigma**2)) + 0.2 / (1 + sigma**2) * x


def keyed_noise(index: int, shape: tuple[int, ...]) -> np.ndarray:
    """One noise for every row of the batch: a row's place must not matter."""
    return np.broadcast_to(np.random.default_rng((9, index)).standard_normal(shape[1:]), shape)


def table(change: np.ndarray, sigmas: np.ndarray = SIGMAS) -> np.ndarray:
    return n_table(change, sigmas)


def level(sigma: float) -> np.ndarray:
    return SOURCE + sigma * NOISE


def run(sampler: Sampler, n: np.ndarray | None, model: Model = mixing, **changes: Any) -> list[loop.Step]:
    """The steps of a run; `changes` replace sigmas, noise, source or step_noise."""
    inputs: dict[str, Any] = {"sigmas": SIGMAS, "noise": NOISE, "source": SOURCE, "step_noise": keyed_noise}
    inputs.update(changes)
    return list(denoising_steps(model, sampler, inputs.pop("sigmas"), inputs.pop("noise"), n=n, **inputs))


def draw(sampler: Sampler, n: np.ndarray | None, model: Model = mixing, **changes: Any) -> np.ndarray:
    return run(sampler, n, model, **changes)[-1].x


def image_to_image(sampler: Sampler, start: int = 0, model: Model = mixing) -> np.ndarray:
    """The plain loop, written without ours: every step of a schedule's end, and a history that began with it."""
    x, calls = level(SIGMAS[start]), ()
    for i in range(start, STEPS):
        past = Past(calls)
        x, call = sampler.step(
            lambda x, sigma, i=i: model(x, sigma, i),
            x,
            SIGMAS,
            i,
            past,
            lambda k, i=i: keyed_noise(i * sampler.noises + k, SHAPE),
        )
        calls = (call, *calls)[: sampler.history]
    return x


def deviation(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


# 1 to 15


def test_1_nothing_to_change_is_the_source_without_a_call() -> None:
    def forbidden(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
        raise AssertionError("the model was called")

    n = table(np.zeros(SHAPE[2:]))
    steps = denoising_steps(forbidden, SAMPLERS["euler"], SIGMAS, NOISE, source=SOURCE, n=n)
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert np.array_equal(end.value.value, SOURCE)


@EVERY
def test_2_everything_to_change_is_image_to_image(name: str) -> None:
    sampler = SAMPLERS[name]
    assert np.array_equal(draw(sampler, table(np.ones(SHAPE[2:]))), image_to_image(sampler))
    assert np.array_equal(draw(sampler, None), image_to_image(sampler))


def uniform_against_image_to_image(sampler: Sampler, tables: Callable[[np.ndarray], np.ndarray] = table) -> float:
    """3: an even map of j / S is image to image that starts at step S - j."""
    return max(
        deviation(draw(sampler, tables(np.full(SHAPE[2:], j / STEPS))), image_to_image(sampler, STEPS - j))
        for j in (1, 2, 7, 13, 19)
    )


@EVERY
def test_3_an_even_map_is_image_to_image_of_that_strength(name: str) -> None:
    assert uniform_against_image_to_image(SAMPLERS[name]) == 0


@EVERY
def test_4_a_binary_map_is_blended_latent_inpainting(name: str) -> None:
    """The published loop: step everything, then put the source back at the level reached; clean at the end."""
    sampler, mask = SAMPLERS[name], np.where(RANDOM_MAP > 0.5, 1.0, 0.0)
    keep = mask == 0
    x, calls = level(SIGMAS[0]), ()
    for i in range(STEPS):
        state = x

        def model(x: np.ndarray, sigma: float, i: int = i, state: np.ndarray = state) -> np.ndarray:
            # A second evaluation within the step sees the source around the mask too, at its own level.
            return mixing(x if x is state else np.where(keep, level(sigma), x), sigma, i)

        past = Past(calls)
        x, call = sampler.step(model, x, SIGMAS, i, past, lambda k, i=i: keyed_noise(i * sampler.noises + k, SHAPE))
        x = np.where(keep, level(SIGMAS[i + 1]) if i + 1 < STEPS else SOURCE, x)
        calls = (call, *calls)[: sampler.history]
    assert np.array_equal(draw(sampler, table(mask)), x)


def untouched(sampler: Sampler, n: np.ndarray, change: np.ndarray) -> float:
    """5: cells of change 0 end as the source."""
    keep = np.broadcast_to(change == 0, SHAPE)
    assert keep.any()
    return deviation(draw(sampler, n)[keep], SOURCE[keep])


@EVERY
@pytest.mark.parametrize("spacing", ["karras", "linspace", "leading"])
def test_5_what_is_to_be_kept_is_the_source(name: str, spacing: str) -> None:
    change = np.where(RANDOM_MAP < 0.3, 0.0, RANDOM_MAP)
    for rule in ("scale", "cap", "time"):
        n = n_table(change, make_sigmas(STABLE_DIFFUSION, STEPS, spacing), rule, total=2 * STEPS)
        assert untouched(SAMPLERS[name], n, change) == 0


def late_start(sampler: Sampler, model: Model = mixing) -> float:
    """6: a run that starts late is the run that starts at 0 with everything frozen until then.

    The second row of a batch of two waits for the first, which starts at once.
    """
    n = table(LATE_MAP)
    assert 0 < n.max() < STEPS
    two = np.concatenate([np.full_like(n, STEPS), n])
    both = draw(sampler, two, model, noise=np.repeat(NOISE, 2, 0), source=np.repeat(SOURCE, 2, 0))
    return deviation(both[1:], draw(sampler, n, model))


@EVERY
def test_6_a_late_start_changes_nothing(name: str) -> None:
    assert late_start(SAMPLERS[name]) == 0


@EVERY
@pytest.mark.parametrize("change", [RAMP, LATE_MAP, np.full(SHAPE[2:], 0.35)], ids=["ramp", "late", "even"])
def test_7_calls(name: str, change: np.ndarray) -> None:
    """One call for each of max n steps; a second for two-stage samplers, but not on the step to sigma 0."""
    calls = []

    def counting(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
        calls.append(i)
        return mixing(x, sigma, i)

    n = table(change)
    steps = run(SAMPLERS[name], n, counting)
    longest = int(n.max())
    if name == "pndm":  # its first step is one of Heun, for every cell that begins
        expected = longest + len(set(n.ravel().tolist()) - {0, 1})
    else:
        expected = SAMPLERS[name].evaluations * longest - (SAMPLERS[name].evaluations - 1)
    assert len(calls) == expected
    assert steps[-1].evaluations == expected
    assert len(steps) == longest


def frozen_states(sampler: Sampler, change: np.ndarray) -> float:
    """8: before its release, the state of a cell is the source at the state's own level."""
    n = table(change)
    worst = 0.0
    for step in run(sampler, n):
        frozen = np.broadcast_to(step.i + 1 <= STEPS - n, SHAPE)
        expected = level(SIGMAS[step.i + 1]) if step.i + 1 < STEPS else SOURCE
        if frozen.any():
            worst = max(worst, deviation(step.x[frozen], expected[frozen]))
    return worst


@EVERY
@pytest.mark.parametrize("change", [RANDOM_MAP, RAMP, LATE_MAP], ids=["random", "ramp", "late"])
def test_8_frozen_states_are_the_noised_source(name: str, change: np.ndarray) -> None:
    assert frozen_states(SAMPLERS[name], change) == 0


@pytest.mark.parametrize("rule", ["scale", "cap", "authors", "time"])
@pytest.mark.parametrize("spacing", ["karras", "linspace", "trailing"])
def test_9_frozen_sets_are_nested(rule: str, spacing: str) -> None:
    """More change never means fewer evaluations; so the frozen sets of two maps are nested at every step."""
    tones = np.linspace(0, 1, 1001)[None]
    sigmas = make_sigmas(STABLE_DIFFUSION, STEPS, spacing)
    n = n_table(tones, sigmas, rule, total=30)[0, 0, 0]
    assert np.all(np.diff(n) >= 0)
    assert n[-1] == STEPS
    release = STEPS - n
    sets = [set(np.flatnonzero(i <= release).tolist()) for i in range(STEPS + 1)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(sets))


@EVERY
def test_10_tones_are_quantised_to_steps(name: str) -> None:
    quantised = np.ceil(RANDOM_MAP * STEPS) / STEPS
    assert np.array_equal(draw(SAMPLERS[name], table(RANDOM_MAP)), draw(SAMPLERS[name], table(quantised)))


def gathered(sampler: Sampler) -> float:
    """11: with a pointwise denoiser, a cell's result depends on its own n alone."""
    n = table(RANDOM_MAP)
    uniform = {k: draw(sampler, np.full_like(n, k), pointwise) for k in range(1, STEPS + 1)} | {0: SOURCE}
    expected = np.choose(np.broadcast_to(n, SHAPE), [uniform[k] for k in range(STEPS + 1)])
    return deviation(draw(sampler, n, pointwise), expected)


@EVERY
def test_11_a_cell_depends_on_its_own_n(name: str) -> None:
    assert gathered(SAMPLERS[name]) == 0


@EVERY
def test_12_runs_repeat_and_rows_do_not_matter(name: str) -> None:
    sampler, n = SAMPLERS[name], table(RANDOM_MAP)
    once = draw(sampler, n)
    assert np.array_equal(once, draw(sampler, n))
    # A caller that looks at every preview, and tries to paint on one.
    steps = denoising_steps(mixing, sampler, SIGMAS, NOISE, source=SOURCE, n=n, step_noise=keyed_noise)
    for step in steps:
        assert np.isfinite(step.denoised).all()
        for array in (step.x, step.denoised):
            with pytest.raises(ValueError, match="read-only"):
                array[:] = 0
    assert np.array_equal(once, step.x)
    # Second of three rows that have other maps, sources and noises.
    three = np.concatenate([table(RAMP), n, table(1 - RAMP)])
    source = np.concatenate([SOURCE + 1, SOURCE, -SOURCE])
    noise = np.concatenate([-NOISE, NOISE, NOISE[:, ::-1]])
    assert np.array_equal(once, draw(sampler, three, source=source, noise=noise)[1:2])


@EVERY
def test_13_a_perfect_denoiser_returns_the_source(name: str) -> None:
    result = draw(SAMPLERS[name], table(RANDOM_MAP), lambda x, sigma, i: SOURCE)
    assert deviation(result, SOURCE) < 1e-12  # measured 2e-15 (lms, pndm), 0 elsewhere


@EVERY
def test_14_shifts_carry_over(name: str) -> None:
    def shift(a: np.ndarray) -> np.ndarray:
        return np.roll(a, (3, 5), (-2, -1))

    shifted = draw(
        SAMPLERS[name],
        table(shift(RANDOM_MAP)),
        source=shift(SOURCE),
        noise=shift(NOISE),
        step_noise=lambda index, shape: shift(keyed_noise(index, shape)),
    )
    assert np.array_equal(shifted, shift(draw(SAMPLERS[name], table(RANDOM_MAP))))


def test_15_the_order_of_maps_does_not_matter() -> None:
    maps = [RNG.random(SHAPE[2:]).astype(np.float32) for _ in range(4)]
    assert np.array_equal(combine(maps), combine(maps[::-1]))
    assert np.array_equal(combine(maps), np.max(maps, axis=0))


# 22 to 25


def network(sample: np.ndarray, timestep: np.ndarray, encoder_hidden_states: np.ndarray) -> dict[str, np.ndarray]:
    """A curved network that reads its timestep and its context, row by row."""
    bias = encoder_hidden_states.mean(axis=(1, 2, 3))[:, None, None, None] + timestep[:, None, None, None] / 1000
    return {"noise_pred": np.tanh(sample + np.roll(sample, 1, 3) + bias)}


@EVERY
def test_22_guidance_of_1_is_the_prompt_alone(name: str) -> None:
    cond, uncond = (Conditioning(context=RNG.standard_normal((1, 6, 1, 5)).astype(np.float32)) for _ in range(2))
    noise, source = NOISE.astype(np.float32), SOURCE.astype(np.float32)

    def result(guidance: Guidance) -> np.ndarray:
        model = Denoiser(network, STABLE_DIFFUSION, guidance, rows=2)
        return draw(SAMPLERS[name], table(RANDOM_MAP), model, noise=noise, source=source)

    alone = result(Guidance(cond=cond, scale=1.0))
    assert np.array_equal(alone, result(Guidance(cond=cond, uncond=uncond, scale=1.0)))
    through_formula = result(Guidance(cond=cond, uncond=uncond, scale=1.0 + 1e-9))
    assert deviation(alone, through_formula) < 1e-3 * np.abs(alone).max()
    assert deviation(alone, result(Guidance(cond=cond, uncond=uncond, scale=3.0))) > 0.1


@EVERY
@pytest.mark.parametrize("split", [1, 9, 19])
def test_23_changing_to_the_same_model_changes_nothing(name: str, split: int) -> None:
    def base(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
        return mixing(x, sigma, i)

    def refined(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
        return base(x, sigma, i) if i < split else mixing(x, sigma, i)

    n = table(RANDOM_MAP)
    assert np.array_equal(draw(SAMPLERS[name], n, refined), draw(SAMPLERS[name], n))


def published_loop(keep: np.ndarray) -> np.ndarray:
    """Differential Diffusion as its authors publish it: thresholds i / L over the keep map, the blend before the call,
    the map ignored at i = 0, nothing after the last step; Euler."""
    length = STEPS
    x = level(SIGMAS[0])
    for i in range(length):
        if i > 0:
            x = np.where(keep > i / length, level(SIGMAS[i]), x)
        denoised = mixing(x, SIGMAS[i], i)
        x = denoised + SIGMAS[i + 1] / SIGMAS[i] * (x - denoised)
    return x


@pytest.mark.parametrize(
    "change", [RANDOM_MAP, RAMP, np.zeros(SHAPE[2:]), np.ones(SHAPE[2:])], ids=["random", "ramp", "zero", "one"]
)
def test_24_the_authors_rule_is_the_authors_loop(change: np.ndarray) -> None:
    n = n_table(change, SIGMAS, "authors")
    assert np.array_equal(draw(SAMPLERS["euler"], n), published_loop(1 - change))


@EVERY
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_25_nan_in_live_cells_never_reaches_frozen_ones(name: str, poison: float) -> None:
    n = table(np.where(RANDOM_MAP < 0.3, 0.0, RANDOM_MAP))

    def broken(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
        return np.full_like(x, poison)

    for step in run(SAMPLERS[name], n, broken):
        frozen = np.broadcast_to(step.i + 1 <= STEPS - n, SHAPE)
        expected = level(SIGMAS[step.i + 1]) if step.i + 1 < STEPS else SOURCE
        assert np.array_equal(step.x[frozen], expected[frozen])
    assert not np.isfinite(step.x[np.broadcast_to(n > 0, SHAPE)]).any()


# Mutations: each must be noticed.


def test_mutation_i_a_blend_one_level_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loop._Canvas.select
    monkeypatch.setattr(
        loop._Canvas, "select", lambda self, x, i, sigma: right(self, x, i, float(SIGMAS[min(i + 1, STEPS)]))
    )
    assert frozen_states(SAMPLERS["euler"], RANDOM_MAP) > 0.01
    assert late_start(SAMPLERS["euler"]) > 0.01


def test_mutation_ii_a_noise_redrawn_every_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = np.random.default_rng(3)
    monkeypatch.setattr(
        loop._Canvas, "at", lambda self, sigma: self.source + sigma * fresh.standard_normal(self.source.shape)
    )
    assert frozen_states(SAMPLERS["euler"], RANDOM_MAP) > 0.1
    assert late_start(SAMPLERS["euler"]) > 0.01


def test_mutation_iii_releasing_at_time_0_is_noticed() -> None:
    change = np.where(RANDOM_MAP < 0.3, 0.0, RANDOM_MAP)
    times = np.array([STABLE_DIFFUSION.t_of_sigma(float(sigma)) for sigma in SIGMAS[:-1]])
    times = times.round() / times[0].round()
    n = (change[None] >= times[:, None, None]).sum(axis=0)[None, None]
    assert times[-1] == 0
    assert untouched(SAMPLERS["euler"], n, change) > 1e-3


@pytest.mark.parametrize("name", MULTISTEP)
def test_mutation_iv_a_history_kept_at_release_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(loop._Canvas, "past", lambda self, i, calls: Past(calls))
    assert late_start(SAMPLERS[name]) > 1e-3
    assert gathered(SAMPLERS[name]) > 1e-3


def test_mutation_v_thresholds_of_the_untrimmed_run_are_noticed() -> None:
    """Thresholds i / N over N scheduled steps where strength has left S of them."""

    def untrimmed(change: np.ndarray) -> np.ndarray:
        total = 2 * STEPS
        kept = np.ceil((1 - change) * total) - 1
        return np.clip(STEPS - kept, 1, STEPS).astype(np.int64)[None, None]

    assert uniform_against_image_to_image(SAMPLERS["euler"], untrimmed) > 0.01
    assert uniform_against_image_to_image(SAMPLERS["euler"]) == 0


def scheduled(x: np.ndarray, sigma: float, i: int) -> np.ndarray:
    """A model whose conditioning changes from step to step."""
    return mixing(x, sigma, i) * (1 + 0.1 * i)


def test_mutation_vi_a_model_counting_from_the_late_start_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on the step (prompts, attention bias, control) is indexed in the schedule, not in the run."""
    assert late_start(SAMPLERS["euler"], scheduled) == 0
    right = loop._Turn.denoise

    def counted_from_start(turn: loop._Turn, x: np.ndarray, sigma: float) -> np.ndarray:
        model = turn.model
        turn.model = lambda x, sigma, i: model(x, sigma, i - turn.canvas.first)
        return right(turn, x, sigma)

    monkeypatch.setattr(loop._Turn, "denoise", counted_from_start)
    assert late_start(SAMPLERS["euler"], scheduled) > 1e-3


def test_mutation_vi_noise_counting_from_the_late_start_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert late_start(SAMPLERS["euler_a"]) == 0
    monkeypatch.setattr(
        loop._Turn, "noise", lambda turn, k: keyed_noise(turn.i - turn.canvas.first + k, turn.state.shape)
    )
    assert late_start(SAMPLERS["euler_a"]) > 1e-3


def test_history_is_bounded() -> None:
    """No more calls are kept than the sampler can use."""
    seen = []

    def step(denoise: Any, x: np.ndarray, sigmas: np.ndarray, i: int, past: Past, noise: Any) -> Any:
        seen.append(len(past.calls))
        return x.copy(), Call(float(sigmas[i]), x, x)

    run(Sampler(step=step, history=2), None)
    assert seen == [0, 1] + [2] * (STEPS - 2)
