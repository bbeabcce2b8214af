"""A collage and a request -> the inputs of an ordinary picture: source, change map, control map, and placed words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glassine.errors import PackageError, RequestError
from glassine.runtime.collage import Arranged, Collage, Layer, arrange
from glassine.runtime.collage_project import recorded
from glassine.runtime.image import to_model
from glassine.runtime.inputs import Inputs
from glassine.runtime.layer_attention import COLLAGE_UNET, PlacedWords, most_layers
from glassine.runtime.request import Request
from glassine.runtime.token_spans import PromptTokens

if TYPE_CHECKING:
    from glassine.runtime.pipeline import Pipeline


def collage_inputs(pipe: Pipeline, collage: Collage, request: Request) -> Inputs:
    """Return what a picture of a collage is drawn from.

    Raises:
        RequestError: as `arrange`; words that are not in the prompt, or there several times; too many of them.
        PackageError: the model has no UNet for collages, and a layer has words.
    """
    if request.transparent or request.layers:
        raise RequestError("a collage is one opaque picture; leave transparency out")
    arranged = arrange(collage, *pipe.size)
    words = place_words(pipe, arranged, request)
    return Inputs(
        image=to_model(arranged.pixels),
        pixels=arranged.pixels,
        change_map=arranged.change,
        control_map=arranged.control,
        words=words,
        collage=recorded(collage),
        notices=arranged.notices,
    )


def place_words(pipe: Pipeline, arranged: Arranged, request: Request) -> PlacedWords | None:
    """Return which tokens belong to which layers; None where no layer has words that count.

    Raises:
        As `collage_inputs`.
    """
    columns = columns_of(PromptTokens.of(pipe.tokenizer, request.prompt, pipe.manifest.tokens), arranged.layers)
    said = arranged.strengths
    counting = [i for i, own in enumerate(columns) if own and (said[i].attract > 0 or said[i].repel > 0)]
    if not counting:
        return None
    part = pipe.manifest.part(COLLAGE_UNET, pipe.size)
    width, height = pipe.size
    if part is None:
        raise PackageError(
            f"{pipe.folder}: this model has no {COLLAGE_UNET} for {width}x{height}, which draws words where their "
            f"layers are; add it with: glassine convert --base {pipe.folder} --collage (or draw without: attract and "
            "repel 0)"
        )
    if len(counting) > most_layers(part.inputs):
        raise RequestError(
            f"{len(counting)} layers have words, this model's {COLLAGE_UNET} takes {most_layers(part.inputs)}; convert "
            f"it again: glassine convert --base {pipe.folder} --collage {len(counting)} --overwrite"
        )
    return PlacedWords(
        visible=arranged.visible[counting],
        columns=tuple(columns[i] for i in counting),
        attract=tuple(said[i].attract for i in counting),
        repel=tuple(said[i].repel for i in counting),
    )


def columns_of(tokens: PromptTokens, layers: Sequence[Layer]) -> list[tuple[int, ...]]:
    """Return the columns of the context that are each layer's own; none of a layer without words.

    Raises:
        RequestError: words that are not in the prompt, or there several times; names the layer.
    """
    columns: list[tuple[int, ...]] = []
    for layer in layers:
        try:
            columns.append(tokens.find(layer.words, layer.occurrence) if layer.words else ())
        except RequestError as error:
            raise RequestError(f"{layer.name}: {error}") from None
    return columns
