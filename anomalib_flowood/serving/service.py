# SPDX-License-Identifier: Apache-2.0
"""From the files of a request to what is said of them."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from http import HTTPStatus

import anyio
from starlette.requests import Request

from anomalib_flowood.data.decoding import UnreadableImageError, read_header
from anomalib_flowood.inference.detector import Detector, ReadImage, Scores
from anomalib_flowood.serving.bodies import File, read_files
from anomalib_flowood.serving.limits import Limits
from anomalib_flowood.serving.metrics import Metrics
from anomalib_flowood.serving.problems import Problem
from anomalib_flowood.serving.scorer import Scorer

_LARGE_AT_ONCE = 2
"""Photographs that a detector with tiles has in memory: one is scored while the next is read."""


class Service:
    """Accepts requests as long as there is room, reads their images in a few threads, and has them scored.

    Args:
        detector: The detector; nothing else may use it meanwhile.
        limits: What requests may ask.
        window: Of how many of the last images drift is tested.
    """

    def __init__(self, detector: Detector, limits: Limits, window: int) -> None:
        self.detector = detector
        self.limits = limits
        self.metrics = Metrics()
        self.scorer = Scorer(detector, window, self.metrics.together.observe)
        self._readers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "reader")
        self._waiting = 0
        self._room = asyncio.Semaphore(_LARGE_AT_ONCE) if detector.runtime.takes_bytes else None

    @asynccontextmanager
    async def running(self, _: object = None) -> AsyncIterator[None]:
        """Be ready for requests; at the end what was submitted is scored."""
        self.scorer.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.scorer.stop)
            self._readers.shutdown()

    async def answer(self, request: Request, *, most: int | None = None) -> tuple[list[File], list[Scores]]:
        """Score the images of a request.

        Args:
            request: The request.
            most: The most images, if it is fewer than the limit.

        Raises:
            Problem: If it cannot be answered.
        """
        taken = self._take(1)  # before its body is read
        try:
            files = await read_files(request, self.limits)
            most = 1 if self._room else most
            if most is not None and len(files) > most:
                detail = f"There are {len(files)} files where {most} is expected: send one in each request."
                raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
            taken += self._take(len(files) - 1)
            scores = await self._answer(files)
        finally:
            self._take(-taken)
        self.metrics.count(scores)
        return files, scores

    async def _answer(self, files: Sequence[File]) -> list[Scores]:
        """Read and score images, when there is room for large ones; the time for it is limited."""
        try:
            with anyio.fail_after(self.limits.answer_timeout):
                async with self._room or nullcontext():
                    return await self._score(files, await self._read(files))
        except TimeoutError as error:
            detail = (
                f"The images were not scored within {self.limits.answer_timeout:g} s: the server has too much to do."
            )
            raise Problem(HTTPStatus.GATEWAY_TIMEOUT, detail) from error

    def _take(self, places: int) -> int:
        """Take places in the queue, or give them back; all happens in the thread of the event loop."""
        if places > 0 and self._waiting + places > self.limits.queue:
            seconds = max(1, math.ceil(self._waiting * self.scorer.seconds_per_image))
            detail = f"{self._waiting} images wait, and there is no room for {places} more. Try again in {seconds} s."
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, retry_after=seconds)
        self._waiting += places
        self.metrics.waiting.set(self._waiting)
        return places

    async def _read(self, files: Sequence[File]) -> list[ReadImage]:
        """Read images; if one cannot be read, none of the request is scored."""
        loop = asyncio.get_running_loop()
        tasks = [loop.run_in_executor(self._readers, self._read_one, file) for file in files]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        images: list[ReadImage] = []
        problems: list[tuple[int, Exception]] = []
        for place, one in enumerate(found):
            if isinstance(one, UnreadableImageError | Problem):
                problems.append((place, one))
            elif isinstance(one, BaseException):
                raise one
            else:
                images.append(one)
        if problems:
            statuses = {one.status for _, one in problems if isinstance(one, Problem)}
            raise _of_files(files, problems, *statuses or {HTTPStatus.UNPROCESSABLE_ENTITY})
        return images

    def _read_one(self, file: File) -> ReadImage:
        height, width, _ = read_header(file.content)
        if height * width > self.limits.max_megapixels * 1e6:
            detail = (
                f"It has {width} × {height} pixels, and up to {self.limits.max_megapixels:g} million can be read: make "
                "it smaller, or start the server with a larger --max_megapixels."
            )
            raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
        return next(iter(self.detector.read(file.content)))

    async def _score(self, files: Sequence[File], images: Sequence[ReadImage]) -> list[Scores]:
        answers = [asyncio.wrap_future(self.scorer.submit(image)) for image in images]
        found = await asyncio.gather(*answers, return_exceptions=True)  # on time-out all are cancelled
        problems = [(place, one) for place, one in enumerate(found) if isinstance(one, ValueError)]
        if problems:
            raise _of_files(files, problems, HTTPStatus.UNPROCESSABLE_ENTITY)
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return [one for one in found if isinstance(one, Scores)]


def _of_files(files: Sequence[File], problems: Sequence[tuple[int, Exception]], *statuses: HTTPStatus) -> Problem:
    """One problem of several files', each named."""
    errors = [{"file": files[place].name, "index": place, "detail": str(error)} for place, error in problems]
    said = "; ".join(
        f"{error['file']}: {error['detail']}" if error["file"] else str(error["detail"]) for error in errors
    )
    none = " No image of this request was scored." if len(files) > 1 else ""
    return Problem(statuses[0], f"{said.rstrip('.')}.{none}", errors)
