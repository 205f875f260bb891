"""The page at /: plain HTML, a style sheet (the report's, and what it adds) and one script, from the package.

Nothing is loaded from elsewhere. The page itself is for everybody and holds nothing; what it shows comes from /ask,
which asks for a key where there are keys. The invariant: whatever came from a collection or a model is text. The script
makes text nodes only, and the page's policy lets no other script run, nothing load, and no markup be made of strings.
"""

from functools import lru_cache
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

router = APIRouter(include_in_schema=False)

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",  # the empty icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    """The page."""
    return _file("text/html", "odqa.serve/page.html")


@router.get("/page.css")
async def style() -> Response:
    """Its look."""
    return _file("text/css", "odqa.report/page.css", "odqa.serve/page.css")


@router.get("/page.js")
async def script() -> Response:
    """What it does."""
    return _file("text/javascript", "odqa.serve/page.js")


@lru_cache
def _file(kind: str, *names: str) -> Response:
    """Files of the package, one after the other: PACKAGE/NAME."""
    texts = []
    for name in names:
        package, _, file = name.partition("/")
        texts.append(resources.files(package).joinpath(file).read_text(encoding="utf-8"))
    return Response("\n".join(texts), media_type=f"{kind}; charset=utf-8", headers=_HEADERS)
