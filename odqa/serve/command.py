"""From the options of `odqa serve` to a running server; the web framework is loaded late, and its extra named."""

from pathlib import Path

from odqa.errors import MissingExtra
from odqa.serve.limits import Limits


def run_server(
    model: str,
    folder: Path,
    limits: Limits,
    *,
    host: str,
    port: int,
    name: str | None,
    chat_template: Path | None,
    device: str,
    dtype: str,
    threads: int | None,
    grace: float,
    open_to_all: bool,
    log_texts: bool,
) -> None:
    """Serve until a signal comes. Raises MissingExtra without FastAPI or uvicorn, and what `server.serve` raises."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtra("odqa serve", "fastapi and uvicorn", "serve") from error
    from odqa.serve.server import load_service, serve

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    service = load_service(
        model,
        folder,
        name=name,
        limits=limits,
        chat_template=chat_template,
        device=device,
        dtype=dtype,
        log_texts=log_texts,
    )
    serve(service, host=host, port=port, grace=grace, open_to_all=open_to_all)
