"""The OpenAI-compatible server: HTTP for an `LLM`, in the launcher's process, which outlives the ranks.

The modules, in the order in which a request passes through them:

run.py           the process: its socket, its signals, its exit
connection.py    connections, with time limits for clients
middleware.py    layers around the routes: request ids, other origins, trailing slashes
app.py           the routes
body.py          bodies of requests: size limits, reception, JSON
fields.py        fields of requests: their valid values, and which unsupported fields are accepted
requests.py      requests to the two completion routes, parsed and checked
prompts.py       prompts and sampling parameters for the LLM
backend.py       the state of the model (loading, ready, draining, failed), and the limits on requests
responses.py     responses of the two completion routes, whole or in chunks
token_texts.py   names, bytes and offsets of tokens in log-probabilities
streams.py       responses on their way to the client
errors.py        error responses

tokenization.py  /tokenize, /detokenize and /tokenizer_info
ranks.py         /ranks: the part of each rank, and its time in collectives
metrics.py       /metrics, for Prometheus
page/            the chat page
"""
