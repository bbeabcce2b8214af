"""The first two stages: the VAE, then the UNet together with the text encoder."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from glassine.models.tiny.train import networks
from glassine.models.tiny.train.captions import captions, tokenize
from glassine.models.tiny.train.drawings import Drawings, render, sample
from glassine.models.tiny.train.fit import Plan, compute_dtype, fit
from glassine.models.tiny.train.networks import LATENT_SCALE
from glassine.models.tiny.train.sampling import Schedule

SNR_LIMIT = 5.0  # Hang et al. (2023): steps with little noise do not outweigh the others
OFFSET_NOISE = 0.1  # a constant a channel, so that the net does not lean on the little signal left at t = 999
PROMPT_DROPOUT = 0.1


def grey(rgb: Tensor, alpha: Tensor) -> Tensor:
    """Composite straight colours over mid-grey, in [0, 1]: what LayerDiffuse's latents show."""
    return 0.5 + (rgb - 0.5) * alpha


def train_vae(plan: Plan, rows: int, size: int, device: torch.device) -> AutoencoderKL:
    """Train the VAE on drawings: reconstruction + 2e-5 KL, decoding a sampled latent."""
    torch.manual_seed(1)
    vae = networks.vae()
    table = sample(rows, seed=1).to(device)
    dtype = compute_dtype(device)

    def loss() -> Tensor:
        target = _targets(table.take(torch.randint(rows, (plan.batch,), device=device)), size)
        mean, logvar = vae.quant_conv(vae.encoder(target.to(dtype))).float().chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return _reconstruction(vae, latents.to(dtype), target) + 2e-5 * divergence

    fit("vae", plan, [vae], loss, device)
    _standardize(vae, table.take(slice(0, min(rows, 2048))), size)
    return vae


def train_decoder(plan: Plan, rows: int, size: int, vae: AutoencoderKL, device: torch.device) -> AutoencoderKL:
    """Go on with the VAE's decoder alone; the latents stay what they are."""
    torch.manual_seed(7)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    fixed = {name: value.clone() for name, value in vae.state_dict().items() if name.startswith(("enc", "quant"))}
    table = sample(rows, seed=7).to(device)
    dtype = compute_dtype(device)

    def loss() -> Tensor:
        target = _targets(table.take(torch.randint(rows, (plan.batch,), device=device)), size)
        with torch.no_grad():
            mean, logvar = vae.quant_conv(vae.encoder(target.to(dtype))).float().chunk(2, 1)
            latents = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn_like(mean)
        return _reconstruction(vae, latents.to(dtype), target)

    fit("decoder", plan, [vae], loss, device)
    vae.load_state_dict(fixed, strict=False)  # training rounded the rest to bf16
    return vae


def _targets(drawings: Drawings, size: int) -> Tensor:
    """Return pictures (B, 3, size, size) in [-1, 1] for the VAE, one in eight an object alone on grey."""
    picture, rgb, alpha = render(drawings, size)
    alone = torch.rand(len(picture), 1, 1, 1, device=picture.device) < 0.125
    return torch.where(alone, grey(rgb, alpha), picture) * 2 - 1


def _reconstruction(vae: AutoencoderKL, latents: Tensor, target: Tensor) -> Tensor:
    """Return L1 + 4 L2 + 0.5 L1 of the gradients of the decoded latents."""
    error = vae.decoder(vae.post_quant_conv(latents)).float() - target
    slopes = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.5 * slopes


@torch.no_grad()
def _standardize(vae: AutoencoderKL, drawings: Drawings, size: int) -> None:
    """Fold each latent channel's centre and scale into the 1x1 convolutions around the latents.

    Afterwards latents times LATENT_SCALE, what every Stable Diffusion program works on, have mean 0 and deviation 1.
    """
    latents = encode(vae, drawings, size) / LATENT_SCALE
    centre, scale = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * LATENT_SCALE
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * centre).sum(1)
    post.weight *= scale[None, :, None, None]
    quant.weight[:4] /= scale[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - centre) / scale
    quant.bias[4:] -= 2 * torch.log(scale)


@torch.no_grad()
def encode(vae: AutoencoderKL, drawings: Drawings, size: int, *, batch: int = 128) -> Tensor:
    """Return the scaled mean latents (N, 4, size/8, size/8) of rendered drawings, in the VAE's dtype's precision."""
    dtype, chunks = vae.dtype, []
    for start in range(0, len(drawings.kind), batch):
        picture, _, _ = render(drawings.take(slice(start, start + batch)), size)
        mean, _ = vae.quant_conv(vae.encoder((picture * 2 - 1).to(dtype))).chunk(2, 1)
        chunks.append(mean.float() * LATENT_SCALE)
    return torch.cat(chunks)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, *, batch: int = 64) -> Tensor:
    """Return pictures (N, 3, H, W) in [0, 1] of scaled latents."""
    parts = (latents / LATENT_SCALE).to(vae.dtype).split(batch)
    return torch.cat([(vae.decode(part).sample.float() / 2 + 0.5).clamp(0, 1) for part in parts])


class Prompts:
    """Token ids of several captions a drawing, on the device, with the empty prompt at hand."""

    def __init__(
        self, drawings: Drawings, each: int, seed: int, device: torch.device, *, omit: float = 0.12, ground: bool = True
    ) -> None:
        texts = captions(drawings, each, seed, omit=omit, ground=ground)
        ids = tokenize([text for row in texts for text in row])
        self.ids = ids.view(len(texts), each, -1).int().to(device)
        self.empty = tokenize([""]).int().to(device)

    def draw(self, rows: Tensor, dropout: float) -> Tensor:
        """Return one caption (B, 77) of each of these drawings, some of them empty."""
        choice = torch.randint(self.ids.shape[1], rows.shape, device=rows.device)
        dropped = torch.rand(len(rows), 1, device=rows.device) < dropout
        return torch.where(dropped, self.empty, self.ids[rows, choice])


def train_unet(
    plan: Plan, rows: int, size: int, vae: AutoencoderKL, device: torch.device
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train the UNet and the text encoder to predict the noise, weighted by min(SNR, 5) / SNR."""
    torch.manual_seed(2)
    unet, text = networks.unet(), networks.text_encoder()
    table = sample(rows, seed=2)
    prompts = Prompts(table, 2, 2, device)
    latents = encode(networks.freeze(vae, compute_dtype(device)), table.to(device), size)
    schedule = Schedule.on(device)
    dtype = compute_dtype(device)

    def loss() -> Tensor:
        pick = torch.randint(rows, (plan.batch,), device=device)
        context = text(prompts.draw(pick, PROMPT_DROPOUT)).last_hidden_state
        t = torch.randint(1000, (plan.batch,), device=device)
        x, noise = noised(latents[pick], t, schedule)
        eps = unet(x.to(dtype), t, context).sample.float()
        return snr_weighted(eps, noise, t, schedule)

    fit("unet", plan, [unet, text], loss, device, compiled=[unet, text])
    vae.float()
    return unet, text


def noised(latents: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return x_t and the noise in it."""
    noise = torch.randn_like(latents)
    noise = noise + OFFSET_NOISE * torch.randn(*latents.shape[:2], 1, 1, device=latents.device)
    alpha, sigma = schedule.at(t)
    return alpha * latents + sigma * noise, noise


def snr_weighted(eps: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return the mean squared error of the predicted noise, weighted by min(SNR, SNR_LIMIT) / SNR."""
    alpha, sigma = schedule.at(t)
    weight = (SNR_LIMIT * (sigma / alpha) ** 2).clamp(max=1)
    return (weight * (eps - noise).square()).mean()
