"""The OpenAI-compatible server: HTTP in front of an `LLM`, in the process that outlives the ranks.

body.py      what a client asks for: read, checked, and refused with the API's own error objects
answers.py   what it gets: the objects of /v1/completions and /v1/chat/completions, whole or in pieces
backend.py   the model behind it: loading, ready or gone; the queue and its limits
app.py       the routes
metrics.py   what Prometheus sees
run.py       the process: its socket, its signals, its end
"""
