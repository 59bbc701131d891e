"""What a client is told when its request fails: OpenAI's error object with an HTTP status."""

from difflib import get_close_matches
from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A failure with the status and the one line that the client gets.

    Attributes:
        status: of HTTP.
        param: the field at fault.
        code: a word for programs.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message, param, code, retry_after)
        self.status, self.message, self.param = status, message, param
        self.code, self.retry_after = code, retry_after

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The error as the `openai` client reads it."""
        kind = TYPES.get(self.status, "server_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers that the response has."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def unknown_model(name: str, known: list[str]) -> ApiError:
    """No model of this name; says which names are near."""
    near = get_close_matches(name, known, 3, 0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ApiError(
        404,
        f"model: found {name!r}; allowed: {', '.join(known)}{hint}",
        "model",
        "model_not_found",
    )
