"""Body poses: the drawing by its definition, OpenPose's files, heat maps, and what macOS's Vision answers."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from glassine.errors import EngineError, MissingDependency, RequestError
from glassine.runtime.preprocess import Preprocess, hint
from glassine.runtime.preprocess import pose as poses
from glassine.runtime.preprocess.vision import find_people

# The definition: (first, second) points, counted from 1, and the colours of limbs and joints.
LIMBS = "2-3 2-6 3-4 4-5 6-7 7-8 2-9 9-10 10-11 2-12 12-13 13-14 2-1 1-15 15-17 1-16 16-18"
COLOURS = """255,0,0 255,85,0 255,170,0 255,255,0 170,255,0 85,255,0 0,255,0 0,255,85 0,255,170 0,255,255 0,170,255
0,85,255 0,0,255 85,0,255 170,0,255 255,0,255 255,0,170 255,0,85"""
WIDTH, HEIGHT = 192, 256


@pytest.fixture
def person():
    """Someone standing, facing us: pixels of WIDTH x HEIGHT."""
    return np.array(
        [
            (96, 40), (96, 66), (70, 68), (55, 100), (50, 132), (122, 66), (140, 96), (150, 124), (80, 136), (78, 184),
            (76, 232), (112, 136), (116, 184), (118, 230), (90, 34), (102, 34), (82, 38), (110, 38),
        ],
        np.float64,
    )  # fmt: skip


@pytest.fixture
def write(tmp_path, person):
    """Write an OpenPose file of `person` (with scores) and return its path."""

    def write(points=person, scores=None, **more):
        rows = np.column_stack([points, np.ones(len(points)) if scores is None else scores])
        content = {"people": [{"pose_keypoints_2d": rows.ravel().tolist()}], **more}
        (tmp_path / "pose.json").write_text(json.dumps(content))
        return tmp_path / "pose.json"

    return write


def exact(points):
    """(inside limbs, inside joints): for each pixel centre, per limb and joint, its distance over the radius."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    limbs = []
    for limb in LIMBS.split():
        a, b = (points[int(number) - 1] for number in limb.split("-"))
        middle, along = np.trunc((a + b) / 2), a - b
        length, turn = np.hypot(*along), np.radians(int(np.degrees(np.arctan2(along[1], along[0]))))
        u = (x - middle[0]) * np.cos(turn) + (y - middle[1]) * np.sin(turn)
        v = -(x - middle[0]) * np.sin(turn) + (y - middle[1]) * np.cos(turn)
        limbs.append(np.hypot(u / int(length / 2), v / 4))
    joints = [np.hypot(x - int(p[0]), y - int(p[1])) / 4 for p in points]
    return np.array(limbs), np.array(joints)


def colours():
    return np.array([[int(v) for v in word.split(",")] for word in COLOURS.split()])


def test_the_drawing_is_ellipses_under_discs(person):
    drawn = poses.draw([person / (WIDTH, HEIGHT)], (WIDTH, HEIGHT))
    limbs, joints = exact(person)
    expected = np.zeros((HEIGHT, WIDTH, 3), int)
    for inside, colour in zip(limbs, colours(), strict=False):
        expected[inside <= 1] = (colour * 0.6).astype(int)
    for inside, colour in zip(joints, colours(), strict=True):
        expected[inside <= 1] = colour
    # OpenCV rounds an ellipse's outline to pixels, so its border is what it likes; everything else is exact.
    border = (np.abs(limbs - 1) < 0.3).any(axis=0) | (np.abs(joints - 1) < 0.15).any(axis=0)
    assert border.mean() < 0.1
    assert np.array_equal(drawn[~border], expected[~border])
    assert ((drawn != expected).any(axis=-1) & border).sum() < 0.5 * border.sum()
    allowed = (*colours(), *(colours() * 0.6).astype(int), (0, 0, 0))
    assert {tuple(c) for c in drawn.reshape(-1, 3)} <= {tuple(c) for c in allowed}


def test_points_not_seen_take_their_limbs_with_them(person):
    person[3] = np.nan  # the right elbow, so also the upper and lower arm
    drawn = poses.draw([person / (WIDTH, HEIGHT)], (WIDTH, HEIGHT))
    there = {tuple(int(v) for v in c) for c in drawn.reshape(-1, 3)}
    gone = {tuple(colours()[3]), tuple((colours()[2] * 0.6).astype(int)), tuple((colours()[3] * 0.6).astype(int))}
    assert not gone & there
    assert tuple(colours()[4]) in there


def test_people_are_drawn_one_over_the_other(person):
    first, second = person / (WIDTH, HEIGHT), (person + np.array((8, 0))) / (WIDTH, HEIGHT)
    alone = [poses.draw([someone], (WIDTH, HEIGHT)) for someone in (first, second)]
    both = poses.draw([first, second], (WIDTH, HEIGHT))
    assert np.array_equal(both, np.where(alone[1].any(axis=-1, keepdims=True), alone[1], alone[0]))


def test_openpose_files_are_pixels_of_the_picture_or_of_their_canvas(write, person):
    expected = person / (WIDTH, HEIGHT)
    assert np.allclose(poses.read_people(write(), (WIDTH, HEIGHT))[0], expected)
    assert np.allclose(poses.read_people(write(canvas_width=WIDTH, canvas_height=HEIGHT), (999, 999))[0], expected)
    assert np.allclose(poses.read_people(write(expected), (999, 999))[0], expected)


