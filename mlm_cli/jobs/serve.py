"""`mlm generate --serve`: from a request on the command line to a server, and its end."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_cli import log
from mlm_cli.errors import UsageError
from mlm_cli.generation.answer import Settings
from mlm_cli.generation.encoding import PromptEncoder
from mlm_cli.generation.provenance import Provenance
from mlm_cli.generation.service import Service

if TYPE_CHECKING:
    from mlm_cli.config.requests import GenerateRequest
    from mlm_cli.config.schema import ModelSection


class Web:
    """The port, taken before the weights are read, so that one in use is told at once.

    Raises:
        UsageError: packages are missing, or the port cannot be had.
    """

    def __init__(self, request: GenerateRequest) -> None:
        if request.output is not None:
            raise UsageError("`--serve` and `--output` exclude each other", hint="answers go to those who ask")
        try:
            from mlm_cli.generation import server
        except ImportError as error:
            raise UsageError(f"--serve needs the package `{error.name}`", hint="pip install 'mlm-cli[serve]'") from None
        self._server, self._request = server, request
        self._door = server.open_port(request.host, request.port)

    def serve(
        self,
        service: Service,
        encoder: PromptEncoder,
        settings: Settings,
        section: ModelSection,
        provenance: Provenance | None = None,
    ) -> None:
        """Answer until SIGINT or SIGTERM; a second one does not wait for what is under way."""
        request = self._request
        name = Path(request.model).name or request.model
        longest = request.max_new_tokens if section.family == "t5" else None
        asked = self._server.Asked(encoder, settings, section.vocab_size or 0, longest)
        served = self._server.Served(name, service, asked, provenance)
        signals: list[int] = []

        def end(number: int, _frame: Any) -> None:
            again = bool(signals)
            signals.append(number)
            log.info("ending" if again else "ending when the answers under way are done; once more ends at once")
            service.stop(at_once=again)

        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self._server.listening(self._server.build_app(served), self._door, service.stop):
                host, port = self._door.getsockname()[:2]
                address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                log.info(f"{name} answers POST http://{address}/v1/completions; Ctrl-C ends")
                if request.port == 0:  # else who started it knows
                    print(f"http://{address}", flush=True)
                service.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
