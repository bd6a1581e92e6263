"""The one family of errors that a caller may see; imports nothing of ours.

    ServiceError
      InvalidInput                  the caller's to mend
        BadRequest                  bad_request
        UnsupportedFormat           unsupported_format
        UndecodableImage            image_decode_failed
        ImageTooLarge               image_too_large
        BadAspect                   image_bad_aspect
        BodyTooLarge                payload_too_large
        ReceiveTimeout              receive_timeout
        Unauthenticated             unauthenticated
        NotFound                    not_found
        MethodNotAllowed            method_not_allowed
      Refused                       try again later
        Overloaded                  overloaded
        NotReady                    not_ready
        Draining                    draining
        BackendUnavailable          backend_unavailable
      DeadlineExceeded              deadline_exceeded
      InferenceFailed               inference_failed

Codes are stable and the same on the wire; statuses stand in `http/errors.py` alone.
"""

from __future__ import annotations

import math
import random

DRAINING = "the service is stopping; send the request to another instance"


class ServiceError(Exception):
    """An error with a stable code and a sentence for the caller."""

    code = "internal_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidInput(ServiceError):
    """What was sent, or how, is the caller's to mend."""


class BadRequest(InvalidInput):
    """The request is not shaped as the route wants it."""

    code = "bad_request"


class UnsupportedFormat(InvalidInput):
    """The bytes are no image format that is read here."""

    code = "unsupported_format"


class UndecodableImage(InvalidInput):
    """The format is known, the image is damaged."""

    code = "image_decode_failed"


class ImageTooLarge(InvalidInput):
    """More pixels than the limit."""

    code = "image_too_large"


class BadAspect(InvalidInput):
    """Too long and thin to be resized sensibly."""

    code = "image_bad_aspect"


class BodyTooLarge(InvalidInput):
    """More bytes, or more images, than one request may carry."""

    code = "payload_too_large"


class ReceiveTimeout(InvalidInput):
    """The body did not arrive in time."""

    code = "receive_timeout"


class Unauthenticated(InvalidInput):
    """No API key, or one that is not known."""

    code = "unauthenticated"


class NotFound(InvalidInput):
    """No such route."""

    code = "not_found"


class MethodNotAllowed(InvalidInput):
    """The route exists, the method does not."""

    code = "method_not_allowed"


class Refused(ServiceError):
    """Not now; `retry_after_seconds` says when to try again."""

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Overloaded(Refused):
    """More waits already than can be answered in time."""

    code = "overloaded"


class NotReady(Refused):
    """The model is still loading."""

    code = "not_ready"


class Draining(Refused):
    """The service is going away."""

    code = "draining"


class BackendUnavailable(Refused):
    """What runs the network cannot be reached."""

    code = "backend_unavailable"


class DeadlineExceeded(ServiceError):
    """The caller's deadline passed first."""

    code = "deadline_exceeded"


class InferenceFailed(ServiceError):
    """The backend failed on this image; details are in the log."""

    code = "inference_failed"


class StartupError(Exception):
    """The service or a command cannot start; the message is one sentence that says what to do."""


def retry_after_seconds(excess_seconds: float) -> int:
    """Return when a refused caller should come back: whole seconds, drawn by lot.

    Evenly among the whole seconds from the excess to twice as much, and at least 1. Callers that
    were refused together would all come back together if told the same; the header carries whole
    seconds, so the lot is drawn among those and not before rounding.

    Args:
        excess_seconds: by which the predicted wait is too long.
    """
    least = max(math.ceil(excess_seconds), 1)
    return random.randint(least, 2 * least)


def first_line(error: Exception) -> str:
    """Return the first line of what a library said, or the error's class where it said nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
