"""The OpenAI-compatible server: HTTP for an `LLM`, in the launcher's process, which outlives the ranks.

body.py       bodies of requests: size limits, reception, JSON
fields.py     the fields of requests, their valid values, and the values of other fields that change nothing
requests.py   requests: parsed and checked; bad ones are rejected with the API's error objects (errors.py)
prompts.py    prompts and sampling parameters for the LLM
responses.py  responses of /v1/completions and /v1/chat/completions, whole or in chunks
token_texts.py  the names, bytes and offsets of tokens in them
streams.py    responses on their way to the client
tokenization.py  /tokenize, /detokenize and /tokenizer_info
backend.py    the state of the model (loading, ready, failed), and the limits on requests
app.py        the routes
middleware.py  what surrounds them: request ids, other origins, trailing slashes
ranks.py      the answer to /ranks: what each rank holds, and its time in collectives
page/         the chat page
metrics.py    the metrics for Prometheus
run.py        the process: its socket, its signals, its exit
"""
