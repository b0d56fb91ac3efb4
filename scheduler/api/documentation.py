"""The documentation page at ``/docs``: Swagger UI out of a package, so that it works without a network.

The page and what it loads need no key; trying a request out does, and the browser remembers the one
that was given. The content security policy lets it talk to this service and to nobody else.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, RedirectResponse

DOCS = "/docs"
ASSETS = "/docs/assets"
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Crect width='16' height='16' rx='3' fill='%231f6f54'/%3E"
    "%3Cpath d='M4 4h8v8H4z' fill='none' stroke='%23fff' stroke-width='2'/%3E%3C/svg%3E"
)
_OPTIONS: dict[str, Any] = {
    "persistAuthorization": True,
    "displayRequestDuration": True,
    "defaultModelsExpandDepth": 0,
    "validatorUrl": None,  # by default a badge of swagger.io
}


def install_documentation(app: FastAPI) -> None:
    """Add the page, and lead ``/`` to it. ``app`` serves the package's files at ``ASSETS``."""
    # Relative to the page, so that it also works below a path of a reverse proxy.
    assets = ASSETS.removeprefix("/")
    page = bytes(
        get_swagger_ui_html(
            title=f"{app.title} API",
            openapi_url="openapi.json",
            swagger_js_url=f"{assets}/swagger-ui-bundle.js",
            swagger_css_url=f"{assets}/swagger-ui.css",
            swagger_favicon_url=_ICON,
            swagger_ui_parameters=_OPTIONS,
        ).body
    )
    headers = {"Content-Security-Policy": _policy(page.decode()), "Cache-Control": "no-cache"}

    def documentation() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    def to_documentation() -> RedirectResponse:
        return RedirectResponse(DOCS)

    app.add_api_route(DOCS, documentation, include_in_schema=False)
    app.add_api_route("/", to_documentation, include_in_schema=False)


def _policy(page: str) -> str:
    """Everything from here, and of inline scripts only the one that the page has."""
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' 'sha256-{digest}'",
            "style-src 'self' 'unsafe-inline'",  # Swagger UI styles its elements by attributes
            "img-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
