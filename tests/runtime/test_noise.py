"""Noise against PyTorch's generators: its scalar code (a Mac's) to the bit, its vectorised code to its own rounding."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from glassine.errors import RequestError
from glassine.runtime.noise import StepNoise, TorchGenerator, randn

torch = pytest.importorskip("torch")

SEEDS = [0, 1, 42, 5489, 2**31, 2**32 - 1, 2**32, 2**32 + 42, 2**53 + 1, 2**64 - 1]
KINDS = ("torch", "philox")
SHAPES = [(1,), (2,), (5,), (15,), (16,), (17,), (31,), (3, 5, 7), (1, 4, 64, 64), (1, 4, 65, 65), (2, 4, 32, 40)]


def torch_generator(seed: int) -> torch.Generator:
    # torch.Generator takes seeds of [2^63, 2^64) as negative ones.
    return torch.Generator().manual_seed(seed if seed < 2**63 else seed - 2**64)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(seed: int, shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape, generator=torch_generator(seed)).numpy()
    drawn = randn(seed, shape)
    assert drawn.dtype == np.float32
    assert drawn.shape == shape
    # measured 2.3e-6 with AVX2, whose angle is rounded twice; 0 below 16 numbers
    assert np.abs(drawn - expected).max() < (4e-6 if drawn.size >= 16 else 1e-12)


def test_the_stream_goes_on_as_torch_does() -> None:
    """Odd counts below 16 leave half a pair for the next call, however many long draws lie between."""
    theirs, ours = torch_generator(7), TorchGenerator(7)
    for count in (3, 5, 16, 1, 20, 4, 100, 7, 7, 16384, 2):
        expected = torch.randn(count, generator=theirs).numpy()
        assert np.abs(ours.randn((count,)) - expected).max() < 4e-6


def test_the_bits_are_those_of_torch_without_vector_code() -> None:
    """PyTorch on ARM has no vectorised normals: what it draws there is what its scalar code draws here."""
    script = (
        "import sys, torch; sys.stdout.buffer.write("
        "torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)).numpy().tobytes())"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    expected = np.frombuffer(result.stdout, dtype=np.float32)
    drawn = randn(0, (1 << 18,))
    steps = np.abs(drawn.view(np.int32) - expected.view(np.int32))
    # The rest is the C library's float32 logarithm and sine, which are not rounded correctly everywhere.
    assert (steps == 0).mean() > 0.97  # measured 0.985 with glibc
    assert steps.max() <= 4  # measured 3 units in the last place


def test_golden_values() -> None:
    """Known from diffusers and A1111, and independent of the torch installed here."""
    for seed, kind, values in (
        (0, "torch", [-1.1258398, -1.1523602, -0.2505786, -0.4338788]),
        (42, "torch", [1.9269153, 1.4872841, 0.9007172, -2.1055210]),
        (0, "philox", [-0.92466259, -0.42534415, -2.6438457, 0.14518388]),
    ):
        assert np.allclose(randn(seed, (1, 4, 64, 64), kind).ravel()[:4], values, rtol=0, atol=1e-6)
    # And to the bit, on every machine.
    checksum = {kind: int(randn(3, (1, 4, 65, 65), kind).view(np.uint32).astype(np.uint64).sum()) for kind in KINDS}
    assert checksum == {"torch": 35974982194387, "philox": 36046715918699}


def philox_word(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in whole numbers, as Salmon et al. define it."""
    key = [seed & 0xFFFFFFFF, seed >> 32]
    words = list(counter)
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            second >> 32 ^ words[1] ^ key[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ words[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return tuple(words)


def test_philox_is_philox() -> None:
    # The published test vectors of Random123.
    assert philox_word(0, (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox_word(2**64 - 1, (ones,) * 4) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    for seed in SEEDS:
        noise = StepNoise(seed, "philox", skip=0)
        for call in (0, 1, 5):
            drawn = noise(call, (2, 3, 5, 7)).ravel()
            for index in (0, 1, 209):
                first, second, *_ = philox_word(seed, (call, 0, index, 0))
                u, v = (first + 0.5) / 2**32, 2 * np.pi * (second + 0.5) / 2**32
                expected = np.sqrt(-2 * np.log(u)) * np.sin(v)
                assert drawn[index] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_normal(kind: str) -> None:
    z = randn(11, (1 << 18,), kind).astype(np.float64)
    # Standard errors over 2^18 numbers: 0.002, 0.0028, 0.0048, 0.0096.
    assert abs(z.mean()) < 0.01
    assert abs(z.var() - 1) < 0.014
    assert abs((z**3).mean()) < 0.04
    assert abs((z**4).mean() - 3) < 0.1
    assert abs((z[:-1] * z[1:]).mean()) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_step_noise_is_a_function_of_seed_and_index(kind: str) -> None:
    shape = (1, 4, 9, 8)
    noise = StepNoise(3, kind)
    forwards = [noise(index, shape) for index in range(6)]
    assert len({array.tobytes() for array in forwards}) == 6
    for index in (5, 0, 3, 3, 4):
        assert np.array_equal(noise(index, shape), forwards[index])
    assert np.array_equal(StepNoise(3, kind)(4, shape), forwards[4])
    assert not np.array_equal(StepNoise(4, kind)(4, shape), forwards[4])
    # It begins behind the starting noise, which is draw number 0 of the same stream.
    assert np.array_equal(StepNoise(3, kind, skip=0)(0, shape), randn(3, shape, kind))
    assert np.array_equal(StepNoise(3, kind, skip=0)(1, shape), forwards[0])


def test_step_noise_is_what_diffusers_draws() -> None:
    """Its ancestral samplers take the starting noise and then one tensor a step from one generator."""
    shape, generator, noise = (1, 4, 33, 32), torch_generator(12), StepNoise(12)
    torch.randn(shape, generator=generator)
    for index in range(4):
        expected = torch.randn(shape, generator=generator).numpy()
        assert np.abs(noise(index, shape) - expected).max() < 4e-6


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_a_picture(kind: str) -> None:
    batch = StepNoise([5, 6, 7], kind)
    for index in (2, 0):
        rows = batch(index, (3, 4, 8, 8))
        for row, seed in enumerate((5, 6, 7)):
            assert np.array_equal(rows[row : row + 1], StepNoise(seed, kind)(index, (1, 4, 8, 8)))
    with pytest.raises(RequestError, match="3 seeds for 2 pictures"):
        batch(0, (2, 4, 8, 8))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", None, True])
def test_seeds_out_of_range(seed: object) -> None:
    with pytest.raises(RequestError, match=r"expected a whole number from 0 to 18446744073709551615"):
        randn(seed, (4,))  # type: ignore[arg-type]


def test_unknown_kind() -> None:
    with pytest.raises(RequestError, match='noise "cuda" is not known; expected one of torch, philox'):
        randn(0, (4,), "cuda")  # type: ignore[arg-type]
