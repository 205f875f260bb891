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
    pipeline: str | None,
    build: bool,
    data: Path | None,
) -> None:
    """Serve until a signal comes. `pipeline` answers at /ask (None: nothing does).

    Raises MissingExtra without FastAPI or uvicorn, and what `server.serve` and `asking.load_asker` raise.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtra("odqa serve", "fastapi and uvicorn", "serve") from error
    from odqa.recipes import Places
    from odqa.serve.asking import load_asker
    from odqa.serve.operations import log_as_json
    from odqa.serve.server import load_service, serve

    log_as_json()

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
    if pipeline is not None:
        places = Places.from_environment(data, None)
        service.asker = load_asker(pipeline, folder, limits, service.metrics, build=build, places=places)
    serve(service, host=host, port=port, grace=grace, open_to_all=open_to_all)