def test_body_25_is_the_same_18_points(write, person):
    wide = np.zeros((25, 2))
    wide[:8], wide[9:19] = person[:8], person[8:]
    wide[8] = (96, 136)  # between the hips: no point of ours
    assert np.allclose(poses.read_people(write(wide), (WIDTH, HEIGHT))[0], person / (WIDTH, HEIGHT))


def test_unsure_points_are_left_out(write):
    scores = np.linspace(0, 1, 18)
    (person,) = poses.read_people(write(scores=scores), (WIDTH, HEIGHT), 0.5)
    assert np.array_equal(np.isnan(person[:, 0]), scores < 0.5)
    (person,) = poses.read_people(write(scores=scores), (WIDTH, HEIGHT), 0)
    assert np.array_equal(np.isnan(person[:, 0]), scores == 0)  # score 0 is OpenPose's "not found", at (0, 0)


def test_a_hint_from_a_file(write, person):
    made = hint(np.zeros((HEIGHT, WIDTH, 3), np.uint8), (WIDTH, HEIGHT), Preprocess.read(f"pose={write()}"))
    assert np.array_equal(made.pixels, poses.draw([person / (WIDTH, HEIGHT)], (WIDTH, HEIGHT)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "cannot be read as JSON"),
        ("[1, 2]", "is no OpenPose file"),
        ('{"people": 3}', "is no OpenPose file"),
        ('{"person": []}', "is no OpenPose file"),
        ('{"people": [{"pose_keypoints_2d": [1, 2]}]}', "is no OpenPose file"),
        ('{"people": [{"pose_keypoints_2d": [1, 2, 3]}]}', "1 points"),
        ('{"people": [{"pose_keypoints_2d": ["a", "b", "c"]}]}', "is no OpenPose file"),
        ('{"people": [], "canvas_width": 0, "canvas_height": 4}', "nobody was found"),
        ('{"people": [{"pose_keypoints_2d": null}]}', "nobody was found"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "pose.json").write_text(text)
    with pytest.raises(RequestError, match=message):
        hint(np.zeros((64, 64, 3), np.uint8), (64, 64), Preprocess.read(f"pose={tmp_path / 'pose.json'}"))


def test_heat_maps_of_17_and_18_points(person):
    coco = person[[0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10]]  # COCO's order, left before right
    for points in (coco, person):
        heat = np.zeros((len(points), HEIGHT, WIDTH), np.float32)
        heat[np.arange(len(points)), points[:, 1].astype(int), points[:, 0].astype(int)] = 0.9
        found = poses._from_heat(heat, 0.3, "net") * (WIDTH, HEIGHT) - 0.5
        if len(points) == 17:
            assert np.allclose(found[1], (person[2] + person[5]) / 2)
            found[1] = person[1]
        assert np.allclose(found, person)
    assert np.isnan(poses._from_heat(heat, 0.95, "net")).all()
    with pytest.raises(EngineError, match="5 channels, expected a heat map a point"):
        poses._from_heat(heat[:5], 0.3, "net")


def test_without_a_mac_it_says_what_to_do(photograph, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(MissingDependency, match=r"macOS's Vision .* this is linux; give their keypoints as pose=FILE"):
        hint(photograph, (64, 64), Preprocess(name="pose"))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "Foundation", None)
    with pytest.raises(MissingDependency, match=r"pip install 'glassine\[pose\]'"):
        hint(photograph, (64, 64), Preprocess(name="pose"))


def test_what_vision_answers_is_turned_upright(person, monkeypatch):
    """Vision's Python names, as pyobjc gives them: points by joint, y from the bottom, a confidence each."""
    sides = [f"{side}{part}" for side in ("Right", "Left") for part in ("Shoulder", "Elbow", "Wrist")]
    sides += [f"{side}{part}" for side in ("Right", "Left") for part in ("Hip", "Knee", "Ankle")]
    joints = ["Nose", "Neck", *sides, "RightEye", "LeftEye", "RightEar", "LeftEar"]
    points = {}
    for index, (name, (x, y)) in enumerate(zip(joints, person / (WIDTH, HEIGHT), strict=True)):
        place, sure = SimpleNamespace(x=x, y=1 - y), 0.1 if index == 4 else 0.9
        points[f"key {name}"] = SimpleNamespace(location=lambda p=place: p, confidence=lambda c=sure: c)
    points["key Root"] = points["key Nose"]
    seen = SimpleNamespace(recognizedPointsForJointsGroupName_error_=lambda group, error: (points, None))
    request = SimpleNamespace(results=lambda: [seen])
    handler = SimpleNamespace(performRequests_error_=lambda requests, error: (requests == [request], "refused"))

    def allocated(instance, method):
        return SimpleNamespace(alloc=lambda: SimpleNamespace(**{method: lambda *arguments: instance}))

    vision = SimpleNamespace(
        VNImageRequestHandler=allocated(handler, "initWithData_options_"),
        VNDetectHumanBodyPoseRequest=allocated(request, "init"),
        VNHumanBodyPoseObservationJointsGroupNameAll="all",
        **{f"VNHumanBodyPoseObservationJointName{name}": f"key {name}" for name in joints},
    )
    data = SimpleNamespace(dataWithBytes_length_=lambda content, length: content[:length])
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "Vision", vision)
    monkeypatch.setitem(sys.modules, "Foundation", SimpleNamespace(NSData=data))
    (found,) = find_people(np.zeros((HEIGHT, WIDTH, 3), np.uint8), 0.3)
    assert np.isnan(found[4]).all()
    rest = np.arange(18) != 4
    assert np.allclose(found[rest] * (WIDTH, HEIGHT), person[rest])
