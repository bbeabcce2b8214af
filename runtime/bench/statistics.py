"""What samples say: quartiles, whether a series can be trusted, and how sure a ratio of two medians is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIN_RUNS = 10
WHY_MIN_RUNS = (
    "from 10 runs on, the 97.5 % interval of a median leaves out the fastest and the slowest run, so that one "
    "accident cannot decide a comparison"
)
SPREAD = 0.10  # of the median: quartiles further apart than this are worth a warning
DRIFT = 0.05  # of the first half's median, by which the second half's may differ
_LEVEL = 0.975  # of each median's interval, so that both hold at once with 0.95


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio and the interval it lies in, with at least 95 % confidence."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out 1."""
        return not self.low <= 1.0 <= self.high


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile; the extremes of fewer than four samples."""
    if len(samples) < 4:
        return min(samples), max(samples)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def drift(samples: Sequence[float]) -> float:
    """How much slower the second half of a series was than the first, by their medians: 0.05 is 5 %."""
    half = len(samples) // 2
    return statistics.median(samples[-half:]) / statistics.median(samples[:half]) - 1 if half else 0.0


def warnings(samples: Sequence[float]) -> tuple[str, ...]:
    """What makes a series doubtful: quartiles more than 10 % apart, or halves that differ by more than 5 %."""
    (low, high), median, drifted = quartiles(samples), statistics.median(samples), drift(samples)
    said = []
    if (high - low) / median > SPREAD:
        said.append(f"the quartiles are {(high - low) / median:.0%} of the median apart")
    if abs(drifted) > DRIFT:
        said.append(f"the second half was {abs(drifted):.0%} {'slower' if drifted > 0 else 'faster'} than the first")
    return tuple(said)


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median of what is measured with at least 97.5 % confidence.

    It reaches from the k-th smallest to the k-th largest sample, where k is the largest with
    1 - 2 P(Binomial(n, 1/2) < k) >= 0.975: whatever the distribution is, the number of samples below its median is
    binomial (H. A. David, H. N. Nagaraja, Order Statistics, 3rd ed., 2003, section 7.1). Samples are taken to be
    independent, which a drift is not. Needs 10 samples for k = 2; of fewer than seven, no interval reaches the level,
    and the extremes are returned.
    """
    ordered, count = sorted(samples), len(samples)
    below, k = 0.0, 0
    while k < (count + 1) // 2:
        below += math.comb(count, k) / 2**count
        if 1 - 2 * below < _LEVEL:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[count - k]


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """median(ours) / median(theirs), with an interval that holds with at least 95 % confidence.

    Both medians lie in their 97.5 % intervals at once with at least 95 % (Bonferroni), and then their ratio lies
    between the lowest over the highest and the highest over the lowest. Wider than it need be, on purpose: it never
    makes more of two series than they say.
    """
    (low, high), (their_low, their_high) = median_interval(ours), median_interval(theirs)
    return Ratio(statistics.median(ours) / statistics.median(theirs), low / their_high, high / their_low)
