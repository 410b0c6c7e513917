"""Answers other than success, in OpenAI's form."""

from starlette.responses import JSONResponse, Response


class RefusedError(Exception):
    """An answer other than success.

    Attributes:
        status: of HTTP.
        param: of the body, which is at fault.
        code: for programs.
        retry_after: seconds after which the same may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def content(self) -> dict:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.content, self.status, headers)
