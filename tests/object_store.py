"""An S3 server on the loopback, with a proxy in front of it that fails, delays and breaks off answers when asked."""

from __future__ import annotations

import http.client
import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
BUCKET = "bucket"


class Faults:
    """Shares of requests that are answered with 503, late, or not to the end; and the requests seen so far."""

    def __init__(self) -> None:
        self.refused = self.slow = self.dropped = 0.0
        self.requests: list[tuple[str, str]] = []
        self._random = random.Random(0)

    def draw(self, share: float) -> bool:
        return self._random.random() < share


def _handler(server: tuple[str, int], faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def forward(self) -> None:
            faults.requests.append((self.command, self.path))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if faults.draw(faults.refused):
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if faults.draw(faults.slow):
                time.sleep(0.2)
            connection = http.client.HTTPConnection(*server)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            if faults.draw(faults.dropped):  # carried out, but the answer is lost
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            with suppress(ConnectionError):  # the client was killed
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, *args: Any) -> None:
            pass

    return Proxy


@contextmanager
def s3_server() -> Iterator[tuple[str, Faults]]:
    """Yields the endpoint of a server with one bucket, and its faults."""
    moto = pytest.importorskip("moto.server", reason="the S3 server of these tests is not installed")
    pytest.importorskip("obstore", reason="the extra remote is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address, faults = server.get_host_and_port(), Faults()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(address, faults))
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection(*address)
    connection.request(
        "PUT", f"/{BUCKET}", headers={"Authorization": "AWS4-HMAC-SHA256 Credential=test/x/us-east-1/s3/x"}
    )
    assert connection.getresponse().status == 200
    connection.close()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}", faults
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


def upload(local: Path, url: str) -> None:
    """Puts a file, or all files of a folder in place of what is there; the environment names the server."""
    import obstore
    from obstore.store import from_url

    key = url.removeprefix(f"s3://{BUCKET}/")
    store = from_url(f"s3://{BUCKET}", client_options={"allow_http": True})
    if local.is_file():
        obstore.put(store, key, local.read_bytes())
        return
    for page in obstore.list(store, key):
        for found in page:
            obstore.delete(store, found["path"])
    for file in local.rglob("*"):
        if file.is_file():
            obstore.put(store, f"{key}/{file.relative_to(local)}", file.read_bytes())
