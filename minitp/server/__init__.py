"""The OpenAI-compatible server: HTTP for an `LLM`, in the launcher's process, which outlives the ranks.

body.py       bodies of requests: size limits, reception, JSON
requests.py   requests: parsed and checked; bad ones are rejected with the API's error objects
responses.py  responses of /v1/completions and /v1/chat/completions, whole or in chunks
backend.py    the state of the model (loading, ready, failed), and the limits on requests
app.py        the routes
metrics.py    the metrics for Prometheus
run.py        the process: its socket, its signals, its exit
"""
