"""The plan of a causal video VAE's decode or encode: the rows of a strip.

Each row is computed once, however short the strips are. So shorter strips cost launches only, and
the preferences differ in how many: as few as keep the peak below their share of that of one strip.
"""

from __future__ import annotations

from functools import lru_cache

from ...prefer import Prefer
from ..plan import LEAST_STRIP_ELEMENTS, SHRINK, tried_again
from .peak import video_peak_bytes
from .sizes import VideoCall, VideoPlan

# Of the peak of the whole picture in one strip; `smallest` has room above the smallest peak.
SHARES = {"speed": 0.5, "balance": 0.25, "smallest": 0.0}
ROOM = 0.1
# Strips have a multiple of so many rows, as a row of the latent becomes so many.
UNIT_ROWS = 8


def video_plan(
    call: VideoCall, *, prefer: Prefer, strip_rows: int = 0, attempt: int = 0
) -> VideoPlan | None:
    """The plan for one sample.

    Args:
        prefer: time (speed), memory (smallest), or balance.
        strip_rows: rows of a strip at the picture's size; 0 chooses.
        attempt: how many larger plans ran out of memory before.

    Returns:
        None if there is nothing smaller to try.

    Raises:
        ValueError: prefer is not one of `PREFERENCES`, or strip_rows < 0.
    """
    tried = tried_again(prefer, strip_rows, attempt)
    if tried is None:
        return None
    prefer, shrinks = tried
    rows, patch = strip_rows or _rows(call, prefer), call.sizes.patch
    return VideoPlan(max(1, rows // SHRINK**shrinks // patch) * patch, prefer)


@lru_cache(256)
def _rows(call: VideoCall, prefer: Prefer) -> int:
    """Rows of the longest strips within the preference's peak, or the fewest that are sensible."""
    links, positions = call.sizes.links, call.width // call.sizes.patch**2  # per row of pixels
    # At the picture's size: of the last layer's input, or of the first one's output.
    channels = links[-1].given if call.sizes.is_decoder else links[0].made
    least = _even(min(call.height, LEAST_STRIP_ELEMENTS // (positions * channels)))
    whole, smallest = (video_peak_bytes(call, VideoPlan(n, prefer)) for n in (call.height, least))
    most = max(SHARES[prefer] * whole, (1 + ROOM) * smallest)
    parts = 1
    while True:
        rows = _even(-(-call.height // parts))
        if rows <= least or video_peak_bytes(call, VideoPlan(rows, prefer)) <= most:
            return max(rows, least)
        parts += 1


def _even(rows: int) -> int:
    return max(1, -(-rows // UNIT_ROWS)) * UNIT_ROWS
