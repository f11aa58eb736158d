"""The answer to GET /ranks: the model, each rank's part of it, and the time each spends in collectives."""

from minitp.errors import InputError
from minitp.server.errors import without_path


def about_ranks(llm, model):
    """Return the JSON object that describes an LLM's ranks; `model` is the model's name for clients."""
    about = {key: llm.description[key] for key in ("tp", "split", "replicas", "dtype", "kv_dtype", "context")}
    return {"model": model, **about, "chat_error": chat_error(llm, model), "ranks": llm.ranks}


def chat_error(llm, model):
    """Return the reason why a model cannot chat, or None if it can."""
    if llm.tokenizer is None:
        return f"{model} has no tokenizer.json, so it cannot chat"
    try:
        llm.chat_template  # noqa: B018  (the property raises the error)
    except InputError as error:
        return without_path(error, llm, model)
    return None
