"""Source picture -> latents: the way into the space where drawing happens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glassine.errors import EngineError
from glassine.runtime.engine.contract import Predict

Float = NDArray[np.float32]


def encode_image(predict: Predict, image: Float, *, latent_scale: float, noise: Float | None = None) -> Float:
    """Return the latents z of a picture: the posterior's mean, or a sample of it, times `latent_scale`.

    Args:
        predict: the VAE encoder: x (1, 3, H, W) -> latent (1, 8, h, w), the moments: 4 means, 4 log-variances.
        image: (1, 3, H, W) float32 in [-1, 1].
        latent_scale: 0.18215 for SD1 and SD2, 0.13025 for SDXL.
        noise: (1, 4, h, w) unit normal. None takes the mean: of all latents the one that decodes closest to the source.

    Returns:
        (1, 4, h, w) float32.

    Raises:
        EngineError: the encoder's answer lacks the moments, or holds NaN or infinity.

    Source: Kingma and Welling 2013 (arXiv 1312.6114); log-variances are clipped to -30..20 as in LDM.
    """
    moments = predict(x=image).get("latent")
    if moments is None or moments.ndim != 4 or moments.shape[1] % 2:
        got = "nothing" if moments is None else moments.shape
        raise EngineError(f'VAE encoder: output "latent" is {got}, expected (1, 8, h, w): means and log-variances')
    if not np.isfinite(moments.astype(np.float32)).all():
        raise EngineError("VAE encoder: the latents hold NaN or infinity; run it in fp32")
    z, logvar = np.split(moments.astype(np.float32), 2, axis=1)
    if noise is not None:
        z = z + np.exp(0.5 * np.clip(logvar, -30, 20)) * noise
    return np.asarray(z * latent_scale, np.float32)
