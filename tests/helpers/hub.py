"""A server on this machine that answers as huggingface.co does."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_token_that_may_write"
NO_SERVER = "http://127.0.0.1:9"  # the port of "discard", on which nothing listens


class Hub:
    """A Hugging Face hub whose repositories are folders of `files`; lab/gated is gated, and commits need a token."""

    def __init__(self, files: Path) -> None:
        self.requests: list[str] = []
        self.private: dict[str, bool] = {}  # of repositories that were made by pushing
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing on the terminal."""

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path.partition('?')[0]}")
                parts = self.path.partition("?")[0].strip("/").split("/")
                is_api = parts[:2] == ["api", "models"]
                repository = "/".join(parts[2:4] if is_api else parts[:2])
                folder = files / repository
                revision = parts[5] if is_api and len(parts) > 5 else COMMIT
                if not folder.is_dir():
                    self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                elif repository == "lab/gated":
                    self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
                elif revision not in (COMMIT, "main"):
                    self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                elif is_api and len(parts) > 4 and parts[4] == "tree":
                    tree = [
                        {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                        for f in sorted(folder.iterdir())
                    ]
                    self._answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
                elif is_api:
                    siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                    about = {"id": repository, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                    self._answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
                else:
                    data = (folder / parts[-1]).read_bytes()
                    tag = hashlib.sha256(data).hexdigest()
                    self._answer(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

            def do_POST(self) -> None:
                """What pushing asks: make a repository, how to send each file, a commit of files in base64."""
                path = self.path.partition("?")[0]
                hub.requests.append(f"POST {path}")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self._answer(401, b'{"error": "Invalid username or password."}', {})
                elif path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked['organization']}/{asked['name']}"
                    hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"  # by version
                    (files / name).mkdir(parents=True, exist_ok=True)
                    self._json({"url": f"{hub.url}/{name}"})
                elif path == "/api/validate-yaml":
                    self._json({"errors": [], "warnings": []})
                elif "/preupload/" in path:
                    asked = [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in json.loads(body)["files"]
                    ]
                    self._json({"files": asked})
                elif "/commit/" in path:
                    repository = "/".join(path.strip("/").split("/")[2:4])
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            target = files / repository / line["value"]["path"]
                            target.write_bytes(base64.b64decode(line["value"]["content"]))
                    address = f"{hub.url}/{repository}/commit/{COMMIT}"
                    self._json({"commitUrl": address, "commitOid": COMMIT, "pullRequestUrl": None})
                else:
                    self._answer(404, b"{}", {})

            def _json(self, content: object) -> None:
                self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

            def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fetched(self) -> set[str]:
        """Files that were downloaded."""
        return {line.rpartition("/")[2] for line in self.requests if line.startswith("GET /lab/")}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def hub_environment(tmp_path: Path, endpoint: str) -> dict[str, str]:
    """For a process that asks the server at `endpoint`: HF_ENDPOINT is read on import."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
