"""A stand-in for the Hugging Face hub: one folder served as data set owner/name, by the addresses that its client asks.

Used as ``with Hub(folder) as hub``; ``hub.endpoint`` is for HF_ENDPOINT, ``hub.ranges`` the byte ranges that were read.
"""

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "1" * 40
ETAG = "2" * 40


class Hub:
    """The data set's files, none in a folder of its own, over HTTP with ranges, on a free port of this machine."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path for path in folder.iterdir()}
        self.ranges: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def listing(self) -> list[dict[str, Any]]:
        """What the hub says of each file."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return [{"type": "file", "path": n, "rfilename": n, "size": size, "oid": ETAG} for n, size in sizes.items()]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/datasets/owner/name/resolve/[^/]+/(.*)", path):
            return self._file(found[1])
        if re.fullmatch(r"/api/datasets/owner/name/tree/[^/]+", path):
            return self._answer(200, json.dumps(self.hub.listing()).encode())
        if re.fullmatch(r"/api/datasets/owner/name(/revision/[^/]+)?", path):
            about = {"id": "owner/name", "sha": COMMIT, "private": False, "downloads": 0, "tags": []}
            return self._answer(200, json.dumps(about | {"siblings": self.hub.listing()}).encode())
        self._answer(404)

    do_HEAD = do_GET

    def _file(self, name: str) -> None:
        if name not in self.hub.files:
            return self._answer(404)
        content, headers = self.hub.files[name].read_bytes(), {"etag": f'"{ETAG}"', "accept-ranges": "bytes"}
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if not asked:
            return self._answer(200, content, headers)
        self.hub.ranges.append((name, asked[0]))
        begin, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        self._answer(206, content[begin:end], headers | {"content-range": f"bytes {begin}-{end - 1}/{len(content)}"})

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        known = {"content-length": str(len(content)), "x-repo-commit": COMMIT}
        known |= {"x-error-code": "EntryNotFound"} if status == 404 else {}
        for key, value in (known | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the screen."""
