"""The answer to GET /ranks: the model, each rank's part of it, and the time each spends in collectives."""

from starlette.responses import JSONResponse

from minitp.errors import InputError
from minitp.server.backend import in_thread


def ranks_route(api):
    """Return the handler of GET /ranks for an `app.Api`."""

    async def ranks(request):
        api.check_key(request)
        llm = api.backend.ready()
        return JSONResponse(await in_thread(lambda: about_ranks(llm, api.model)))

    return ranks


def about_ranks(llm, model):
    """Return the JSON object of an LLM; `model` is the model's name for clients.

    `chat_error` is the reason why the model cannot chat, or None.
    """
    about = {key: llm.description[key] for key in ("tp", "dtype", "kv_dtype", "context")}
    return {"model": model, **about, "chat_error": chat_error(llm, model), "ranks": llm.ranks}


def chat_error(llm, model):
    """Return the reason why a model has no chat, or None."""
    if llm.tokenizer is None:
        return f"{model} has no tokenizer.json, so it cannot chat"
    try:
        llm.chat_template  # noqa: B018  (the property raises the error)
    except InputError as error:
        return str(error).replace(str(llm.source.name), model)  # clients must not learn the path of the model
    return None
