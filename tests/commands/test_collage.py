"""`glassine collage` as a user runs it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

RED, BLUE = (220, 30, 30, 255), (40, 60, 220, 255)
PROJECT = {
    "prompt": "a (red:1.1) star and a blue circle",
    "seed": 3,
    "steps": 2,
    "background": "#808080",
    "background_change": 0.6,
    "blur": 0,
    "layers": [
        {"image": "star.png", "words": "a red star", "x": 4, "y": 20, "change": 0.8},
        {"image": "circle.png", "words": "a blue circle", "x": 40, "y": 20, "width": 20},
    ],
}


@pytest.fixture
def scene(tmp_path):
    """project.json and its pictures, in the working folder."""
    for name, colour in (("star", RED), ("circle", BLUE)):
        Image.new("RGBA", (24, 24), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "project.json").write_text(json.dumps(PROJECT))
    return tmp_path


def read(path):
    return np.asarray(Image.open(path))


def test_drawn_and_drawn_again(glassine, scene, collage_folder):
    result = glassine("collage", "project.json", "--model", collage_folder, "-o", "one.png", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["path"], report["seed"], report["evaluations"]) == ("one.png", 3, 2)
    again = glassine("collage", "--from", "one.png", "--model", collage_folder, "-o", "two.png")
    assert again.exit_code == 0, again.output
    assert (scene / "one.png").read_bytes() == (scene / "two.png").read_bytes()
    other = glassine("collage", "--from", "one.png", "--model", collage_folder, "--seed", "4", "-o", "three.png")
    assert other.exit_code == 0
    assert not np.array_equal(read("one.png"), read("three.png"))
    refused = glassine("generate", collage_folder, "--from", "one.png", "-o", "four.png")
    assert refused.exit_code == 2
    assert "this picture is a collage; draw it again with: glassine collage --from" in refused.output
    Image.new("RGBA", (24, 24), BLUE).save(scene / "star.png")
    changed = glassine("collage", "--from", "one.png", "--model", collage_folder, "-o", "four.png")
    assert changed.exit_code == 1
    assert "star.png: changed since the picture was drawn from it" in changed.output


def test_only_one_layer_is_drawn_again(glassine, scene, collage_folder):
    """Everything but that layer is as in the first picture, to the byte, two latent cells beside it."""
    model = ("--model", collage_folder)
    assert glassine("collage", "project.json", *model, "-o", "one.png").exit_code == 0
    result = glassine("collage", "project.json", *model, "--on", "one.png", "--only", "a red star", "-o", "two.png")
    assert result.exit_code == 0, result.output
    one, two = read("one.png"), read("two.png")
    live = np.zeros((64, 64), bool)
    live[8:56, :40] = True  # the cells under the star, 16..48 x 0..32, and one around them
    assert np.array_equal(one[~live], two[~live])
    assert not np.array_equal(one[24:40, 8:24], two[24:40, 8:24])
    again = glassine("collage", "--from", "two.png", *model, "-o", "three.png")
    assert again.exit_code == 0
    assert (scene / "two.png").read_bytes() == (scene / "three.png").read_bytes()


def test_maps_before_drawing(glassine, scene, collage_folder, monkeypatch):
    from glassine.runtime.pipeline import Pipeline

    monkeypatch.setattr(Pipeline, "engine", lambda *_: pytest.fail("a network was loaded"))
    result = glassine("collage", "project.json", "--model", collage_folder, "--preview-maps", "maps.png")
    assert result.exit_code == 0, result.output
    sheet = read("maps.png")
    assert result.stdout == "maps.png\n"
    assert not list(scene.glob("glassine-*"))
    # The composite, and beside it each layer in its own colour where it is seen.
    panel = np.asarray(Image.fromarray(sheet[12 : 12 + 384, 12 : 12 + 384]).resize((64, 64), Image.Resampling.BOX))
    assert np.abs(panel[26:38, 10:22].astype(int) - RED[:3]).max() <= 2
    colours = {tuple(sheet[12 + 6 * 30, 12 + 384 + 12 + 6 * x]) for x in (16, 50, 1)}
    assert len(colours) == 3


def test_control(glassine, scene, collage_folder):
    words = ("collage", "project.json", "--model", collage_folder)
    assert glassine(*words, "-o", "plain.png").exit_code == 0
    result = glassine(*words, "--control", "canny:preprocess=canny", "-o", "steered.png")
    assert result.exit_code == 0, result.output
    assert not np.array_equal(read("plain.png"), read("steered.png"))
    again = glassine("collage", "--from", "steered.png", "--model", collage_folder, "-o", "again.png")
    assert again.exit_code == 0, again.output
    assert (scene / "steered.png").read_bytes() == (scene / "again.png").read_bytes()


def test_jobs_of_a_batch(glassine, scene, collage_folder):
    """A job is the project, with what the job says over it; it is drawn once."""
    jobs = [
        {"collage": "project.json", "out": "as-it-is.png"},
        {"collage": "project.json", "seed": 9, "model": str(collage_folder), "out": "seed.png"},
    ]
    (scene / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    words = ("batch", "jobs.jsonl", "--model", collage_folder, "-o", "out", "--json")
    first, second = (json.loads(glassine(*words).stdout.splitlines()[-1]) for _ in range(2))
    assert (first["drawn"], first["failed"], second["there"]) == (2, 0, 2)
    for name, more in (("as-it-is", ()), ("seed", ("--seed", 9))):
        alone = glassine("collage", "project.json", "--model", collage_folder, *more, "-o", f"{name}.png")
        assert alone.exit_code == 0
        assert np.array_equal(read(f"{name}.png"), read(f"out/{name}.png"))
    for change, said in (
        ({"prompt": "a star"}, 'the words "a red star" are not in the prompt "a star"'),
        ({"image": "star.png"}, "a collage is the picture and its change map; leave image out"),
        ({"collage": "nowhere.json"}, "nowhere.json: cannot be read"),
    ):
        (scene / "jobs.jsonl").write_text(json.dumps({**jobs[0], **change}))
        refused = glassine("batch", "jobs.jsonl", "--model", collage_folder, "-o", "other")
        assert refused.exit_code == 1
        assert said in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "give a PROJECT, or --from PICTURE.png"),
        (("project.json", "--from", "star.png"), 2, "one of them"),
        (("project.json",), 2, 'which model? Give --model FOLDER, or the project a "model"'),
        (
            ("project.json", "--model", "MODEL", "--only", "a cup"),
            2,
            '--only "a cup": no layer has these words; there are',
        ),
        (("project.json", "--model", "MODEL", "--prompt", "a star"), 1, 'the words "a red star" are not in the prompt'),
        (("nowhere.json", "--model", "MODEL"), 1, "nowhere.json: cannot be read"),
        (("--from", "star.png", "--model", "MODEL"), 1, "star.png: holds no settings"),
        (("project.json", "--model", "PLAIN"), 1, "--collage (or draw without"),
    ],
)
def test_refused(glassine, scene, collage_folder, tiny_folder, words, code, said):
    places = {"MODEL": collage_folder, "PLAIN": tiny_folder}
    result = glassine("collage", *(places.get(word, word) for word in words))
    assert result.exit_code == code
    assert said in " ".join(result.output.split())
