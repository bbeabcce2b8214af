"""The UNet for collages: the model's own weights, with inputs that say where the words of each layer belong.

It lives beside the plain one, in the same weight.bin: with zeros at those inputs it draws the same. Where control nets
or T2I-Adapters are in the folder too, it comes with inputs for theirs as well.
"""

from __future__ import annotations

from collections.abc import Mapping

from glassine.convert.control import steered_unet
from glassine.convert.network import Base, Network
from glassine.errors import ConversionError
from glassine.models.config import UNetConfig

ROLE = "collage_unet"
LAYERS = 8
MOST = 64


def collage_networks(layers: int, base: Base) -> list[Network]:
    """List the UNet that draws collages of up to `layers` layers with words.

    Raises:
        ConversionError: no layers, or too many.
    """
    if not 1 <= layers <= MOST:
        raise ConversionError(f"collage: {layers} layers, expected 1 to {MOST}")
    return [steered_unet(base, ROLE, "CollageUnet", collage=layers)]


def steered_collages(unets: Mapping[str, UNetConfig], base: Base) -> list[Network]:
    """List the UNets that draw a collage and take control, where there is a UNet for either.

    unets: of a folder, written or to be written, by their keys. What is there already, as it would be, is left out.
    """
    if ROLE not in unets:
        return []
    layers = unets[ROLE].collage
    return [
        steered_unet(
            base,
            f"{how}_{ROLE}",
            f"{how.capitalize()}CollageUnet",
            residuals=True,
            features=unets[f"{how}_unet"].features,
            collage=layers,
        )
        for how in ("controlled", "adapted")
        if f"{how}_unet" in unets
        if f"{how}_{ROLE}" not in unets or unets[f"{how}_{ROLE}"].collage != layers
    ]
