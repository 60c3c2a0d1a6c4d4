"""Sizes and lengths that clips are brought to, so that many have one shape."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Bucket:
    """Clips of one size, and of one length or of any."""

    height: int
    width: int
    frames: int | None = None

    def __str__(self) -> str:
        length = "" if self.frames is None else f"x{self.frames}"
        return f"{self.width}x{self.height}{length}"


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Buckets as typed: WIDTHxHEIGHT, or WIDTHxHEIGHTxFRAMES, separated by commas.

    Raises `ValueError` for what is none.
    """
    found = []
    for word in filter(None, text.replace(" ", ",").split(",")):
        parts = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,5}))?", word)
        if parts is None:
            raise ValueError(
                f"a bucket is WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, such as 512x320x49, got {word!r}"
            )
        found.append(Bucket(int(parts[2]), int(parts[1]), int(parts[3]) if parts[3] else None))
    if not found:
        raise ValueError("--buckets takes at least one size, such as 512x320,320x512")
    return tuple(dict.fromkeys(found))


def fitting(
    buckets: Sequence[Bucket], size: tuple[int, int], aspect: Fraction
) -> tuple[Bucket, ...]:
    """The buckets for a video of a (height, width) that is `aspect` times as wide as high.

    Those whose shape is nearest to its own, and of several sizes of that shape the largest that
    does not enlarge it, or the smallest. They differ in length only; the longest come first.
    """

    def rank(bucket: Bucket) -> tuple[float, bool, int]:
        apart = abs(math.log(Fraction(bucket.width, bucket.height) / aspect))
        enlarges = bucket.height > size[0] or bucket.width > size[1]
        area = bucket.height * bucket.width
        return round(apart, 9), enlarges, area if enlarges else -area

    best = min(buckets, key=rank)
    same = [b for b in buckets if (b.height, b.width) == (best.height, best.width)]
    return tuple(sorted(same, key=lambda b: -(b.frames or 0)))
