"""Errors of the API, and the responses that report them."""

from starlette.responses import JSONResponse

from minitp.errors import shortened

TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}


class ApiError(Exception):
    """An error response, whose body is {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def object(self):
        """Return the error object of the API."""
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def without_path(error, llm, model):
    """Return an InputError's message with the name `model`: clients must not learn the path of the model."""
    path = str(llm.source.name)
    # A name without a slash may be a word of the message, such as "model".
    return str(error).replace(path, model) if "/" in path else str(error)


async def api_error(request, error):
    """Respond to an ApiError with its error object."""
    return JSONResponse(error.object(), error.status, headers=error.headers)


def route_error(routes):
    """Return the handler of Starlette's 404 and 405; a 404 lists the existing routes."""

    async def handler(request, error):
        detail = error.detail
        if error.status_code == 404:
            detail = f"minitp has no such route, only {', '.join(routes)}"
        message = f"{request.method} {shortened(request.url.path, 100)}: {detail}"
        body = ApiError(error.status_code, message).object()
        return JSONResponse(body, error.status_code, headers=error.headers)

    return handler


async def unexpected_error(request, error):
    """Respond to any other exception with 500; uvicorn logs the traceback."""
    return JSONResponse(ApiError(500, f"{type(error).__name__} in the server; see its log").object(), 500)
