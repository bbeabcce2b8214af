"""Train the tiny family: `python -m glassine.models.tiny.train --out DIR`, on a GPU (--smoke: on a CPU, in minutes).

Stages run in order and read what earlier ones wrote into DIR, as it ships; so one stage can be run again on its own:
copy the shipped files into DIR and name it with --stages. --measure measures what is in DIR.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from glassine.models.tiny.train import base, extras, files, judge, measure, networks
from glassine.models.tiny.train.fit import Plan
from glassine.models.tiny.train.judge import Judge
from glassine.models.tiny.train.networks import AlphaDecoder, OffsetEncoder

CONTROL, LCM = "tiny_control_canny", "tiny_lcm_lora"
DECODER, ENCODER, PATCH = "tiny_transparent_decoder", "tiny_transparent_encoder", "tiny_transparent_attn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A plan and the number of drawings it is carried out on."""

    plan: Plan
    rows: int


STAGES = {
    "judge": Stage(plan=Plan(steps=3000, batch=128, rate=2e-3), rows=131072),
    "vae": Stage(plan=Plan(steps=6000, batch=12, rate=1.5e-3), rows=131072),
    "decoder": Stage(plan=Plan(steps=14000, batch=12, rate=7e-4), rows=131072),
    "unet": Stage(plan=Plan(steps=12500, batch=128, rate=1e-3), rows=65536),
    "control": Stage(plan=Plan(steps=8000, batch=128, rate=1e-3), rows=32768),
    "lcm": Stage(plan=Plan(steps=2000, batch=128, rate=1e-3), rows=16384),
    "alpha": Stage(plan=Plan(steps=3400, batch=12, rate=1e-3), rows=65536),
    "transparent": Stage(plan=Plan(steps=2000, batch=128, rate=1e-3), rows=32768),
}
SMOKE = Stage(plan=Plan(steps=2, batch=2, rate=1e-3), rows=4)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the script: where, on what, at which size. Stages hand on through the files they write."""

    out: Path
    device: torch.device
    size: int
    count: int  # pictures a figure
    steps: int  # of the sampler when measuring

    def file(self, name: str) -> Path:
        """Return the path of a weights file."""
        return self.out / f"{name}.safetensors"

    def ready(self, name: str, net: networks.Net) -> networks.Net:
        """Return `net` with the weights of a file of plain names, for use."""
        files.read(self.file(name), net.state_dict())
        return net.to(self.device).eval().requires_grad_(False)

    def base(self) -> extras.Base:
        """Return the trained VAE, UNet and text encoder as they ship."""
        nets = networks.vae(), networks.unet(), networks.text_encoder()
        files.read(self.file("tiny"), files.checkpoint(*nets))
        for net in nets:
            net.to(self.device).eval().requires_grad_(False)
        return nets

    def family(self) -> measure.Family:
        """Return what measuring needs."""
        return measure.Family(*self.base(), self.ready("judge", Judge()), self.size, self.count, self.steps)

    def report(self, name: str, figures: measure.Figures) -> None:
        """Print figures and keep them in metrics.json."""
        path = self.out / "metrics.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, name: figures}, indent=2) + "\n")
        print(name, json.dumps(figures), flush=True)


def train_judge(run: Run, stage: Stage) -> None:
    """Write judge.safetensors."""
    files.write(run.file("judge"), judge.train_judge(stage.plan, stage.rows, run.device).state_dict(), {})


def train_vae(run: Run, stage: Stage) -> None:
    """Write vae.safetensors, an intermediate: the next two stages read it."""
    vae = base.train_vae(stage.plan, stage.rows, run.size, run.device)
    files.write(run.file("vae"), vae.state_dict(), {})


def train_decoder(run: Run, stage: Stage) -> None:
    """Write vae.safetensors again, with a better decoder."""
    vae = base.train_decoder(stage.plan, stage.rows, run.size, run.ready("vae", networks.vae()), run.device)
    files.write(run.file("vae"), vae.state_dict(), {})


def train_unet(run: Run, stage: Stage) -> None:
    """Write the checkpoint and the vocabulary."""
    vae = run.ready("vae", networks.vae())
    unet, text = base.train_unet(stage.plan, stage.rows, run.size, vae, run.device)
    files.write(run.file("tiny"), files.checkpoint(vae, unet, text), files.metadata())
    files.write_vocabulary(run.out)


def measure_base(run: Run) -> None:
    """Measure the VAE and twenty-step pictures."""
    family = run.family()
    run.report("vae", measure.measure_vae(family, run.out))
    for guidance in (5.0, 7.5):
        run.report(f"prompts_{guidance:g}", measure.measure_prompts(family, run.out, guidance))
    measure.draw_anything(family, run.out)


def train_control(run: Run, stage: Stage) -> None:
    """Write the ControlNet."""
    control = extras.train_control(stage.plan, stage.rows, run.size, run.base(), run.device)
    about = {"modelspec.architecture": "stable-diffusion-v1/controlnet"}
    files.write(run.file(CONTROL), files.control_weights(control), about)


def measure_control(run: Run) -> None:
    """Measure how well edges are followed."""
    family = run.family()
    control = networks.controlnet(family.unet)
    files.read(run.file(CONTROL), files.control_weights(control))
    run.report("control", measure.measure_control(family, control.to(run.device).eval(), run.out))


def train_lcm(run: Run, stage: Stage) -> None:
    """Write the LCM-LoRA."""
    additions = extras.train_lcm(stage.plan, stage.rows, run.size, run.base(), run.device)
    about = {"modelspec.architecture": "stable-diffusion-v1/lora"}
    files.write(run.file(LCM), files.kohya_lora(additions), about)


def measure_lcm(run: Run) -> None:
    """Measure four-step pictures."""
    family = run.family()
    additions = networks.add_lora(family.unet, extras.LCM_LAYERS, extras.LCM_RANK)
    files.read(run.file(LCM), files.kohya_lora(additions))
    family.unet.to(run.device)
    run.report("lcm", measure.measure_lcm(family, run.out))


def train_alpha(run: Run, stage: Stage) -> None:
    """Write the transparent decoder and encoder."""
    decoder, encoder = extras.train_alpha(stage.plan, stage.rows, run.size, run.base()[0], run.device)
    files.write(run.file(DECODER), decoder.state_dict(), {})
    files.write(run.file(ENCODER), encoder.state_dict(), {})


def measure_alpha(run: Run) -> None:
    """Measure alpha of encoded objects."""
    decoder, encoder = run.ready(DECODER, AlphaDecoder()), run.ready(ENCODER, OffsetEncoder())
    run.report("alpha", measure.measure_alpha(run.family(), decoder, encoder, run.out))


def train_transparent(run: Run, stage: Stage) -> None:
    """Write the attention patch for transparent pictures."""
    encoder = run.ready(ENCODER, OffsetEncoder())
    additions = extras.train_transparent(stage.plan, stage.rows, run.size, run.base(), encoder, run.device)
    about = {"modelspec.architecture": "stable-diffusion-v1/lora"}
    files.write(run.file(PATCH), files.layerdiffuse_patch(additions), about)


def measure_transparent(run: Run) -> None:
    """Measure transparent pictures."""
    family = run.family()
    additions = networks.add_lora(family.unet, extras.ATTENTION, extras.TRANSPARENT_RANK)
    files.read(run.file(PATCH), files.layerdiffuse_patch(additions))
    family.unet.to(run.device)
    run.report("transparent", measure.measure_transparent(family, run.ready(DECODER, AlphaDecoder()), run.out))


TRAIN: dict[str, Callable[[Run, Stage], None]] = {
    "judge": train_judge, "vae": train_vae, "decoder": train_decoder, "unet": train_unet, "control": train_control,
    "lcm": train_lcm, "alpha": train_alpha, "transparent": train_transparent,
}  # fmt: skip
MEASURE: dict[str, Callable[[Run], None]] = {
    "unet": measure_base, "control": measure_control, "lcm": measure_lcm, "alpha": measure_alpha,
    "transparent": measure_transparent,
}  # fmt: skip


def main() -> None:
    """Parse the arguments and run the stages."""
    parser = argparse.ArgumentParser(prog="python -m glassine.models.tiny.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, figures and grids")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated; default: all, in order")
    parser.add_argument("--measure", action="store_true", help="train nothing, measure the files that are there")
    parser.add_argument("--count", type=int, default=300, help="pictures a figure is measured on")
    parser.add_argument("--smoke", action="store_true", help="two steps of each stage on small pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    wanted = options.stages.split(",")
    if unknown := [name for name in wanted if name not in STAGES]:
        parser.error(f"unknown stages {unknown}; there are {list(STAGES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    size, count, steps = (64, 2, 1) if options.smoke else (networks.SIZE, options.count, 20)
    run = Run(options.out, torch.device(options.device), size, count, steps)
    for name in wanted:
        began = time.perf_counter()
        if not options.measure:
            TRAIN[name](run, SMOKE if options.smoke else STAGES[name])
            run.report(f"{name}_seconds", {"wall": round(time.perf_counter() - began, 1)})
        if name in MEASURE:
            MEASURE[name](run)


if __name__ == "__main__":
    main()
