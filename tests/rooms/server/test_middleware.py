"""Tests of names of the model, other origins, keys, request ids, slashes, encodings and unknown routes."""

import asyncio
import gzip
import json
import string

import httpx
import openai
import pytest
from served import Served, write_chatty

from minitp.cli.main import main
from minitp.loading.source import open_model
from minitp.server.app import make_app
from minitp.server.middleware import LONGEST_ID

pytestmark = pytest.mark.mpi
HTTP = httpx.Client(timeout=60)  # a new one for each request takes longer
ORIGIN, OTHER = "https://example.com", "https://example.org"
KEY = {"Authorization": "Bearer secret"}
TALK = {"model": "second", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
EXPOSED = "x-request-id, Retry-After"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    served = Served(
        write_chatty(tmp_path_factory.mktemp("models") / "chatty"),
        *("--tp", 1, "--served-model-name", "first", "second", "first"),
        *("--allow-origin", ORIGIN, "--allow-origin", "http://localhost:3000"),
        MINITP_API_KEY="secret",
    )
    yield served
    served.stop()


def post(server, path, fields, **headers):
    return HTTP.post(server.url + path, json=fields, headers=KEY | headers)


# --- names of the model ---------------------------------------------------------------------------------


def test_all_names_are_accepted_and_listed_and_responses_have_the_first(server):
    client = server.client(api_key="secret")
    assert [model.id for model in client.models.list().data] == ["first", "second"]
    assert client.models.retrieve("second").id == "second"
    for name in ("first", "second"):
        assert client.chat.completions.create(**TALK | {"model": name}).model == "first"
        chunks = client.completions.create(model=name, prompt="Hi", max_tokens=2, stream=True)
        assert {chunk.model for chunk in chunks} == {"first"}
    with pytest.raises(openai.NotFoundError, match="not found; this server runs 'first' or 'second'"):
        client.completions.create(model="chatty", prompt="Hi")


# --- pages of other origins -----------------------------------------------------------------------------


def test_a_preflight_request_of_an_allowed_origin(server):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-a"}
    response = HTTP.options(f"{server.url}/v1/chat/completions", headers={"Origin": ORIGIN} | asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-headers"] == "authorization,x-a"
    assert response.headers["x-request-id"]
    refused = HTTP.options(f"{server.url}/v1/chat/completions", headers={"Origin": OTHER} | asked)
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/v1/chat/completions", TALK, 200),
        ("/v1/chat/completions", TALK | {"stream": True}, 200),
        ("/v1/chat/completions", TALK | {"n": 0}, 400),
        ("/v1/embeddings", {"model": "first"}, 404),
        ("/health", {}, 405),
    ],
)
def test_every_response_allows_the_origin(server, path, fields, status):
    response = post(server, path, fields, Origin=ORIGIN)
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert response.headers["access-control-expose-headers"] == EXPOSED
    assert "access-control-allow-origin" not in post(server, path, fields, Origin=OTHER).headers


def test_a_response_without_the_key_allows_the_origin(server):
    response = HTTP.get(f"{server.url}/v1/models", headers={"Origin": ORIGIN})
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize(
    ("origins", "allowed"), [((), None), (["*"], "*"), ([ORIGIN], ORIGIN), (["https://a.b"], None)]
)
def test_an_unexpected_error_allows_the_origin(origins, allowed):
    app = make_app(None, None, ["fake"], origins=origins)  # without a backend, /health fails

    async def get():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/health", headers={"Origin": ORIGIN})

    response = asyncio.run(get())
    assert response.status_code == 500
    assert response.headers.get("access-control-allow-origin") == allowed
    assert len(response.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--allow-origin", "example.com"], "--allow-origin 'example.com': expected * or an origin such as"),
        (["--allow-origin", "https://example.com/"], "--allow-origin 'https://example.com/': expected"),
        (["--allow-origin", "*", "--allow-origin", ""], "--allow-origin '': expected"),
        (["--api-key", ""], "--api-key is empty; give a key, or leave the option out"),
        (["--served-model-name", "a", ""], "--served-model-name '': expected a name that is not empty"),
        (
            ["--chat-template-kwargs", "x"],
            """'x': expected a JSON object, as in '{"enable_thinking": false}'""",
        ),
    ],
)
def test_refused_options(refused, options, words):
    assert words in refused("serve", *options)


@pytest.mark.parametrize("key", ["secret\n", " secret", "schlüssel", "a\tb"], ids=repr)
def test_a_key_that_no_header_can_have_is_refused_and_not_shown(refused, monkeypatch, key):
    with_option = refused("serve", "--api-key", key)
    monkeypatch.setenv("MINITP_API_KEY", key)
    assert refused("serve") == with_option
    assert "the API key has spaces at its ends, or characters that are not printable ASCII" in with_option
    assert key.strip() not in with_option


