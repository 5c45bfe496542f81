"""The server: REST and pages in one ASGI application, served by uvicorn."""

from __future__ import annotations

import errno
import socket

import uvicorn
from fastapi import FastAPI

from nullspace.guarded import StartFailed

PORT = 8600
GRACE_SECONDS = 5  # live streams are cut then; their clients reconnect elsewhere


def create_app() -> FastAPI:
    """The application, with the settings of the process's environment."""
    # here, so that the command line starts without them
    import api.app
    import web.app

    app = api.app.create_app()
    web.app.add_pages(app)
    return app


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is told before anything else starts.

    Raises StartFailed with the mend.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            text = (
                f"port {port} on {host} is in use: choose another with --port, or end what uses it"
            )
        elif error.errno in (errno.EACCES, errno.EPERM):
            text = f"port {port} may not be used by this user: choose one above 1023 with --port"
        else:
            text = f"{host}:{port} cannot be used: {error.strerror or error}"
        raise StartFailed(text) from error
    except OverflowError as error:
        bound.close()
        raise StartFailed(f"{port} is not a port: choose 1 to 65535 with --port") from error
    bound.set_inheritable(True)
    return bound


def free_port(host: str, first: int, tries: int = 100) -> int:
    """The first port from `first` on that can be bound. Raises StartFailed."""
    for port in range(first, min(first + tries, 65536)):
        try:
            listen(host, port).close()
            return port
        except StartFailed:
            continue
    text = f"ports {first} to {first + tries - 1} are all in use: choose one with --port"
    raise StartFailed(text)


def serve(host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartFailed when the port cannot be had."""
    bound = listen(host, port)
    config = uvicorn.Config(
        create_app,
        factory=True,
        log_level="info",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
    )
    uvicorn.Server(config).run(sockets=[bound])
