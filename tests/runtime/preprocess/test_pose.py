"""Body poses: the drawing by its definition, OpenPose's files, heat maps, and what macOS's Vision answers."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

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
