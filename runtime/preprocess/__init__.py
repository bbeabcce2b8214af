"""From a picture to what a control net sees.

    picture -> resize.to_resolution -> lines, colour, texture ... -> resize.place -> hint

Import this inside the functions that need it: it imports OpenCV, which a picture without control does not need.
"""

from glassine.runtime.preprocess.catalogue import KINDS
from glassine.runtime.preprocess.hint import Hint, Preprocess, hint

__all__ = ["KINDS", "Hint", "Preprocess", "hint"]
