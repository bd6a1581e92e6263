"""A request's body -> the image files in it, whichever of the three forms it has.

any other content type   the body is one image file
multipart/form-data      one or more files in parts named `image`
application/json         {"image": "<base64 or data: URI>"} or {"images": [...]}
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import orjson
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from app.errors import BadRequest, BodyTooLarge
from app.http.hot import ImageRequest
from app.http.pool import CpuPool

Item = bytes | BadRequest
"""An image file, or why there is none where one was announced."""

_DATA_URI = re.compile(r"data:[^,]*?(;base64)?,", re.IGNORECASE)
_WHITESPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Inputs:
    """The images of a request.

    Attributes:
        items: in the order sent.
        several: answer with a list of results, even when it holds one.
    """

    items: list[Item]
    several: bool


# Media type and parameters before the comma of a data: URI.
MAX_DATA_URI_HEAD = 200
# Larger JSON is parsed in a thread: it would hold up the loop for a millisecond or more.
LARGE_JSON_BYTES = 100_000


async def read_inputs(request: ImageRequest, pool: CpuPool) -> Inputs:
    """Read the body.

    Args:
        request: whose body nobody has read.
        pool: for large JSON.

    Raises:
        BadRequest: no image in it, or not shaped as its content type says.
        BodyTooLarge: more bytes, or more images, than the settings allow.
        ReceiveTimeout: it did not arrive in time.
        Overloaded: large JSON would wait too long for a thread.
        DeadlineExceeded: it did, or the body came too late.
    """
    settings = request.state.settings
    content_type = request.context.header(b"content-type").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        whole = Request(request.scope, request.receive)
        inputs = await _read_multipart(whole, settings.body_limit_bytes, settings.max_images)
    elif content_type == "application/json" or content_type.endswith("+json"):
        body = await _read_body(request.receive)
        if len(body) > LARGE_JSON_BYTES:
            deadline = request.context.deadline
            inputs = await pool.run_admitted(deadline, _read_json, body, settings.max_images)
        else:
            inputs = _read_json(body, settings.max_images)
    else:
        inputs = Inputs([await _read_body(request.receive)], several=False)
    if inputs.items == [b""]:
        raise BadRequest("the body is empty; send an image file in it")
    return inputs


async def _read_body(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _read_multipart(request: Request, body_limit: int, max_images: int) -> Inputs:
    try:
        form = await _MultipartParser(request, body_limit, max_images).parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise _too_many(max_images) from error
        raise BadRequest(f"the multipart body cannot be read: {error.message}") from error
    except (ValueError, LookupError) as error:  # the library's, at hostile boundaries and charsets
        raise BadRequest("the multipart body cannot be read; check its boundary") from error
    items = [await _read_part(part) for part in form.getlist("image")]
    await form.close()
    if not items:
        names = ", ".join(sorted(set(form.keys()))) or "none"
        raise BadRequest(f"no part is named image (found: {names[:200]}); name it so")
    return Inputs(items, several=len(items) > 1)


class _MultipartParser(MultiPartParser):
    """Refuses a body that is cut short, whose last image would else be missing in silence.

    Files stay in memory: the body is bounded already, and a disk may be full or read-only.
    """

    def __init__(self, request: Request, body_limit: int, max_images: int) -> None:
        super().__init__(request.headers, self._chunks(request), max_files=max_images)
        self.spool_max_size = body_limit + 1
        self._ended = False

    def on_end(self) -> None:
        self._ended = True

    async def _chunks(self, request: Request) -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            yield chunk
        if not self._ended:
            raise MultiPartException("it ends before its closing boundary")


async def _read_part(part: UploadFile | str) -> Item:
    if isinstance(part, str):
        return BadRequest("a part named image is text; send it as a file, with a filename")
    data = await part.read()
    return data or BadRequest("a part named image is empty; send an image file in it")


def _read_json(body: bytes, max_images: int) -> Inputs:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is no JSON: {error}") from error
    shape = 'send {"image": "<base64 or data: URI>"} or {"images": [...]}'
    if not isinstance(content, dict) or len(content) != 1:
        raise BadRequest(f"the JSON body is not what this route takes; {shape}")
    if "image" in content:
        item = decode_base64(content["image"])
        if isinstance(item, BadRequest):
            raise item
        return Inputs([item], several=False)
    images = content.get("images")
    if not isinstance(images, list) or not images:
        raise BadRequest(f"the JSON body holds no list of images; {shape}")
    if len(images) > max_images:  # before anything is made of each
        raise _too_many(max_images)
    return Inputs([decode_base64(image) for image in images], several=True)


def decode_base64(text: object) -> Item:
    """Return the bytes behind a base64 text or data: URI, or why there are none."""
    if not isinstance(text, str):
        return BadRequest("an image in JSON is a text: base64, or a data: URI")
    if text[:5].lower() == "data:":
        head = _DATA_URI.match(text[:MAX_DATA_URI_HEAD])
        if head is None or head[1] is None:
            return BadRequest("a data: URI must be base64: data:image/png;base64,...")
        text = text[head.end() :]
    elif text[:8].lower().startswith(("http://", "https://")):
        return BadRequest("URLs are not fetched; send the image itself, as base64")
    try:
        data = base64.b64decode(_WHITESPACE.sub("", text), validate=True)
    except (binascii.Error, ValueError):
        return BadRequest("an image in JSON is no valid base64")
    return data or BadRequest("an image in JSON is empty")


def _too_many(max_images: int) -> BodyTooLarge:
    return BodyTooLarge(f"more than {max_images} images in one request; send fewer")
