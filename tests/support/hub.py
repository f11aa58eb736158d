"""A Hugging Face hub on the loopback interface, and minitp commands that download from it."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER_NAME = "someone/tiny-model"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


WANTED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
}


UNWANTED = {
    ".gitattributes",
    "README.md",
    "LICENSE",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "original/x.pth",
    "original/params.json",
    "onnx/model.onnx",
    "tokenizer.model",
    "tf_model.h5",
    "modeling_special.py",
    "model.Q4_0.gguf",
}


class Hub:
    """A server that answers as the hub does, for one repository, and records the requests.

    `files` maps paths to bytes. If `status` is set to another value than 200, it is the answer to everything.
    """

    def __init__(self, files):
        self.files = files
        self.status = 200
        self.requests = []  # (method, path)
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            def do_HEAD(self):
                hub.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def fetched(self):
        """Return the files that were downloaded, each once per download."""
        start = f"/{OWNER_NAME}/resolve/{COMMIT}/"
        return sorted(
            path[len(start) :] for method, path in self.requests if method == "GET" and start in path
        )

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path))
        status, body, headers = self.status, b"", {}
        api, resolve = f"/api/models/{OWNER_NAME}", f"/{OWNER_NAME}/resolve/"
        if status != 200:
            headers["X-Error-Message"] = "an error set by the test"
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": OWNER_NAME, "sha": COMMIT, "siblings": siblings}).encode()
            headers["Content-Type"] = "application/json"
        elif path.startswith(f"{api}/tree/"):
            body = json.dumps([self.entry(name) for name in self.files]).encode()
            headers["Content-Type"] = "application/json"
        elif path.startswith(resolve) and path[len(resolve) :].partition("/")[2] in self.files:
            body = self.files[path[len(resolve) :].partition("/")[2]]
            headers |= {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(body)}"', "Accept-Ranges": "bytes"}
        else:
            status = 404
            headers["X-Error-Code"] = "EntryNotFound" if path.startswith(resolve) else "RepoNotFound"
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def entry(self, name):
        """Return a file's entry in the listing of the repository."""
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": etag(self.files[name])}


def etag(body):
    return hashlib.sha1(body).hexdigest()


def run_minitp(home, endpoint, *argv, **variables):
    """Run `minitp generate` with a hub at `endpoint` and the hub's cache in `home`."""
    return run_command(home, endpoint, "generate", "Hello", "-n", "8", "--json", *argv, **variables)


def run_command(home, endpoint, *argv, **variables):
    """Run any minitp command with a hub at `endpoint` and the hub's cache in `home`."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
    }
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **variables,
    }
    command = [sys.executable, "-m", "minitp", *map(str, argv)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