@pytest.mark.parametrize("revision", ["", "v1"])
def test_serve_starts_a_model_without_a_chat_template(monkeypatch, revision):
    opened = []

    def open_and_note(name, tp, layers=None, revision=None, split=None):
        opened.append(revision)
        return open_model(name, tp, layers)

    monkeypatch.setattr("minitp.cli.command.ranks_of_replica", lambda *_: 1)
    monkeypatch.setattr("minitp.loading.source.open_model", open_and_note)
    monkeypatch.setattr("minitp.llm.LLM", lambda **given: 0)
    monkeypatch.setattr("minitp.server.run.serve_forever", lambda start, *_, **__: start(None))
    model = ["--model", "random:smollm2-135m", "--layers", "1", "--revision", revision]
    assert main(["serve", "--port", "0", *model]) == 0
    assert opened == [revision]


# --- keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer secret", 200),
        ("bearer secret", 200),
        ("BEARER  secret", 200),
        ("secret", 401),
        ("Basic secret", 401),
        ("Bearersecret", 401),
        ("Bearer", 401),
        ("Bearer secret2", 401),
        ("Bearer Bearer secret", 401),
    ],
)
def test_a_key_has_a_scheme_in_any_case(server, header, status):
    response = HTTP.get(f"{server.url}/v1/models", headers={"Authorization": header})
    assert response.status_code == status


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/tokenizer_info")]
)
def test_the_routes_of_tokenization_need_the_key(server, method, path):
    assert HTTP.request(method, server.url + path, json={"prompt": "a"}).status_code == 401


# --- request ids, slashes, encodings, unknown routes ----------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/nothing", "/v1/completions"])
def test_every_response_has_a_request_id(server, path):
    ids = [HTTP.get(server.url + path).headers["x-request-id"] for _ in range(2)]
    assert all(set(one) <= set(string.hexdigits) and len(one) == 32 for one in ids)
    assert ids[0] != ids[1]
    assert (
        HTTP.get(server.url + path, headers={"X-Request-Id": "my id/7"}).headers["x-request-id"] == "my id/7"
    )


@pytest.mark.parametrize("sent", ["", "a" * (LONGEST_ID + 1), "é", "a\tb"], ids=repr)
def test_an_unusable_request_id_is_replaced(server, sent):
    headers = {"X-Request-Id": sent.encode()}
    assert len(HTTP.get(f"{server.url}/health", headers=headers).headers["x-request-id"]) == 32


def test_a_stream_has_the_clients_request_id(server):
    response = post(server, "/v1/chat/completions", TALK | {"stream": True}, **{"X-Request-Id": "mine"})
    assert response.headers["x-request-id"] == "mine"
    assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("slash", ["/", "//"])
def test_a_slash_at_the_end_changes_nothing(server, slash):
    assert post(server, f"/v1/chat/completions{slash}", TALK).status_code == 200
    assert post(server, f"/tokenize{slash}", {"prompt": "a"}).status_code == 200
    for path in ("/v1/models", "/v1/models/first", "/health", "/metrics"):
        assert HTTP.get(server.url + path + slash, headers=KEY).status_code == 200
    assert HTTP.get(f"{server.url}/nothing{slash}").status_code == 404


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP, identity"])
def test_a_compressed_body_is_refused(server, encoding):
    headers = KEY | {"Content-Encoding": encoding, "Content-Type": "application/json"}
    body = gzip.compress(json.dumps(TALK).encode())
    response = HTTP.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 415
    message = response.json()["error"]["message"]
    assert message == f"Content-Encoding {encoding.lower()!r}: send the body uncompressed"
    assert post(server, "/v1/chat/completions", TALK, **{"Content-Encoding": "identity"}).status_code == 200


ROUTES = {"/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/health"}


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/embeddings", "/v1/responses", "/v1/audio/speech", "/v1/images/generations", "/v1/moderations"),
        *("/v1/files", "/v1/fine_tuning/jobs", "/v1/batches", "/v1/rerank", "/v1/messages", "/api/chat"),
        *("/chat/completions", "/completion"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_route_of_other_servers_is_refused_with_the_routes_of_this_one(server, method, path):
    response = HTTP.request(method, server.url + path)
    assert response.status_code == 404
    error = response.json()["error"]
    start, _, routes = error["message"].partition(" only ")
    assert start == f"{method} {path}: minitp has no such route,"
    assert set(routes.split(", ")) >= ROUTES
    assert len(error["message"]) < 300


def test_the_openai_client_does_not_retry_what_is_not_supported(server):
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings: minitp has no such route"):
        server.client(api_key="secret").embeddings.create(model="first", input="Hi")
