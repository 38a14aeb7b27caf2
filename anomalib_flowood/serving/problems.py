# SPDX-License-Identifier: Apache-2.0
"""What is said of requests that are not answered: problem details, RFC 9457."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class Problem(Exception):  # noqa: N818 - RFC 9457's word
    """A request is not answered, for a reason that its sender can act on.

    Args:
        status: The status of the response.
        detail: What is wrong, and the remedy.
        errors: What is wrong with which file, field or parameter: each names it, and has a ``detail``.
        retry_after: After how many seconds the same request may succeed.
    """

    def __init__(
        self, status: HTTPStatus, detail: str, errors: Sequence[Mapping[str, Any]] = (), retry_after: int | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors
        self.retry_after = retry_after


def answer_problems(app: FastAPI) -> None:
    """Answer whatever goes wrong with problem details; what is no fault of the sender's is in the log alone."""

    async def problem(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Problem)
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return _response(error.status, error.detail, error.errors, headers)

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        detail = f"{request.method} {request.url.path}: {status.phrase}. /openapi.json lists what there is."
        return _response(status, detail, (), error.headers)

    async def of_parameters(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        errors = [{"parameter": str(one["loc"][-1]), "detail": one["msg"]} for one in error.errors()]
        detail = "; ".join(f"{one['parameter']}: {one['detail']}" for one in errors)
        return _response(HTTPStatus.UNPROCESSABLE_ENTITY, detail, errors)

    async def of_server(_: Request, __: Exception) -> JSONResponse:
        detail = "The server failed, which is no fault of the request; its log says more."
        return _response(HTTPStatus.INTERNAL_SERVER_ERROR, detail)

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_parameters)
    app.add_exception_handler(Exception, of_server)


def _response(
    status: HTTPStatus,
    detail: str,
    errors: Sequence[Mapping[str, Any]] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    content: dict[str, Any] = {"title": status.phrase, "status": int(status), "detail": detail}
    if errors:
        content["errors"] = errors
    return JSONResponse(content, int(status), headers, media_type="application/problem+json")
