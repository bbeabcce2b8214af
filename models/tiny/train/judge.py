"""The judge: a small classifier that says what a picture shows, so that tests can count instead of look."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassine.models.tiny.train.drawings import BACKGROUNDS, COLOURS, SHAPES, Drawings, render, sample
from glassine.models.tiny.train.fit import Plan, compute_dtype, fit

ANSWERS = {"shape": SHAPES, "colour": tuple(COLOURS), "kind": BACKGROUNDS, "ground": tuple(COLOURS)}
SIDE = 128  # it looks at pictures of this size
WIDTHS = (16, 32, 48, 64, 64)


class Judge(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> logits of the object's shape and colour, the background's kind and colour."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow, wide in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(narrow, wide, 3, 2, 1), nn.GroupNorm(4, wide), nn.SiLU()]
            layers += [nn.Conv2d(wide, wide, 3, 1, 1), nn.GroupNorm(4, wide), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.heads = nn.Linear(2 * WIDTHS[-1], sum(map(len, ANSWERS.values())))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return logits (B, choices) by question."""
        small = F.interpolate(pictures, (SIDE, SIDE), mode="area")
        features = self.features(small * 2 - 1)
        logits = self.heads(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))
        return dict(zip(ANSWERS, logits.split([len(choices) for choices in ANSWERS.values()], 1), strict=True))

    @torch.no_grad()
    def read(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return the chosen indices (B,) by question."""
        return {question: logits.argmax(1) for question, logits in self(pictures).items()}


def truth(drawings: Drawings) -> dict[str, Tensor]:
    """Return the right answers for drawings of one object."""
    shape, colour = drawings.shape[:, 0], drawings.colour[:, 0]
    return {"shape": shape, "colour": colour, "kind": drawings.kind, "ground": drawings.ground}


def train_judge(plan: Plan, rows: int, device: torch.device) -> Judge:
    """Train the judge on fresh drawings of one object, half of them blurred and noisy as decoded pictures are."""
    torch.manual_seed(10)
    judge = Judge()
    table = sample(rows, seed=10, solid=0.8, single=1.0).to(device)
    dtype = compute_dtype(device)

    def loss() -> Tensor:
        batch = table.take(torch.randint(rows, (plan.batch,), device=device))
        pictures, _, _ = render(batch, SIDE)
        soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pictures = pictures + (soft - pictures) * torch.rand(plan.batch, 1, 1, 1, device=device)
        spoilt = torch.rand(plan.batch, 1, 1, 1, device=device).square() * 0.08
        pictures = pictures + spoilt * torch.randn_like(pictures)
        logits = judge(pictures.to(dtype))
        losses = [F.cross_entropy(logits[q].float(), answer) for q, answer in truth(batch).items()]
        return torch.stack(losses).sum()

    fit("judge", plan, [judge], loss, device)
    return judge
