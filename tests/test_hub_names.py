"""A saved model by its name on the hub: from a small server here that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from saved_models import packed_model, saved_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import sys, torch, sparsec
with torch.no_grad():
    torch.save(sparsec.load("you/model")(torch.arange(14).view(2, 7))[0], sys.argv[1])
sparsec.load("you/other")
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Its address; it holds you/model."""
    folder = saved_model("csr16", tmp_path / "repository")

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, whole: bool) -> None:
            path, body, told = self.path.partition("?")[0], b"", {}
            names = sorted(p.name for p in folder.iterdir())
            if path.startswith("/api/models/you/model/tree/"):
                body = json.dumps(
                    [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": n} for n in names]
                ).encode()
            elif path.startswith("/api/models/you/model"):
                files = [{"rfilename": n} for n in names]
                body = json.dumps({"id": "you/model", "sha": COMMIT, "siblings": files}).encode()
            elif path.startswith("/you/model/resolve/") and (name := path.split("/", 5)[5]) in names:
                body = (folder / name).read_bytes()
                told = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            elif path != "/":
                self.send_response(404)
                told = {"X-Error-Code": "EntryNotFound" if path.startswith("/you/model/") else "RepoNotFound"}
            if "X-Error-Code" not in told:
                self.send_response(200)
            for key, value in {**told, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if whole:
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield "http://{}:{}".format(*server.server_address[:2])
    server.shutdown()
    server.server_close()


def test_a_saved_model_loads_by_its_name_on_the_hub(hub: str, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "logits")]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert (tmp_path / "logits").exists(), done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), packed_model("csr16")(torch.arange(14).view(2, 7))[0])
    assert "the hub has no such model, or it is private" in done.stderr
