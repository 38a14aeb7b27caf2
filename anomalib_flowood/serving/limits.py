# SPDX-License-Identifier: Apache-2.0
"""What requests may ask of a server."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """What requests may ask of a server.

    Args:
        max_mib: The largest body of a request, in MiB.
        max_megapixels: The largest image, in millions of pixels. While it is read it takes some 8 bytes a pixel.
        max_files: The most images in one request.
        queue: The most images that are read, wait or are scored; a request for more is answered with status 503.
        upload_timeout: Seconds in which the body of a request has to arrive.
        answer_timeout: Seconds in which its images have to be scored.

    Raises:
        ValueError: If one is not positive, or a request of `max_files` could never be accepted.
    """

    max_mib: float = 32
    max_megapixels: float = 50
    max_files: int = 32
    queue: int = 64
    upload_timeout: float = 30
    answer_timeout: float = 60

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                msg = f"{field.name} must be positive and finite, got {value}."
                raise ValueError(msg)
        if self.max_files > self.queue:
            msg = (
                f"max_files={self.max_files} exceeds queue={self.queue}, so that such requests could never be "
                "accepted: lower the one or raise the other."
            )
            raise ValueError(msg)

    @property
    def max_bytes(self) -> int:
        """The largest body of a request, in bytes."""
        return int(self.max_mib * 2**20)
