"""Which parts a picture needs, in the order it needs them: known before anything is loaded.

source picture -> encode | prompts -> text | steps -> denoise, and refine | latents -> decode

The same list says what to load while an earlier part works, and what all of it takes in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from glassine.manifest import Manifest
from glassine.runtime.branches import INPAINTING, PIX2PIX
from glassine.runtime.inputs import Inputs
from glassine.runtime.layer_attention import COLLAGE_UNET
from glassine.runtime.request import Request

Stage = Literal["text", "encode", "denoise", "refine", "decode"]
Size = tuple[int, int]
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # in the order in which the UNet reads what they make
TRANSPARENT = "transparent"  # the kind of patched UNet that draws one transparent picture
_STAGES: tuple[tuple[str, Stage], ...] = (  # beginnings of roles
    ("text_encoder", "text"),
    ("vae_encoder", "encode"),
    ("transparent_encoder", "encode"),
    ("vae_decoder", "decode"),
    ("transparent_decoder", "decode"),
)


class Need(NamedTuple):
    """A part that a picture needs; `refines`: the refiner's."""

    role: str
    refines: bool = False

    @property
    def stage(self) -> Stage:
        """The stage in which it is needed."""
        stage = stage_of(self.role)
        return "refine" if self.refines and stage == "denoise" else stage


class Memory(NamedTuple):
    """Bytes of weights that lie in memory at most: with all parts loaded, and with those of one stage at a time."""

    all: int
    low: int


def stage_of(role: str) -> Stage:
    """The stage in which a part is needed; whatever the steps call is of one: UNets, control nets, previews."""
    return next((stage for beginning, stage in _STAGES if role.startswith(beginning)), "denoise")


def needs(
    request: Request,
    inputs: Inputs,
    model: Manifest,
    size: Size,
    *,
    steps: int | None = None,
    refiner: Manifest | None = None,
    refined: int = 0,
) -> tuple[Need, ...]:
    """Return the parts that a picture needs, each once, in the order in which they are needed first.

    What the model lacks is left out: it is missed where it is needed.

    Args:
        size: (width, height) in pixels. steps: that the run makes; None is all of the request's.
        refiner: the model that draws the last `refined` steps; None if no step of the request is its own.
    """
    steps = request.steps if steps is None else steps
    wanted = [Need(role) for role in _roles(request, inputs, model, size, steps, steps - refined)]
    if refiner is not None:
        text, unet = [Need(role, refines=True) for role in TEXT_ENCODERS], Need("unet", refines=True)
        first = next((i for i, need in enumerate(wanted) if need.stage in ("denoise", "decode")), len(wanted))
        wanted[first:first] = text
        last = next((i for i, need in enumerate(wanted) if need.stage == "decode"), len(wanted))
        wanted[last:last] = [unet] if refined else []
    return tuple(dict.fromkeys(need for need in wanted if _has(refiner if need.refines else model, need.role, size)))


def unet_of(inputs: Inputs) -> str:
    """The UNet that draws one opaque picture: a collage's, where words belong to places."""
    return "unet" if inputs.words is None else COLLAGE_UNET


def _has(model: Manifest | None, role: str, size: Size) -> bool:
    return model is not None and model.part(role, size) is not None


def _roles(request: Request, inputs: Inputs, model: Manifest, size: Size, steps: int, own: int) -> Iterator[str]:
    """The roles of the model's own parts, in order; the first `own` of all steps are its own."""
    unet = model.part("unet", size)
    channels = unet.inputs["sample"][0][1] if unet is not None and "sample" in unet.inputs else 0
    kind = request.layers if request.layers else TRANSPARENT
    layered = bool(request.layers) or request.transparent
    patched = model.part(f"{kind}_unet", size) if layered else None
    about = {} if patched is None else patched.about
    if inputs.image is not None or channels in (INPAINTING, PIX2PIX):
        yield "vae_encoder"
    if inputs.image is not None and layered:
        yield "transparent_encoder"
    guided = request.guidance_scale != 1
    if inputs.context is None or (guided and inputs.negative_context is None):
        yield from TEXT_ENCODERS
    if about.get("conditions"):
        yield "vae_encoder"
    if own:
        if about.get("control") is not None:
            yield f"{kind}_control"
        if not layered or request.stop_at > 0:
            yield from _steered(f"{kind}_unet" if layered else unet_of(inputs), inputs, steps, own)
        if layered and request.stop_at < 1:
            yield from _steered("unet", inputs, steps, own)
    if steps or inputs.pixels is None:
        yield "vae_decoder"
        if layered and about.get("decoded"):
            yield "transparent_decoder"


def _steered(role: str, inputs: Inputs, steps: int, own: int) -> Iterator[str]:
    """A UNet, and what steers it: nets, with the UNet that takes what they give; the plain one where none acts."""
    controls = [ready.control for ready in inputs.controls if not ready.idle]
    acting = [(control.net, [control.acts(step, steps) for step in range(own)]) for control in controls]
    steered = [any(at_step) for at_step in zip(*(at_step for _, at_step in acting), strict=True)]
    acts = dict.fromkeys(net for net, at_step in acting if any(at_step))
    nets = [f"{kind}:{net}" for net in acts for kind in ("hint", "control", "adapter")]
    unets = [*nets, f"adapted_{role}", f"controlled_{role}"] if any(steered) else []
    plain = [] if steered and all(steered) else [role]
    yield from (*unets, *plain) if steered and steered[0] else (*plain, *unets)


def memory(needed: Iterable[Need], weights: Mapping[Need, Mapping[object, int]]) -> Memory:
    """Return what a picture's parts take.

    Args:
        weights: of every part, bytes by what identifies them: what two parts have in common counts once.
    """
    stages: dict[Stage, dict[object, int]] = {}
    for need in needed:
        stages.setdefault(need.stage, {}).update(weights[need])
    everything = {key: size for held in stages.values() for key, size in held.items()}
    return Memory(sum(everything.values()), max((sum(held.values()) for held in stages.values()), default=0))
