"""Body poses from macOS itself: Vision's VNDetectHumanBodyPoseRequest, without any download."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
from PIL import Image

from glassine.errors import EngineError, MissingDependency
from glassine.runtime.image import Bytes
from glassine.runtime.preprocess.pose import Person

# Vision's names of OpenPose's 18 points, in their order; its 19th, the root between the hips, has no place there.
_JOINTS = (
    "Nose", "Neck", "RightShoulder", "RightElbow", "RightWrist", "LeftShoulder", "LeftElbow", "LeftWrist",
    "RightHip", "RightKnee", "RightAnkle", "LeftHip", "LeftKnee", "LeftAnkle", "RightEye", "LeftEye", "RightEar",
    "LeftEar",
)  # fmt: skip


def find_people(pixels: Bytes, score: float) -> list[Person]:
    """Find the people in (H, W, 3) uint8 RGB; points whose confidence is below `score` are NaN.

    Raises:
        MissingDependency: this is not a Mac, or pyobjc's Vision is not installed.
        EngineError: Vision failed; the message holds its reason.
    """
    foundation, vision = _frameworks()
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, format="PNG")
    data = foundation.NSData.dataWithBytes_length_(png.getvalue(), len(png.getvalue()))
    handler = vision.VNImageRequestHandler.alloc().initWithData_options_(data, {})
    request = vision.VNDetectHumanBodyPoseRequest.alloc().init()
    done, error = handler.performRequests_error_([request], None)
    if not done:
        raise EngineError(f"pose: macOS's Vision failed ({error}); give keypoints as pose=FILE.json instead")
    return [_person(vision, observation, score) for observation in request.results() or ()]


def _person(vision: Any, observation: Any, score: float) -> Person:
    everything = vision.VNHumanBodyPoseObservationJointsGroupNameAll
    found, error = observation.recognizedPointsForJointsGroupName_error_(everything, None)
    if found is None:
        raise EngineError(f"pose: macOS's Vision gave no points ({error})")
    person = np.full((18, 2), np.nan)
    for row, joint in zip(person, _JOINTS, strict=True):
        point = found.get(getattr(vision, f"VNHumanBodyPoseObservationJointName{joint}"))
        if point is not None and point.confidence() >= max(score, 1e-6):
            row[:] = point.location().x, 1 - point.location().y  # Vision counts y from the bottom
    return person


def _frameworks() -> tuple[Any, Any]:
    if sys.platform != "darwin":
        raise MissingDependency(
            f"pose: people are found by macOS's Vision framework, and this is {sys.platform}; give their keypoints as "
            "pose=FILE.json (as OpenPose writes it), or a network with heat maps as pose=FILE.onnx"
        )
    try:
        import Foundation
        import Vision
    except ImportError:
        raise MissingDependency(
            "pose: macOS's Vision framework is reached through pyobjc, which is not installed; "
            "install it with: pip install 'glassine[pose]'"
        ) from None
    return Foundation, Vision
