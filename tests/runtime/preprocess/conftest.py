"""Pictures for the preprocessors: a photograph and a drawing, and sizes nobody asked for."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def photograph():
    """(300, 451, 3) uint8: a cat."""
    from skimage import data

    return np.ascontiguousarray(data.chelsea())


@pytest.fixture(scope="session")
def drawing():
    """(96, 130, 3) uint8: dark strokes and a blue disc on paper."""
    y, x = np.mgrid[:96, :130]
    pixels = np.full((96, 130, 3), 245, np.uint8)
    pixels[(y - 40) ** 2 + (x - 90) ** 2 < 500] = (40, 80, 200)
    pixels[np.abs(y - 0.5 * x - 10) < 1.5] = 15
    pixels[20:23, 10:60] = 60
    return pixels
