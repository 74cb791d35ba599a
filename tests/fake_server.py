"""A server that speaks OpenAI's completions protocol as a test tells it to."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

# Status and what is sent with it; text goes as it is, None closes the connection without a word.
Reply = tuple[int, Any] | None


class FakeServer:
    """What a running server was asked, and where it is.

    Attributes:
        url: up to /v1.
        bodies: of all requests for completions, as they came.
        headers: of all requests.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []


@contextmanager
def fake_server(
    complete: Callable[[dict[str, Any]], Reply], models: Reply = (200, {"data": [{"id": "policy"}]})
) -> Iterator[FakeServer]:
    """Serve on a free port inside the block; `complete` answers requests, many of them at once."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found.headers.append(dict(self.headers))
            self._reply(models if self.path == "/v1/models" else (404, {"error": "no such page"}))

        def do_POST(self) -> None:
            found.headers.append(dict(self.headers))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.bodies.append(body)
            self._reply(
                complete(body) if self.path == "/v1/completions" else (404, {"error": "no such page"})
            )

        def _reply(self, reply: Reply) -> None:
            if reply is None:
                self.close_connection = True
                return
            status, value = reply
            data = (value if isinstance(value, str) else json.dumps(value)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: object) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    found = FakeServer(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text: str = "", ids: list[int] | None = None, reason: str = "stop", **usage: int) -> Reply:
    """A completion as servers send it."""
    told = {} if ids is None else {"token_ids": ids}
    return 200, {"choices": [{"index": 0, "text": text, "finish_reason": reason, **told}], "usage": usage}
