"""Code shared by the programs that listen on a port: command line, model loading, address, shutdown."""

from __future__ import annotations

import argparse
import importlib.util
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mvlm_core.command_line import CommandLine, device_problems
from mvlm_core.errors import UserError
from mvlm_core.export.file_checks import checked_exports
from mvlm_core.export.manifest import exports_in
from mvlm_core.hardware import choose_hardware, limit_decoding_threads, set_process_environment
from mvlm_core.run_layout import Layout
from mvlm_core.settings import REPOSITORY_ROOT

Models = dict[str, tuple[Any, Any]]  # name → (model, tokenizer)
GRACE = 2  # seconds for open requests to finish after a signal


def parser_of(description: str | None, port: int) -> argparse.ArgumentParser:
    """Argument parser with MODEL …, ``--host``, ``--port`` and ``--device``."""
    parser = CommandLine(description)
    add = parser.add_argument
    add("models", nargs="*", type=Path, metavar="MODEL", help="export folders or .tar.gz [default: all trained models]")
    add("--port", type=int, default=port, help=f"port to listen on; 0: any free port [default {port}]")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: reachable from the network [127.0.0.1]")
    add("--device", default="auto", help="auto, cpu or cuda [default auto]")
    return parser


def check(options: argparse.Namespace, packages: tuple[str, ...]) -> list[str]:
    """Default to all trained models; return the problems with the arguments, and with ``packages`` not installed."""
    layout = Layout(REPOSITORY_ROOT)
    problems = [] if 0 <= options.port < 65536 else [f"--port {options.port}: must be from 0 to 65535"]
    problems += device_problems(options.device)
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        install = ".venv/bin/python -m pip install -r requirements-extras.txt"
        problems.append(f"not installed: {', '.join(missing)}; install with: {install}")
    if not options.models:
        options.models = exports_in(layout.models) or sorted(layout.downloads.glob(layout.archive("*").name))
        if not options.models:
            problems.append(f"no model in {layout.models} or {layout.downloads}: train one first, or give a path")
    return problems


def by_name(folders: list[Path]) -> dict[str, Path]:
    """Export folders by folder name; duplicate names get a number."""
    named: dict[str, Path] = {}
    for folder in folders:
        name = base = folder.resolve().name
        for number in range(2, len(folders) + 1):
            name = name if name not in named else f"{base}-{number}"
        named[name] = folder
    return named


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        UserError: cannot listen there, with the reason.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; --port 0 takes any free port") from None


def address(listener: socket.socket) -> str:
    """URL of a listener; if it listens on all addresses, its loopback URL."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    options: argparse.Namespace,
    packages: tuple[str, ...],
    sources: Path,
    app_of: Callable[[Models, Path], Any],
    path: str = "",
    headers: Sequence[tuple[str, str]] = (),
) -> int:
    """Check the command line, load the models and serve an ASGI app until a signal, whose usual handler then runs.

    Args:
        packages: required by the app.
        sources: folder with the repository's own modeling files.
        app_of: creates the app from the models and the folder of the first one.
        path: appended to the printed address.
        headers: added to every response.
    """
    problems = check(options, packages)
    set_process_environment()
    with checked_exports(options.models, sources, problems) as folders:
        import uvicorn

        from mvlm_core.evaluation.bits_per_byte import load_export

        hardware = choose_hardware(device=options.device)
        hardware.apply()
        models = {name: load_export(folder, hardware.device) for name, folder in by_name(folders).items()}
        limit_decoding_threads(model for model, _ in models.values())
        with listen(options.host, options.port) as listener:
            app = app_of(models, folders[0])
            print(f"{' and '.join(models)} at {address(listener)}{path}; Ctrl-C stops it", flush=True)
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE, headers=[*headers])
            uvicorn.Server(config).run(sockets=[listener])
    return 0
