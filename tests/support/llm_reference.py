"""The reference for `LLM`: each prompt alone, without an engine."""

import time

from tiny import write_tiny

from minitp import SamplingParams
from minitp.comm import run_threads
from minitp.device import open_device
from minitp.generate import generate
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.request import Request

TP = 2

CONTEXT = 400  # positions in the context of most tests; the cache has room for one full sequence

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{m.role}}]{{m.content}}{% endfor %}{{ loud }}[assistant]"

END_S = 10


def write_model(directory, **options):
    """Write a tiny model with a chat template."""
    write_tiny(directory, **options)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return directory


def alone(model, wanted, tp=TP, layers=None):
    """Return a finished Request for each (prompt_ids, params), run alone and without an engine."""
    source = open_model(str(model), tp, layers)
    tokenizer = source.tokenizer()
    eos = source.eos_token_ids(tokenizer)
    requests = [Request(params, eos, ids, CONTEXT, tokenizer) for ids, params in wanted]

    def rank(comm):
        model = load_model(source, comm, open_device("float32"))
        for request in requests:
            list(generate(model, request.prompt_ids, request if comm.rank == 0 else None))

    run_threads(tp, rank)
    return requests


LONG = SamplingParams(max_new_tokens=400_000, ignore_eos=True)


def wait_until(condition):
    deadline = time.monotonic() + END_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
