# SPDX-License-Identifier: Apache-2.0
"""Files from the bodies of requests, whose size is counted as they arrive; nothing is opened by its name."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from http import HTTPStatus

import anyio
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from anomalib_flowood.look import shorten
from anomalib_flowood.serving.limits import Limits
from anomalib_flowood.serving.problems import Problem

_MOST_TEXTS = 8
_LONGEST_NAME = 255


@dataclass(frozen=True)
class File:
    """An image file that was sent.

    Attributes:
        name: What the sender calls it, for answers alone: no file is opened by it.
        content: Its bytes.
    """

    name: str
    content: bytes


async def read_files(request: Request, limits: Limits) -> list[File]:
    """Take the files out of a request: those of ``multipart/form-data``, or the one that the body itself is.

    Args:
        request: The request, of any content type: what is in a file is told by its content.
        limits: The body's largest size, its time, and the number of files.

    Raises:
        Problem: If there is none, a field is no file, or a limit is passed.
    """
    if request.headers.get("content-length", "").isdecimal():  # so that curl need not send it
        _check_size(int(request.headers["content-length"]), limits)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        with anyio.fail_after(limits.upload_timeout):
            if kind == "multipart/form-data":
                return await _multipart(request, limits)
            content = b"".join([chunk async for chunk in _counted(request, limits)])
    except TimeoutError as error:
        detail = f"The body did not arrive within {limits.upload_timeout:g} s. Send less at once."
        raise Problem(HTTPStatus.REQUEST_TIMEOUT, detail) from error
    except ClientDisconnect as error:
        raise Problem(HTTPStatus.BAD_REQUEST, "The connection was closed before the body had arrived.") from error
    if not content:
        raise Problem(HTTPStatus.BAD_REQUEST, f"The body is empty. {_HOW}")
    return [File("", content)]


_HOW = "Send the bytes of an image as the body, or images as files of multipart/form-data (curl -F file=@part.png)."


class _InMemory(MultiPartParser):
    """Keeps files, whose sum is bounded, off the disk."""

    spool_max_size = 0  # no bound of its own


async def _multipart(request: Request, limits: Limits) -> list[File]:
    parser = _InMemory(
        request.headers,
        _counted(request, limits),
        max_files=limits.max_files,
        max_fields=_MOST_TEXTS,
        max_part_size=1024,
    )
    try:
        form = await parser.parse()
    except FormParserError as error:  # which a later Starlette takes for the next one
        raise Problem(HTTPStatus.BAD_REQUEST, f"The form is damaged. {_HOW}") from error
    except MultiPartException as error:
        too_many = error.message.startswith("Too many")
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if too_many else HTTPStatus.BAD_REQUEST
        detail = f"{error.message} Send fewer at once." if too_many else f"{error.message} {_HOW}"
        raise Problem(status, detail) from error
    files, errors = [], []
    for place, (field, value) in enumerate(form.multi_items()):
        name = shorten(field, _LONGEST_NAME)
        if isinstance(value, UploadFile):
            files.append(File(shorten(value.filename or field, _LONGEST_NAME), await value.read()))
            if not files[-1].content:
                errors.append({"field": name, "file": files[-1].name, "index": place, "detail": "It is empty."})
        else:
            errors.append({"field": name, "index": place, "detail": "It is text, and no file."})
    await form.close()
    if errors:
        said = "; ".join(f"{error.get('file', error['field'])}: {error['detail']}" for error in errors)
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"{said} {_HOW}", errors)
    if not files:
        raise Problem(HTTPStatus.BAD_REQUEST, f"There is no file in the body. {_HOW}")
    return files


async def _counted(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    """The body, piece by piece, as long as it is not too large."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        _check_size(size, limits)
        yield chunk


def _check_size(size: int, limits: Limits) -> None:
    if size > limits.max_bytes:
        detail = (
            f"The body is larger than {limits.max_mib:g} MiB. Send fewer or smaller files at once, or start the server "
            "with a larger --max_mib."
        )
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
