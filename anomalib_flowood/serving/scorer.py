# SPDX-License-Identifier: Apache-2.0
"""One thread that scores the images of all requests, those that wait together at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import fields
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

import numpy as np

from anomalib_flowood.inference.detector import Detector, ReadImage, Scores

Waiting = tuple[ReadImage, "Future[Scores]"]


class Scorer:
    """Scores images on a thread of its own, in the order in which they come.

    Those that have come while others were scored are scored together. Where that fails, each is scored alone, so that
    an image that has no score is an error of its own request.

    Args:
        detector: The detector; nothing else may use it meanwhile.
        window: Of how many of the last images drift is tested.
        observe: Called with how many images were scored at once.
    """

    def __init__(self, detector: Detector, window: int, observe: Callable[[int], object] = lambda _: None) -> None:
        self.detector = detector
        self.seconds_per_image = 0.0
        self._observe = observe
        self._queue: SimpleQueue[Waiting | None] = SimpleQueue()
        self._last: deque[float] = deque(maxlen=window)
        self._lock = Lock()
        self._thread = Thread(target=self._work, name="scorer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, image: ReadImage) -> Future[Scores]:
        """Let an image be scored that :meth:`Detector.read` gave, unless the future is cancelled before."""
        answer: Future[Scores] = Future()
        self._queue.put((image, answer))
        return answer

    def stop(self) -> None:
        """Score what was submitted, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it scores images."""
        return self._thread.is_alive()

    def drift(self) -> tuple[int, float | None]:
        """How many of the last images there are, and whether they, together, are like normal ones: their p-value.

        ``None`` where there are none, or the detector has no calibration.
        """
        with self._lock:
            last = np.array(self._last)
        if not len(last) or not len(self.detector.calibration):
            return len(last), None
        return len(last), self.detector.drift_p_value(last)

    def _work(self) -> None:
        ended = False
        while not ended:
            waiting, ended = self._next()
            wanted = [one for one in waiting if one[1].set_running_or_notify_cancel()]
            if wanted:
                start = time.perf_counter()
                self._score(wanted)
                seconds = (time.perf_counter() - start) / len(wanted)
                self.seconds_per_image += 0.1 * (seconds - self.seconds_per_image)

    def _next(self) -> tuple[list[Waiting], bool]:
        """Wait for an image, and take those that wait with it; say whether that is the end."""
        waiting: list[Waiting] = []
        while len(waiting) < self.detector.images_at_once:
            try:
                one = self._queue.get(block=not waiting)
            except Empty:
                break
            if one is None:
                return waiting, True
            waiting.append(one)
        return waiting, False

    def _score(self, waiting: Sequence[Waiting]) -> None:
        try:
            parts = list(self.detector.score_read([image for image, _ in waiting]))
        except Exception as error:  # whatever a runtime raises is said to the request, and the thread goes on
            if len(waiting) > 1:
                for one in waiting:
                    self._score([one])
            else:
                waiting[0][1].set_exception(error)
            return
        self._observe(len(waiting))
        scores = [_one(part, place) for part in parts for place in range(len(part))]
        with self._lock:
            self._last.extend(float(score.raw_score[0]) for score in scores)
        for (_, answer), score in zip(waiting, scores, strict=True):
            answer.set_result(score)


def _one(scores: Scores, place: int) -> Scores:
    """What is said of one of several images."""
    values = {field.name: getattr(scores, field.name) for field in fields(scores)}
    of_one: Any = {name: None if value is None else value[place : place + 1] for name, value in values.items()}
    return Scores(**of_one)
