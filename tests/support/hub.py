"""A Hugging Face hub on the loopback interface, and minitp commands that download from it."""

import hashlib
import json
import os
import re
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
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
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

    `files` maps paths to bytes, and `revisions` a branch or tag to its commit and its own files. If `status`
    is set to another value than 200, it is the answer to everything, with `headers`.
    """

    def __init__(self, files, revisions=()):
        self.revisions = {"main": (COMMIT, files), **dict(revisions)}
        self.status, self.headers = 200, {"X-Error-Message": "an error set by the test"}
        self.truncated = False  # whether the weights end before their length
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
        start = f"/{OWNER_NAME}/resolve/"
        paths = [path for method, path in self.requests if method == "GET" and path.startswith(start)]
        return sorted(path[len(start) :].partition("/")[2] for path in paths)

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path))
        status, headers, body = self.status, self.headers, b""
        if status == 200:
            status, headers, body = self.found(path)
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET" and self.truncated and path.endswith(".safetensors"):
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
        elif request.command == "GET":
            request.wfile.write(body)

    def found(self, path):
        """Return the status, headers and body of the answer to a path."""
        about = re.fullmatch(rf"/api/models/{OWNER_NAME}(?:/(refs|revision|tree)/?([^/]*).*)?", path)
        file = re.fullmatch(rf"/{OWNER_NAME}/resolve/([^/]+)/(.+)", path)
        if about is None and file is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if about is not None and about[1] == "refs":
            heads = [(name, commit) for name, (commit, _) in self.revisions.items()]
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": commit} for n, commit in heads]
            return in_json({"branches": branches, "tags": [], "converts": []})
        commits = {commit: (commit, files) for commit, files in self.revisions.values()}
        revision = about[2] or "main" if file is None else file[1]
        if revision not in self.revisions | commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit, files = (self.revisions | commits)[revision]
        if file is None and about[1] == "tree":
            return in_json([entry(name, data) for name, data in files.items()])
        if file is None:
            names = [{"rfilename": name} for name in files]
            return in_json({"id": OWNER_NAME, "sha": commit, "siblings": names})
        if file[2] not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = files[file[2]]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(body)}"', "Accept-Ranges": "bytes"}
        return 200, headers, body


def in_json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def entry(name, data):
    """Return a file's entry in the listing of the repository."""
    return {"type": "file", "path": name, "size": len(data), "oid": etag(data)}


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
