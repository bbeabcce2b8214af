"""Which parts of a folder a LayerDiffuse file made, and what should come out of them: for `convert/verify.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glassine.convert.addition import base_of
from glassine.convert.digest import digests
from glassine.convert.network import Network
from glassine.convert.transparency import KINDS, TransparentFile, transparent_networks
from glassine.manifest import Manifest, Part


def layer_networks(folder: Path, manifest: Manifest, source: Path) -> dict[str, Network]:
    """The networks that `source` is, by the keys of the parts that it made, for every size.

    Raises:
        CheckpointError, ConversionError: it cannot be read, or does not fit the folder's model.
        PackageError: the UNet's weights, which a patch needs, cannot be read back.
    """
    with digests([(source,)]) as digest:
        sha256 = digest()[(source,)]
    made = {key: part for key, part in manifest.parts.items() if sha256 in (part.source_sha256, _patch(part))}
    if not made:
        return {}
    part = next((part for part in made.values() if _patch(part)), next(iter(made.values())))
    said = part.about.get("kind", part.role.removeprefix("transparent_"))
    kind = next((kind for kind in KINDS if kind == said), None)
    file = TransparentFile(path=source, kind=kind, strength=float(part.about.get("strength", 1.0)))
    networks = {network.key: network for network in transparent_networks([file], base_of(folder, manifest))}
    # One that takes control has the weights of the one that does not.
    return {key: networks[re.sub(r"_\d+x\d+$", "", key).removeprefix("controlled_")] for key in made}


def _patch(part: Part) -> str:
    return str(part.about.get("patch_sha256", ""))


def layer_outputs(network: Network, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a network gives for these inputs (tensors), in float32 on its source's weights."""
    from glassine.convert import reference, reference_layers

    if network.role == "transparent_decoder":
        pixel, latent = inputs["pixel"], inputs["latent"]
        return {"argb": reference_layers.transparent_decoder(network.config, network.weights, pixel, latent)}
    if network.role == "transparent_encoder":
        return {"offset": reference_layers.transparent_encoder(network.weights, inputs["argb"])}
    if network.role.endswith("_control"):
        return reference_layers.frame_control(network.config, network.weights, inputs["image"])
    return {"noise_pred": reference.unet(network.config, network.weights, inputs)}
