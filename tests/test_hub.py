"""Hugging Face ids: what is fetched and what is not, from a hub of our own on the loopback interface."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from safetensors.numpy import load_file, save_file
from tiny import write_tiny

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
    """A server that answers as the hub does, for one repository; it notes which files are asked for.

    `files` maps paths to bytes. `status` other than 200 is the answer to everything.
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
        """The files that were downloaded, each as often as it was."""
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
            headers["X-Error-Message"] = "as the test wants it"
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
        """A file in the listing of the repository."""
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": etag(self.files[name])}


def etag(body):
    return hashlib.sha1(body).hexdigest()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The files of a model in two pieces, among everything else that such a repository may hold."""
    directory = write_tiny(tmp_path_factory.mktemp("repository") / "model")
    (directory / "generation_config.json").write_text('{"eos_token_id": [257]}')
    (directory / "tokenizer_config.json").write_text("{}")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate([names[::2], names[1::2]], start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert set(files) == WANTED
    return directory, files | {name: b"not for minitp" for name in UNWANTED}


@pytest.fixture
def hub(repository):
    server = Hub(repository[1])
    yield server
    server.close()


def run_minitp(home, endpoint, *argv, **variables):
    """A continuation with a hub at `endpoint` and a cache of its own in `home`."""
    return run_command(home, endpoint, "generate", "Hello", "-n", "8", "--json", *argv, **variables)


def run_command(home, endpoint, *argv, **variables):
    """Any command, likewise."""
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


def tokens_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["token_ids"]


def check_refusal(done, *expected):
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"minitp: --model {OWNER_NAME}: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for text in expected:
        assert text in done.stderr


def test_fetched_once_then_kept(repository, hub, tmp_path):
    """Only what minitp reads is fetched; after that no network is needed."""
    by_id = ["--model", OWNER_NAME, "--tp", "1"]
    first = run_minitp(tmp_path, hub.address, *by_id)
    expected = tokens_of(run_minitp(tmp_path, hub.address, "--model", repository[0], "--tp", "1"))
    assert tokens_of(first) == expected
    assert hub.fetched() == sorted(WANTED)
    for _, path in hub.requests:
        assert path.rpartition(COMMIT + "/")[2] not in UNWANTED

    hub.requests.clear()
    assert tokens_of(run_minitp(tmp_path, hub.address, *by_id)) == expected
    assert hub.fetched() == []

    hub.requests.clear()
    hub.close()
    assert tokens_of(run_minitp(tmp_path, hub.address, *by_id, HF_HUB_OFFLINE="1")) == expected
    assert tokens_of(run_minitp(tmp_path, hub.address, *by_id)) == expected, "the hub may also just be down"
    assert hub.requests == []


def test_progress_is_for_terminals(hub, tmp_path):
    done = run_minitp(tmp_path, hub.address, "--model", OWNER_NAME, "--tp", "1")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.mpi
def test_ranks_share_one_download(repository, hub, tmp_path):
    done = run_minitp(tmp_path, hub.address, "--model", OWNER_NAME, "--tp", "2")
    assert tokens_of(done) == tokens_of(run_minitp(tmp_path, "", "--model", repository[0], "--tp", "2"))
    assert hub.fetched() == sorted(WANTED)


def test_offline_without_a_cache(hub, tmp_path):
    done = run_minitp(tmp_path, hub.address, "--model", OWNER_NAME, HF_HUB_OFFLINE="1")
    check_refusal(done, "not to be had from the Hugging Face hub")
    assert hub.requests == []


def test_hub_that_is_down(hub, tmp_path):
    hub.close()
    check_refusal(run_minitp(tmp_path, hub.address, "--model", OWNER_NAME), "not to be had")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_hub_that_refuses(hub, tmp_path, status):
    hub.status = status
    check_refusal(run_minitp(tmp_path, hub.address, "--model", OWNER_NAME), "not to be had", str(status))


def test_repository_without_safetensors(repository, tmp_path):
    """An older one: what it lacks is said, and the weights in the other format are not fetched."""
    hub = Hub({name: body for name, body in repository[1].items() if ".safetensors" not in name})
    try:
        done = run_minitp(tmp_path, hub.address, "--model", OWNER_NAME)
    finally:
        hub.close()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("minitp: ") == 1
    assert "neither model.safetensors nor model.safetensors.index.json" in done.stderr
    assert not any(name.endswith((".bin", ".pth", ".h5")) for name in hub.fetched())
