# SPDX-License-Identifier: Apache-2.0
"""The addresses of the server, and what they answer."""

from __future__ import annotations

import asyncio
import base64
import io
from functools import partial
from http import HTTPStatus
from typing import Annotated, Literal

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field

from anomalib_flowood import __version__
from anomalib_flowood.inference.detector import Detector, Scores
from anomalib_flowood.report.markup import render
from anomalib_flowood.serving.limits import Limits
from anomalib_flowood.serving.metrics import Measured, label_of
from anomalib_flowood.serving.problems import Problem, answer_problems
from anomalib_flowood.serving.service import Service


class ScoredImage(BaseModel):
    """What is said of an image."""

    file: str = Field(description="The name that it was sent with; empty of a raw body.")
    score: float | None = Field(
        description="In [0, 1], above 0.5 exactly where it is anomalous; the raw score without a calibration."
    )
    raw_score: float | None = Field(description="What the detector computes; null where it is infinite.")
    p_value: float | None = Field(description="Conformal p-value; null without a calibration.")
    label: Literal["normal", "anomalous"] | None = Field(
        description="At the detector's level; null without calibration."
    )
    anomaly_map: str | None = Field(None, description="As /map has it, in base64, where maps=true asks for it.")


class Answer(BaseModel):
    """What is said of the images of a request, in their order."""

    images: list[ScoredImage]


class Drift(BaseModel):
    """Whether the last images are like normal ones."""

    p_value: float | None = Field(description="Of the last images, together, being like normal ones; null without any.")
    images: int = Field(description="How many of them there are.")


_BYTES = {"schema": {"type": "string", "format": "binary"}}
_FILES = {
    "schema": {
        "type": "object",
        "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
    }
}
_BODY = {"requestBody": {"required": True, "content": {"image/*": _BYTES, "multipart/form-data": _FILES}}}


def create_app(detector: Detector, limits: Limits | None = None, drift_images: int = 100) -> FastAPI:
    """Put a detector behind HTTP.

    Args:
        detector: The detector; nothing else may use it meanwhile.
        limits: What requests may ask.
        drift_images: Of how many of the last images drift is tested.

    Returns:
        The app, with ``POST /score`` and ``/map``, ``GET /drift``, ``/metrics``, ``/health/live``, ``/health/ready``
        and a page at ``/``; docs/serve.md says what each answers. ``app.state.service`` does the work.
    """
    limits = limits or Limits()
    service = Service(detector, limits, drift_images)
    # No pages of FastAPI's: they fetch their scripts from elsewhere.
    app = FastAPI(
        title="flowood",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=service.running,
        openapi_url="/openapi.json",
    )
    app.state.service = service
    answer_problems(app)
    _add_scores(app, service)
    _add_state(app, service)
    page = render("serve.html", title="Normal or anomalous?", limits=limits)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> str:
        return page

    paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    app.add_middleware(Measured, metrics=service.metrics, paths=paths)
    return app


def _add_scores(app: FastAPI, service: Service) -> None:
    @app.post("/score", response_model=Answer, openapi_extra=_BODY)
    async def score(request: Request, maps: Annotated[bool, Query(description="With anomaly maps.")] = False) -> Answer:
        """Score images: one that is the body, or files of multipart/form-data."""
        files, scores = await service.answer(request)
        said = [partial(_said, file.name, one, maps=maps) for file, one in zip(files, scores, strict=True)]
        # Maps may be large, and take seconds to write.
        return Answer(images=[await asyncio.to_thread(one) if maps else one() for one in said])

    @app.post("/map", response_class=Response, responses={200: {"content": {"image/png": {}}}}, openapi_extra=_BODY)
    async def anomaly_map(request: Request) -> Response:
        """Draw the anomaly map of one image, in grey: 128 and more where pixels are anomalous."""
        _, (found,) = await service.answer(request, most=1)
        if found.anomaly_map is None:
            raise Problem(HTTPStatus.NOT_FOUND, "This detector judges whole images and draws no map: ask /score.")
        return Response(await asyncio.to_thread(_png, found.anomaly_map[0]), media_type="image/png")


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/drift", response_model=Drift)
    def drift() -> Drift:
        """Test whether the last images, together, are like normal ones."""
        images, p_value = service.scorer.drift()
        return Drift(p_value=p_value, images=images)

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Tell Prometheus."""
        return Response(service.metrics.text(service.scorer), media_type=CONTENT_TYPE_LATEST)

    # HEAD, too: balancers ask by it. The server leaves the body out.
    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "live"}

    @app.head("/health/ready", include_in_schema=False)
    @app.head("/health", include_in_schema=False)
    @app.get("/health/ready")
    @app.get("/health")
    async def ready() -> JSONResponse:
        """Say whether images are scored."""
        alive = service.scorer.alive
        return JSONResponse({"status": "ready" if alive else "failed"}, 200 if alive else 503)


def _said(name: str, score: Scores, *, maps: bool) -> ScoredImage:
    drawn = score.anomaly_map if maps else None
    return ScoredImage(
        file=name,
        score=_finite(score.score),
        raw_score=_finite(score.raw_score),
        p_value=None if score.p_value is None else float(score.p_value[0]),
        label=label_of(score),
        anomaly_map=None if drawn is None else base64.b64encode(_png(drawn[0])).decode(),
    )


def _finite(values: np.ndarray) -> float | None:
    """The one number; nothing where it is infinite, which JSON cannot express."""
    return float(values[0]) if np.isfinite(values[0]) else None


def _png(anomaly_map: np.ndarray) -> bytes:
    # In parts: of a large map there would be three copies as floats.
    parts = np.array_split(anomaly_map, max(1, len(anomaly_map) // 256))
    grey = np.concatenate([np.rint(np.clip(part, 0, 1) * 255).astype(np.uint8) for part in parts])
    content = io.BytesIO()
    Image.fromarray(grey).save(content, "PNG")
    return content.getvalue()
