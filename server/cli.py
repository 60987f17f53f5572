"""``collm serve``: read the configuration, take the port, run.

Exit status 2 is a wrong configuration, 1 that nothing can be served.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from server.settings import ConfigFileError, Settings

if TYPE_CHECKING:
    from server.engine_port import Engine
    from server.service import Service


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; returns the process's exit status."""
    try:
        settings = load_settings(sys.argv[1:] if argv is None else argv)
    except ConfigurationError as error:
        for line in error.lines:
            print_error(line)
        return 2
    _set_up_logging(settings.server.log_level, settings.server.log_format)
    try:
        # Before anything is loaded: minutes of loading are a long way to "address already in use".
        sock = bind(settings.server.host, settings.server.port)
    except OSError as error:
        print_error(
            f"server.host, server.port: {settings.server.host}:{settings.server.port}: {error.strerror or error}"
            + ("; --port takes another, 0 any that is free" if error.errno == errno.EADDRINUSE else "")
        )
        return 1
    with sock:
        return _serve(settings, sock)


class ConfigurationError(Exception):
    """The configuration is wrong.

    Attributes:
        lines: one for each problem.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


class _PlainHelp(argparse.RawDescriptionHelpFormatter):
    """Without the marks that docstrings put around code."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = super()._get_help_string(action)
        return None if text is None else text.replace("``", "")


def load_settings(argv: Sequence[str]) -> Settings:
    """Settings from the command line, the environment and the file that either names.

    Raises:
        ConfigurationError: with a line for each problem.
        SystemExit: after ``--help``.
    """
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            Settings, cli_parse_args=list(argv), formatter_class=_PlainHelp
        )
        settings = Settings(_cli_settings_source=source)
        # Read now, so that a wrong file is found before anything is started.
        _ = settings.server.all_keys
        return settings
    except ValidationError as error:
        raise ConfigurationError([_problem(problem) for problem in error.errors(include_url=False)]) from None
    except (SettingsError, ConfigFileError) as error:
        told = " ".join(str(error).split()).removeprefix("error parsing CLI: ")
        way_out = "; collm serve --help lists the options" if told.startswith("unrecognized arguments") else ""
        raise ConfigurationError([told + way_out]) from None


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: the address is in use or not assigned to this host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        # Listening makes the port ours: two sockets that are merely bound can share it.
        sock.listen(2048)
    except OSError:
        sock.close()
        raise
    return sock


def _serve(settings: Settings, sock: socket.socket) -> int:
    from server.service import Service
    from server.text.tokenizer import TextTokenizer, TokenizerError

    try:
        setting = "base.model" if settings.tokenizer is None else "tokenizer"
        tokenizer = TextTokenizer.load(settings.tokenizer_location, settings.server.tokenizer_threads, setting=setting)
        service = Service(settings, tokenizer)
    except TokenizerError as error:
        print_error(str(error))
        return 1
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_run(service, sock))
    except ConfigFileError as error:
        print_error(str(error))
        return 2
    finally:
        service.close()
        tokenizer.close()


async def _run(service: Service, sock: socket.socket) -> int:
    """Put the server together and run it; returns the process's exit status.

    Raises:
        ConfigFileError: a certificate cannot be used, or traces cannot be sent as configured.
    """
    from server.app import create_app
    from server.http_server import http_server
    from server.lifecycle import Lifecycle
    from server.trace.start import start_tracing

    config = service.settings.server
    traces = start_tracing(config, service.models)
    try:
        http = http_server(create_app(service, traces), config)
        lifecycle = Lifecycle(service, http, lambda: _start_engine(service), sock, print_status)
        status = await lifecycle.run()
        if lifecycle.failure is not None:
            print_error(lifecycle.failure)
        return status
    finally:
        if traces is not None:
            await traces.shutdown()


async def _start_engine(service: Service) -> Engine:
    from engine.client import EngineClient

    return await EngineClient.start(service.settings.engine, on_progress=lambda line: print_status(f"loading: {line}"))


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _problem(problem: Any) -> str:
    """``base.model: Field required``."""
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "there is no such option"
    location = ".".join(str(part) for part in problem["loc"])
    return " ".join((f"{location}: {message}" if location else message).split())


def _set_up_logging(level: str, form: str) -> None:
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if form == "json":
        from server.access import JsonFormatter

        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())


def print_status(line: str) -> None:
    """Print a line for the operator."""
    print(line, flush=True)


def print_error(line: str) -> None:
    """Print why the server does not start, or has ended."""
    print(f"error: {line}", file=sys.stderr, flush=True)
