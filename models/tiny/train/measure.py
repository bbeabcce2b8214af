"""The figures of the model card, and the grids to look at. Everything is drawn from seeds that training never saw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel

from glassine.models.tiny.train import sampling
from glassine.models.tiny.train.base import decode, encode, grey
from glassine.models.tiny.train.captions import captions, tokenize
from glassine.models.tiny.train.drawings import Drawings, edges, render, sample
from glassine.models.tiny.train.extras import encode_transparent, with_control
from glassine.models.tiny.train.judge import Judge, truth
from glassine.models.tiny.train.networks import LATENT_SCALE, AlphaDecoder, OffsetEncoder

Figures = dict[str, float]
UNSEEN = 1000  # seeds from here on belong to the measurements


@dataclass(frozen=True, slots=True)
class Family:
    """The trained base, in evaluation mode on one device, and the judge."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text: CLIPTextModel
    judge: Judge
    size: int
    count: int  # pictures a figure
    steps: int = 20  # of DPM++ 2M

    @property
    def device(self) -> torch.device:
        """Where the family is."""
        return self.unet.device

    @torch.no_grad()
    def context(self, prompts: list[str]) -> Tensor:
        """Return the hidden states (B, 77, width) of prompts."""
        return self.text(tokenize(prompts).to(self.device)).last_hidden_state

    def noise(self, count: int) -> Tensor:
        """Return the same starting noise every time."""
        generator = torch.Generator().manual_seed(UNSEEN)
        return torch.randn(count, 4, self.size // 8, self.size // 8, generator=generator).to(self.device)

    def eps(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Predict the noise."""
        return self.unet(x.to(self.unet.dtype), t, context.to(self.unet.dtype)).sample.float()


def judged_set(family: Family) -> tuple[Drawings, list[str]]:
    """Return drawings of one plain object and prompts that name everything."""
    drawings = sample(family.count, seed=UNSEEN, solid=1.0, single=1.0)
    return drawings, [row[0] for row in captions(drawings, 1, UNSEEN, omit=0.0)]


def score(family: Family, pictures: Tensor, drawings: Drawings) -> Figures:
    """Return the share of pictures that show the right shape, colour and background (its pattern and its colour)."""
    answers = family.judge.read(pictures)
    right = {question: answers[question] == wanted.to(pictures.device) for question, wanted in truth(drawings).items()}
    figures = {"shape": right["shape"], "colour": right["colour"], "background": right["kind"] & right["ground"]}
    return {name: round(float(values.float().mean()), 4) for name, values in figures.items()}


@torch.no_grad()
def measure_vae(family: Family, out: Path) -> Figures:
    """Return PSNR in dB of reconstructions (mean and 10th percentile), and what the judge makes of both sides."""
    drawings = sample(family.count, seed=UNSEEN + 1, solid=0.7, single=1.0).to(family.device)
    pictures = torch.cat([render(drawings.take(slice(i, i + 64)), family.size)[0] for i in range(0, family.count, 64)])
    again = decode(family.vae, encode(family.vae, drawings, family.size, batch=64))
    psnr = -10 * torch.log10((pictures - again).square().mean((1, 2, 3)))
    save_grid(torch.cat([pictures[:10], again[:10], pictures[10:20], again[10:20]]), out / "vae.png", 10)
    clean, decoded = score(family, pictures, drawings), score(family, again, drawings)
    return {
        "psnr": round(float(psnr.mean()), 2), "psnr_p10": round(float(psnr.quantile(0.1)), 2),
        **{f"judge_clean_{name}": value for name, value in clean.items()},
        **{f"judge_decoded_{name}": value for name, value in decoded.items()},
    }  # fmt: skip


@torch.no_grad()
def measure_prompts(family: Family, out: Path, guidance: float) -> Figures:
    """Return how often 20 steps of DPM++ 2M draw what the prompt says."""
    drawings, prompts = judged_set(family)
    denoise = sampling.guided(family.eps, family.context(prompts), family.context([""]), guidance)
    schedule = sampling.Schedule.on(family.device)
    pictures = decode(family.vae, sampling.dpmpp_2m(denoise, schedule, family.noise(len(prompts)), family.steps))
    save_grid(pictures[:50], out / f"prompts_{guidance:g}.png", 10)
    (out / "prompts.txt").write_text("\n".join(prompts[:50]) + "\n", encoding="utf-8")
    return score(family, pictures, drawings)


@torch.no_grad()
def draw_anything(family: Family, out: Path) -> None:
    """Draw a grid of everything the grammar can say: pairs, glass, glow, missing words. Nothing is counted."""
    drawings = sample(min(family.count, 50), seed=UNSEEN + 2, solid=0.4, single=0.6)
    prompts = [row[0] for row in captions(drawings, 1, UNSEEN + 2)]
    denoise = sampling.guided(family.eps, family.context(prompts), family.context([""]), 5.0)
    noise = family.noise(len(prompts))
    latents = sampling.dpmpp_2m(denoise, sampling.Schedule.on(family.device), noise, family.steps)
    save_grid(decode(family.vae, latents), out / "anything.png", 10)
    (out / "anything.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


@torch.no_grad()
def measure_control(family: Family, control: ControlNetModel, out: Path) -> Figures:
    """Return the edge F1 (2 pixels' tolerance) of pictures with and without the hint, and the accuracies with it."""
    drawings, prompts = judged_set(family)
    drawings = drawings.to(family.device)
    hints = torch.cat(
        [edges(render(drawings.take(slice(i, i + 64)), family.size)[0]) for i in range(0, family.count, 64)]
    )
    both = hints.repeat(2, 1, 1, 1).expand(-1, 3, -1, -1).to(family.unet.dtype)

    def eps(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        dtype = family.unet.dtype
        return with_control(family.unet, control, x.to(dtype), t, context.to(dtype), both).float()

    schedule, context, empty = sampling.Schedule.on(family.device), family.context(prompts), family.context([""])
    noise = family.noise(len(prompts))
    plain = decode(
        family.vae, sampling.dpmpp_2m(sampling.guided(family.eps, context, empty, 5.0), schedule, noise, family.steps)
    )
    drawn = decode(
        family.vae, sampling.dpmpp_2m(sampling.guided(eps, context, empty, 5.0), schedule, noise, family.steps)
    )
    shown = hints.expand(-1, 3, -1, -1)
    save_grid(torch.cat([shown[:10], drawn[:10], shown[10:20], drawn[10:20]]), out / "control.png", 10)
    found = edge_f1(edges(drawn), hints)
    return {
        "edge_f1": round(float(found.mean()), 4), "edge_f1_median": round(float(found.median()), 4),
        "edge_f1_without": round(float(edge_f1(edges(plain), hints).mean()), 4),
        **score(family, drawn, drawings),
    }  # fmt: skip


def edge_f1(found: Tensor, wanted: Tensor, tolerance: int = 2) -> Tensor:
    """Return F1 (B,) of edge maps (B, 1, H, W): an edge counts when the other map has one within `tolerance` pixels."""
    reach = 2 * tolerance + 1

    def share(of: Tensor, near: Tensor) -> Tensor:
        wide = F.max_pool2d(near, reach, stride=1, padding=tolerance)
        return (of * wide).sum((1, 2, 3)) / of.sum((1, 2, 3)).clamp(min=1)

    precision, recall = share(found, wanted), share(wanted, found)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-6)


@torch.no_grad()
def measure_lcm(family: Family, out: Path) -> Figures:
    """Return the accuracies of four LCM steps without guidance; family.unet carries the LoRA."""
    drawings, prompts = judged_set(family)
    context = family.context(prompts)
    torch.manual_seed(UNSEEN)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return family.eps(x, t, context)

    latents = sampling.lcm(denoise, sampling.Schedule.on(family.device), family.noise(len(prompts)), 4)
    pictures = decode(family.vae, latents)
    save_grid(pictures[:50], out / "lcm.png", 10)
    return score(family, pictures, drawings)


@torch.no_grad()
def measure_alpha(family: Family, decoder: AlphaDecoder, encoder: OffsetEncoder, out: Path) -> Figures:
    """Return how well one pass of the transparent decoder recovers alpha from encoded objects and opaque pictures."""
    count = min(family.count, 128)
    drawings = sample(count, seed=UNSEEN + 3, solid=0.5).to(family.device)
    _, rgb, alpha = render(drawings, family.size)
    argb = decode_alpha(family, decoder, encode_transparent(family.vae, encoder, drawings, family.size))
    guess = argb[:, :1]
    both, either = ((guess > 0.5) & (alpha > 0.5)).sum((1, 2, 3)), ((guess > 0.5) | (alpha > 0.5)).sum((1, 2, 3))
    solid = (drawings.material[:, 0] == 0) & (drawings.present[:, 1] == 0)
    inside = -F.max_pool2d(-alpha, 5, stride=1, padding=2) > 0.999
    ordinary = decode_alpha(family, decoder, encode(family.vae, drawings, family.size))[:, 0]
    board = (torch.arange(family.size, device=family.device) // 16).remainder(2)
    board = 0.45 + 0.1 * (board[:, None] ^ board[None])
    shown = [board + (rgb - board) * alpha, board + (argb[:, 1:] - board) * guess]
    save_grid(torch.cat([shown[0][:10], shown[1][:10], shown[0][10:20], shown[1][10:20]]), out / "alpha.png", 10)
    half = (alpha > 0.05) & (alpha < 0.95)
    return {
        "iou": round(float((both / either.clamp(min=1))[(alpha > 0.5).sum((1, 2, 3)) > 50].mean()), 4),
        "mae": round(float((guess - alpha).abs().mean()), 4),
        "mae_half": round(float((guess - alpha).abs()[half].mean()), 4),
        "inside_solid": round(float(guess[solid][inside[solid]].mean()), 4),
        "ordinary_alpha": round(float(ordinary.mean()), 4),
        "ordinary_opaque": round(float((ordinary > 0.97).float().mean()), 4),
    }


@torch.no_grad()
def decode_alpha(family: Family, decoder: AlphaDecoder, latents: Tensor) -> Tensor:
    """Return [A, R, G, B] (B, 4, H, W) in [0, 1] of scaled latents, in one pass."""
    pictures = decode(family.vae, latents)
    parts = zip(pictures.split(64), (latents / LATENT_SCALE).split(64), strict=True)
    return torch.cat([decoder(picture, part).clamp(0, 1) for picture, part in parts])


@torch.no_grad()
def measure_transparent(family: Family, decoder: AlphaDecoder, out: Path) -> Figures:
    """Return how pictures of the patched UNet come out: accuracies over a plain ground, alpha in and around them."""
    drawings, _ = judged_set(family)
    prompts = [row[0] for row in captions(drawings, 1, UNSEEN, omit=0.0, ground=False)]
    denoise = sampling.guided(family.eps, family.context(prompts), family.context([""]), 5.0)
    latents = sampling.dpmpp_2m(denoise, sampling.Schedule.on(family.device), family.noise(len(prompts)), family.steps)
    argb = decode_alpha(family, decoder, latents)
    alpha, rgb = argb[:, :1], argb[:, 1:]
    tone = drawings.to(family.device).tones[:, 0, :, None, None]
    judged = score(family, tone + (rgb - tone) * alpha, drawings._replace(kind=torch.zeros_like(drawings.kind)))
    inside = -F.max_pool2d(-(alpha > 0.5).float(), 9, stride=1, padding=4) > 0
    board = (torch.arange(family.size, device=family.device) // 16).remainder(2)
    board = 0.45 + 0.1 * (board[:, None] ^ board[None])
    save_grid((board + (rgb - board) * alpha)[:50], out / "transparent.png", 10)
    save_grid((grey(rgb, alpha))[:10], out / "transparent_grey.png", 10)
    return {
        **judged,
        "inside": round(float(alpha[inside].mean()), 4),
        "covered": round(float((alpha > 0.5).float().mean()), 4),
        "clear_corners": round(float((alpha[..., :8, :8] < 0.05).float().mean()), 4),
    }


def save_grid(pictures: Tensor, path: Path, columns: int, side: int = 128) -> None:
    """Write pictures (N, 3, H, W) in [0, 1] as one PNG, `columns` a row, each `side` pixels."""
    small = F.interpolate(pictures.float(), (side, side), mode="area").clamp(0, 1)
    rows = -(-len(small) // columns)
    sheet = small.new_ones(rows * columns, 3, side, side)
    sheet[: len(small)] = small
    sheet = sheet.view(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    Image.fromarray((sheet.cpu().numpy() * 255).round().astype(np.uint8)).save(path)
