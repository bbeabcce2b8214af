"""The stages on top of the base family: ControlNet, LCM-LoRA, and LayerDiffuse's two halves."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from glassine.models.tiny.train import networks
from glassine.models.tiny.train.base import Prompts, encode, grey, noised, snr_weighted
from glassine.models.tiny.train.drawings import Drawings, edges, render, sample
from glassine.models.tiny.train.fit import Plan, compute_dtype, fit
from glassine.models.tiny.train.networks import LATENT_SCALE, AlphaDecoder, LoRA, OffsetEncoder
from glassine.models.tiny.train.sampling import Schedule, ddim, guided, lcm_timesteps

Base = tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSPARENT_RANK = 6
LCM_LAYERS = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
LCM_RANK = 6
TEACHER_GUIDANCE, TEACHER_STEPS, TEACHER_BATCHES = 5.0, 25, 32


def with_control(
    unet: UNet2DConditionModel, control: ControlNetModel, x: Tensor, t: Tensor, context: Tensor, hint: Tensor
) -> Tensor:
    """Return eps of the UNet with the ControlNet's residuals added."""
    down, middle = control(x, t, context, hint, return_dict=False)
    return unet(x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample


def train_control(
    plan: Plan,
    rows: int,
    size: int,
    base: Base,
    device: torch.device,
) -> ControlNetModel:
    """Train the ControlNet on Canny edges of the drawings; the UNet is frozen.

    Noisy timesteps are drawn more often, because that is where a shape finds its place; a third of the prompts are
    empty, so that the hint is read and not guessed.
    """
    torch.manual_seed(3)
    vae, unet, text = base
    dtype = compute_dtype(device)
    control = networks.controlnet(unet)
    for net in base:
        networks.freeze(net, dtype)
    table = sample(rows, seed=3)
    prompts = Prompts(table, 2, 3, device)
    table = table.to(device)
    latents, hints = encode(vae, table, size), cache_edges(table, size)
    schedule = Schedule.on(device)

    def loss() -> Tensor:
        pick = torch.randint(rows, (plan.batch,), device=device)
        with torch.no_grad():
            context = text(prompts.draw(pick, 0.33)).last_hidden_state
        t = (1000 * torch.rand(plan.batch, device=device) ** 0.6).long()
        x, noise = noised(latents[pick], t, schedule)
        hint = hints[pick].to(dtype).expand(-1, 3, -1, -1)
        eps = with_control(unet, control, x.to(dtype), t, context, hint).float()
        return snr_weighted(eps, noise, t, schedule)

    fit("control", plan, [control], loss, device)
    for net in base:
        net.float()
    return control


def cache_edges(drawings: Drawings, size: int, *, batch: int = 128) -> Tensor:
    """Return the edges of rendered drawings, (N, 1, size, size) uint8 of 0 and 1."""
    parts = (drawings.take(slice(start, start + batch)) for start in range(0, len(drawings.kind), batch))
    return torch.cat([edges(render(part, size)[0]).byte() for part in parts])


def train_lcm(
    plan: Plan,
    rows: int,
    size: int,
    base: Base,
    device: torch.device,
) -> dict[str, LoRA]:
    """Train the LCM-LoRA: predict, from any of LCM's timesteps, where the guided teacher's ODE ends.

    The ends are computed once (DDIM, guidance TEACHER_GUIDANCE), half of them from the timesteps of 4-step sampling;
    the student regresses them without guidance. Loss: pseudo-Huber in latent space.
    """
    torch.manual_seed(4)
    vae, unet, text = base
    dtype = compute_dtype(device)
    for net in base:
        networks.freeze(net, dtype)
    table = sample(rows, seed=4)
    prompts = Prompts(table, 1, 4, device, omit=0.05)
    schedule = Schedule.on(device)
    latents = encode(vae, table.to(device), size)
    with torch.no_grad():
        contexts = torch.cat([text(ids).last_hidden_state for ids in prompts.ids[:, 0].split(1024)])
        empty = text(prompts.empty).last_hidden_state
    noisy, times, ends = _teach(unet, schedule, latents, contexts, empty)

    additions = networks.add_lora(unet, LCM_LAYERS, LCM_RANK)

    def loss() -> Tensor:
        pick = torch.randint(rows, (plan.batch,), device=device)
        x, t = noisy[pick].float(), times[pick]
        alpha, sigma = schedule.at(t)
        clean = (x - sigma * unet(x.to(dtype), t, contexts[pick]).sample.float()) / alpha
        return (torch.sqrt((clean - ends[pick].float()).square() + 1e-4) - 1e-2).mean()

    fit("lcm", plan, [unet], loss, device)
    return additions


@torch.no_grad()
def _teach(
    unet: UNet2DConditionModel, schedule: Schedule, latents: Tensor, contexts: Tensor, empty: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy latents, their timesteps and the latents the guided ODE takes each of them to."""
    four, fifty = lcm_timesteps(4), lcm_timesteps(50)
    starts, noisy, ends = [], [], []
    batches = zip(latents.chunk(TEACHER_BATCHES), contexts.chunk(TEACHER_BATCHES), strict=True)
    for number, (clean, context) in enumerate(batches):
        start = four[number // 2 % 4] if number % 2 else fifty[(number // 2 * 7) % 50]
        t = torch.full((len(clean),), start, device=clean.device)
        x, _ = noised(clean, t, schedule)

        def denoise(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return unet(x.to(unet.dtype), t, context).sample.float()

        count = max(round(TEACHER_STEPS * start / 1000), 1)
        times = torch.linspace(start, 0, count + 1)[:-1].round().long().tolist()
        ends.append(ddim(guided(denoise, context, empty, TEACHER_GUIDANCE), schedule, x, times).half())
        noisy.append(x.half())
        starts.append(t)
    return torch.cat(noisy), torch.cat(starts), torch.cat(ends)


def train_alpha(
    plan: Plan, rows: int, size: int, vae: AutoencoderKL, device: torch.device
) -> tuple[AlphaDecoder, OffsetEncoder]:
    """Train the transparent decoder and the offset encoder; the VAE is frozen.

    Objects over grey go through the VAE with an offset that may say where they are transparent; the decoder reads
    colour and alpha from the VAE's picture and the latents. One picture in six is an ordinary, opaque one.
    Loss: alpha (L1 + 2 L2 + L1 of the gradients), colour weighted by alpha, the picture over a random colour,
    harmlessness (the VAE's picture is what it would be without the offset) and the offset's size.
    """
    torch.manual_seed(5)
    dtype = compute_dtype(device)
    networks.freeze(vae, dtype)
    decoder, encoder = AlphaDecoder(), OffsetEncoder()
    table = sample(rows, seed=5, solid=0.45).to(device)

    def loss() -> Tensor:
        picture, rgb, alpha = render(table.take(torch.randint(rows, (plan.batch,), device=device)), size)
        opaque = torch.rand(plan.batch, 1, 1, 1, device=device) < 0.17
        rgb, alpha = torch.where(opaque, picture, rgb), torch.where(opaque, 1.0, alpha)
        with torch.no_grad():
            mean, sigma = moments(vae, grey(rgb, alpha).to(dtype))
        offset = encoder(torch.cat([alpha, rgb], 1).to(dtype)).float()
        latents = mean + sigma * offset
        # Latents that come from sampling are not quite those of the encoder.
        jitter = 0.15 * torch.rand(plan.batch, 1, 1, 1, device=device) * torch.randn_like(latents) / LATENT_SCALE
        seen = vae.decoder(vae.post_quant_conv((latents + jitter).to(dtype))).float() / 2 + 0.5
        argb = decoder(seen.clamp(0, 1).to(dtype), (latents + jitter).to(dtype)).float()
        harm = (seen - grey(rgb, alpha)).abs().mean()
        return alpha_loss(argb, rgb, alpha) + 0.5 * harm + 1e-5 * offset.square().mean()

    fit("alpha", plan, [decoder, encoder], loss, device)
    vae.float()
    return decoder, encoder


def moments(vae: AutoencoderKL, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (B, 4, h, w), unscaled, of pictures in [0, 1]."""
    mean, logvar = vae.quant_conv(vae.encoder(picture * 2 - 1)).float().chunk(2, 1)
    return mean, torch.exp(0.5 * logvar.clamp(-30, 20))


def alpha_loss(argb: Tensor, rgb: Tensor, alpha: Tensor) -> Tensor:
    """Return the transparent decoder's error against straight colour and alpha."""
    wrong = argb[:, :1] - alpha
    slopes = wrong.diff(dim=2).abs().mean() + wrong.diff(dim=3).abs().mean()
    colour = ((argb[:, 1:] - rgb).abs() * (alpha + 0.02)).mean()
    ground = torch.rand(len(rgb), 3, 1, 1, device=rgb.device)
    shown = ground + (argb[:, 1:] - ground) * argb[:, :1]
    composite = (shown - (ground + (rgb - ground) * alpha)).abs().mean()
    return wrong.abs().mean() + 2 * wrong.square().mean() + slopes + colour + composite


def train_transparent(
    plan: Plan,
    rows: int,
    size: int,
    base: Base,
    encoder: OffsetEncoder,
    device: torch.device,
) -> dict[str, LoRA]:
    """Train the attention patch that makes the UNet draw objects on nothing: latents over grey, with the offset."""
    torch.manual_seed(6)
    vae, unet, text = base
    dtype = compute_dtype(device)
    for net in (*base, encoder.to(device)):
        networks.freeze(net, dtype)
    table = sample(rows, seed=6, solid=0.5)
    prompts = Prompts(table, 2, 6, device, ground=False)
    latents = encode_transparent(vae, encoder, table.to(device), size)
    schedule = Schedule.on(device)
    additions = networks.add_lora(unet, ATTENTION, TRANSPARENT_RANK)

    def loss() -> Tensor:
        pick = torch.randint(rows, (plan.batch,), device=device)
        with torch.no_grad():
            context = text(prompts.draw(pick, 0.1)).last_hidden_state
        t = torch.randint(1000, (plan.batch,), device=device)
        x, noise = noised(latents[pick], t, schedule)
        return snr_weighted(unet(x.to(dtype), t, context).sample.float(), noise, t, schedule)

    fit("transparent", plan, [unet], loss, device)
    return additions


@torch.no_grad()
def encode_transparent(
    vae: AutoencoderKL, encoder: OffsetEncoder, drawings: Drawings, size: int, *, batch: int = 128
) -> Tensor:
    """Return scaled latents (N, 4, h, w) of the objects alone, as LayerDiffuse encodes them."""
    chunks = []
    for start in range(0, len(drawings.kind), batch):
        _, rgb, alpha = render(drawings.take(slice(start, start + batch)), size)
        mean, sigma = moments(vae, grey(rgb, alpha).to(vae.dtype))
        offset = encoder(torch.cat([alpha, rgb], 1).to(vae.dtype)).float()
        chunks.append((mean + sigma * offset) * LATENT_SCALE)
    return torch.cat(chunks)
