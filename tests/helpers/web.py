"""A web server on this machine that sends parts of files, as object stores do, or only whole ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class _Parts(SimpleHTTPRequestHandler):
    """Understands `Range: bytes=a-b`."""

    ranges = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range", "") if self.ranges else ""
        if not wanted or not path.is_file():
            return super().do_GET()
        size = path.stat().st_size
        first, last = wanted.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last or size - 1) + 1, size)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(start)
            self.wfile.write(file.read(stop - start))

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        super().end_headers()


class _Whole(_Parts):
    ranges = False


@contextmanager
def serve(folder: Path, *, ranges: bool = True) -> Iterator[str]:
    """Serve a folder; gives its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Parts if ranges else _Whole, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
