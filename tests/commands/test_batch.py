"""batch: every picture once whatever interrupts it, what a line may say, what is refused before drawing, failures."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from glassine.runtime.jobs import KEYWORD, read_jobs
from glassine.runtime.pipeline import Pipeline

FAST = {"steps": 2, "sampler": "euler"}


@pytest.fixture
def write(tmp_path):
    """Write jobs, dicts or lines as they are, to jobs.jsonl."""

    def write(*jobs):
        lines = [json.dumps({**FAST, **job}) if isinstance(job, dict) else job for job in jobs]
        (tmp_path / "jobs.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")

    return write


@pytest.fixture
def batch(glassine, tiny_folder):
    return lambda *more: glassine("batch", "jobs.jsonl", "--model", tiny_folder, "-o", "out", *more)


def pixels(path):
    return np.asarray(Image.open(path))


def stamps(folder):
    """Name -> what changes when a picture is drawn again: its file."""
    files = {path.name: path.stat() for path in folder.glob("*.png")} if folder.is_dir() else {}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in files.items()}


def test_pictures_are_those_of_the_python_interface(batch, write, tiny_folder, photo, tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    write(
        {"prompt": "a cat", "seed": 3, "negative_prompt": "dog", "out": "plain.png"},
        "",
        {"prompt": "a cat", "image": "photo.png", "strength": 0.5, "out": "image.png"},
        {"prompt": "a cat", "image": "photo.png", "out": "alone.png"},
        {"prompt": "a cat", "image": "photo.png", "change_map": "gradient:left-right", "out": "map.png"},
        {"prompt": "a cat", "image": "photo.png", "mask": "mask.png", "softness": 8, "out": "mask.png"},
        {"prompt": "a cat", "image": "photo.png", "mask": "mask.png", "map_white": "keep", "out": "keep.png"},
    )
    result = batch("--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [job["line"] for job in report["jobs"]] == [1, 3, 4, 5, 6, 7]
    assert (report["drawn"], report["there"], report["failed"]) == (6, 0, 0)
    with Pipeline.load(tiny_folder) as pipe:
        image = tmp_path / "photo.png"
        expected = {
            "plain": pipe("a cat", seed=3, negative_prompt="dog", **FAST),
            "image": pipe("a cat", image=image, strength=0.5, **FAST),
            "alone": pipe("a cat", image=image, **FAST),
            "map": pipe("a cat", image=image, change_map="gradient:left-right", **FAST),
            "mask": pipe("a cat", image=image, mask=tmp_path / "mask.png", softness=8, **FAST),
            "keep": pipe("a cat", image=image, change_map=1 - mask / 255, **FAST),
        }
    for name, picture in expected.items():
        assert np.array_equal(pixels(tmp_path / "out" / f"{name}.png"), np.asarray(picture)), name


def test_a_picture_of_a_batch_can_be_drawn_again_by_generate(batch, write, glassine, tiny_folder, tmp_path):
    write({"prompt": "a cat", "seed": 5, "out": "cat.png"})
    batch()
    assert glassine("generate", tiny_folder, "--from", "out/cat.png", "-o", "again.png").exit_code == 0
    assert np.array_equal(pixels(tmp_path / "out" / "cat.png"), pixels(tmp_path / "again.png"))


def test_a_second_run_draws_what_is_new_and_what_was_lost(batch, write, tmp_path):
    jobs = [{"prompt": "a cat", "seed": seed} for seed in range(4)]  # named by their digests
    write(*jobs)
    first = batch()
    drawn = first.stdout.split()
    assert len(set(drawn)) == 4
    before = stamps(tmp_path / "out")
    (tmp_path / drawn[1]).unlink()
    write({"prompt": "a dog"}, *reversed(jobs))  # the place of a job in the file does not matter
    second = batch()
    assert len(second.stdout.split()) == 2
    assert drawn[1] in second.stdout.split()
    after = stamps(tmp_path / "out")
    assert {name: after[name] for name in before if name != os.path.basename(drawn[1])} == {
        name: stamp for name, stamp in before.items() if name != os.path.basename(drawn[1])
    }
    assert "2 drawn, 3 there before, 0 failed" in second.stderr


def test_what_decides_a_picture_decides_its_digest_and_nothing_else_does(write, tiny_folder, photo, tmp_path):
    os.link(photo, tmp_path / "same.png")
    base = {"prompt": "a cat", "image": "photo.png", "change_map": "flat:0.5"}
    control = {"net": "canny", "weight": 0.5}
    same = [
        base,
        {**base, "seed": 0, "out": "x.png"},
        {**base, "image": "same.png"},
        {**base, "size": [64, 64], "mask": None},
    ]
    others = [
        {**base, "seed": 1},
        {**base, "change_map": "flat:0.6"},
        {**base, "map_white": "keep"},
        {**base, "controls": [control]},
        {**base, "controls": [{**control, "weight": 0.6}]},
        {**base, "controls": [control, control]},
    ]
    digests = []
    for job in (*same, *others):
        write(job)
        digests.append(read_jobs(tmp_path / "jobs.jsonl", tmp_path / "out", model=tiny_folder)[0].digest)
    assert len(set(digests[: len(same)])) == 1
    assert len(set(digests)) == 1 + len(others)
    Image.fromarray(255 - pixels(photo)).save(photo)
    write(base)
    assert read_jobs(tmp_path / "jobs.jsonl", tmp_path / "out", model=tiny_folder)[0].digest not in digests


GOOD = '{"prompt": "a cat"}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a cat"', "damaged (Expecting"),
        ('{"prompt": "a cat", "prompt": "a dog"}', "given twice"),
        ('{"guidance_scale": NaN}', "NaN is not a number"),
        ('["a cat"]', "is list, expected one JSON object"),
        ('{"prompt": "a cat", "step": 3}', "unknown fields ['step']; a job has out, model"),
        ('{"steps": "3"}', "'steps' is '3', expected int"),
        ('{"steps": 0}', "steps is 0, expected 1 to 1000"),
        ('{"sampler": "euller"}', "sampler is 'euller', expected one of"),
        ('{"layers": "joint"}', "use glassine layers"),
        ('{"out": "../cat.png"}', "expected the plain name of a .png file"),
        ('{"out": "cat.jpg"}', "expected the plain name of a .png file"),
        (f'{{"out": "{"a" * 300}.png"}}', "is a name of 304 bytes, expected at most 200"),
        ('{"out": "\\ud800.png"}', "surrogates not allowed"),
        (f'{{"prompt": [{"1, " * 9999}1]}}', " ... (30034 characters)"),
        ('{"size": [64]}', "expected [width, height]"),
        ('{"size": [128, 128]}', "converted for 64x64, not for 128x128"),
        ('{"model": "nowhere"}', "nowhere"),
        ('{"image": "nowhere.png"}', "nowhere.png: cannot be read (No such file"),
        ('{"image": 3}', '"image" is 3, expected a text'),
        ('{"change_map": "flat:1"}', "give the picture too"),
        ('{"image": "photo.png", "map_white": "black"}', 'expected "change" or "keep"'),
        ('{"image": "photo.png", "softness": 4}', "softness is the soft border of a mask"),
        ('{"controls": {"net": "canny"}}', "expected a list"),
        ('{"controls": [{"net": "canny", "wait": 1}]}', "expected an object with net, image"),
        ('{"controls": [{"net": "canny", "weight": "1"}]}', "\"weight\" is '1', expected a number"),
        ('{"controls": [{"net": "canny", "weight": 3}]}', "weight is 3.0, expected 0 (off) to 2"),
    ],
)
def test_a_line_that_makes_no_sense_is_named_before_anything_is_drawn(batch, write, photo, tmp_path, line, words):
    write(GOOD, line, GOOD.replace("cat", "dog"))
    result = batch()
    assert (result.exit_code, result.stdout) == (1, "")
    assert "jobs.jsonl:2: " in result.stderr
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_all_bad_lines_are_named_at_once(batch, write):
    write('{"a": 1}', GOOD, "{", GOOD)
    said = batch().stderr
    assert all(f"jobs.jsonl:{line}: " in said for line in (1, 3, 4))
    assert "jobs.jsonl:2: " not in said
    write(*['{"a": 1}'] * 30)
    assert "and 10 more" in batch().stderr


def test_two_jobs_with_one_output_are_refused(batch, write, tmp_path):
    write({"prompt": "a", "out": "Cat.png"}, {"prompt": "b", "out": "cat.PNG"}, {"prompt": "c"}, {"prompt": "c"})
    said = batch().stderr
    assert "jobs.jsonl:2: writes cat.PNG, as line 1 does" in said
    assert "jobs.jsonl:4: writes " in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "has no jobs"), (b"\xff\xfe{", "cannot be read"), (None, "cannot be read")],
)
def test_a_file_without_jobs_is_refused(batch, tmp_path, content, words):
    if content is not None:
        (tmp_path / "jobs.jsonl").write_bytes(content)
    result = batch()
    assert result.exit_code == 1
    assert words in result.stderr


def test_a_job_without_a_model_is_refused(glassine, write):
    write(GOOD)
    assert 'has no "model"' in glassine("batch", "jobs.jsonl", "-o", "out").stderr


def test_a_picture_of_something_else_is_kept(batch, write, tmp_path):
    write({"prompt": "a", "out": "a.png"}, {"prompt": "b", "out": "b.png"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.png").write_bytes(b"mine")
    result = batch()
    assert (result.exit_code, result.stdout) == (1, "")
    assert "b.png: is there, and is not the picture of line 2" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]
    assert (tmp_path / "out" / "b.png").read_bytes() == b"mine"
    assert len(batch("--overwrite").stdout.split()) == 2
    before = stamps(tmp_path / "out")
    assert batch("--overwrite").stdout == ""  # what is done is not drawn again
    assert stamps(tmp_path / "out") == before


def test_a_job_that_fails_is_reported_and_the_others_are_drawn(batch, write, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    write({"prompt": "a"}, {"prompt": "b", "image": "broken.png"}, {"prompt": "c"})
    result = batch()
    assert result.exit_code == 1
    assert len(result.stdout.split()) == 2
    assert "2 of 3: jobs.jsonl:2: " in result.stderr
    assert "1 of 3 jobs failed; the same command tries them again" in result.stderr
    again = batch("--json")
    report = json.loads(again.stdout)
    assert again.exit_code == 1
    assert {job["line"]: job["state"] for job in report["jobs"]} == {1: "there", 2: "failed", 3: "there"}
    assert "broken.png" in next(job["error"] for job in report["jobs"] if job["line"] == 2)


def test_packages_are_loaded_once_a_model(batch, write, tiny_folder, tmp_path, monkeypatch):
    from glassine.runtime import pipeline

    opened = []
    real = pipeline.open_engine
    monkeypatch.setattr(pipeline, "open_engine", lambda path, options: opened.append(path) or real(path, options))
    (tmp_path / "other").symlink_to(tiny_folder)
    write(*({"seed": seed, "out": f"{seed}.png", **({"model": "other"} if seed % 2 else {})} for seed in range(6)))
    result = batch()
    # Those of one model together, although they take turns in the file.
    assert [name.split("/")[1] for name in result.stdout.split()] == [f"{seed}.png" for seed in (0, 2, 4, 1, 3, 5)]
    assert len(opened) == len(set(opened)) == 6  # text encoder, UNet and decoder of two models


def test_a_second_batch_waits_its_turn(batch, write, tmp_path):
    write(GOOD)
    (tmp_path / "out").mkdir()
    lock = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        assert "another batch writes there" in batch().stderr
    finally:
        os.close(lock)
    assert batch().exit_code == 0


def test_a_folder_that_cannot_be_written_ends_the_batch(batch, write, tmp_path, monkeypatch):
    from glassine.errors import RequestError
    from glassine.runtime import batch as module

    def full(*_, **__):
        raise RequestError("out/x.png: cannot be written (No space left on device)")

    monkeypatch.setattr(module, "save_png", full)
    write({"seed": 1}, {"seed": 2})
    result = batch()
    assert result.exit_code == 1
    assert "No space left" in result.stderr
    assert "failed" not in result.stderr


@pytest.mark.parametrize(("count", "kills"), [(20, 1), pytest.param(200, 20, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_complete_and_each_picture_is_drawn_once(
    batch, write, tiny_folder, tmp_path, count, kills
):
    write(*({"prompt": f"cat {seed}", "seed": seed, "out": f"{seed}.png"} for seed in range(count)))
    command = [sys.executable, "-m", "glassine", "batch", "jobs.jsonl", "--model", tiny_folder, "-o", "out"]
    chance, drawn = random.Random(7), dict[str, tuple[int, int]]()
    for _ in range(kills):
        child = subprocess.Popen(
            [str(word) for word in command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert child.stdout is not None
        for _ in range(chance.randint(1, count // (3 * kills))):
            child.stdout.readline()
        time.sleep(chance.uniform(0, 0.03))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL  # it had not finished
        child.stdout.close()
        after = stamps(tmp_path / "out")
        assert {name: after[name] for name in drawn} == drawn
        assert len(after) > len(drawn)
        drawn = after
    result = batch("--json")
    report = json.loads(result.stdout)
    assert (report["there"], report["drawn"]) == (len(drawn), count - len(drawn))
    assert report["drawn"] > 0
    after = stamps(tmp_path / "out")
    assert {name: after[name] for name in drawn} == drawn
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(f"{i}.png" for i in range(count))
    for job in read_jobs(tmp_path / "jobs.jsonl", tmp_path / "out", model=tiny_folder):
        with Image.open(job.out) as image:
            image.load()
            assert image.info[KEYWORD] == job.digest
