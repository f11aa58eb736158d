"""`LLM`: a model on several ranks, from a plain script, a notebook, or inside mpirun.

from minitp import LLM

with LLM("smollm2", tp=2) as llm:
    print(llm.generate("The capital of France is", max_new_tokens=20).text)
"""

import os
import queue
import weakref
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property, partial

from tqdm.auto import tqdm

from minitp.engine.client import JoinedRanks, StartedRanks, join_world
from minitp.engine.completion import Completion, is_tokens, sampling
from minitp.engine.options import EngineOptions, option
from minitp.errors import InputError
from minitp.loading.source import open_model, warn_of_unread_fields
from minitp.request import check_prompt, context_length
from minitp.util import environment


class LLM:
    """A model that is loaded once and then serves prompts, many at a time.

    Outside MPI it starts the ranks, watches them, and ends them with itself: on leaving its `with` block,
    when it is collected, and when the process ends, however it does. Inside mpirun it joins them: rank 0's
    script goes on and drives all of them; on the other ranks the call does not return, they serve rank 0 and
    leave when it is through. So the same script does the same thing in both places, once.

    It may be used from several threads.

    Parameters
    ----------
    model : str
        A directory, a Hugging Face id, "smollm2", or "random:NAME".
    tp : int or str
        Ranks: a number, or "auto", the physical cores up to 4. Inside mpirun its world.
    **options
        The other fields of engine.options.EngineOptions: dtype, max_context, ..
    on_end : callable
        Called, in another thread, if the ranks end without having been told to: with the RankError.

    Attributes
    ----------
    description : dict
        What has been started: tp, dtype, context (positions of a prompt and its continuation), blocks, ..

    Raises
    ------
    InputError
        if a parameter, or the model, is not right
    RankError
        if a rank does not come up
    """

    def __init__(self, model="smollm2", tp="auto", *, on_end=lambda error: None, **options):
        world = environment.world_size(os.environ)
        if world is not None and environment.env_rank(os.environ) != 0:
            raise SystemExit(serve_rank_0(model, tp, options, world))
        options = options_of(model, tp, options)
        size = world or environment.ranks_wanted(options.tp, default=None)
        if world is None:  # else the ranks do that together
            self.source = open_model(options.model, size, options.layers)
            context_length(self.source.config, options.max_context)
            warn_of_unread_fields(self.source)
        with loading_bar(options.model) as show:
            if world is None:
                self._ranks = StartedRanks(options, size, on_loading=show, on_end=on_end)
            else:
                self._ranks = JoinedRanks(options, world, on_loading=show, on_end=on_end)
            self._close = weakref.finalize(self, self._ranks.close)
            try:
                self._ranks.started.wait()
            except BaseException:  # Ctrl-C
                self.close()
                raise
        if self._ranks.error is not None:
            self.close()
            raise self._ranks.error
        self.description = self._ranks.description
        if world is not None:
            self.source = open_model(options.model, size, options.layers)
        self.tokenizer = self.source.tokenizer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the ranks; returns when they have ended. What is still asked of them raises a RankError."""
        self._close()

    @property
    def error(self):
        """What has ended the ranks; None while they live."""
        return self._ranks.error

    @property
    def load(self):
        """How busy the ranks are: running and waiting requests, blocks_in_use, preempted, reused_tokens."""
        return self._ranks.load

    def generate(self, prompts, params=None, *, progress=True, **options):
        """Continue a prompt, or many at a time.

        Parameters
        ----------
        prompts : str, list of int, or a list of these
            Texts, or token ids.
        params : SamplingParams or list of SamplingParams, optional
            For all prompts, or one for each.
        progress : bool
            Of several prompts, show on a terminal how many are done.
        **options
            Fields of SamplingParams that differ from `params`.

        Returns
        -------
        Completion, or a list of them in the order of the prompts

        Raises
        ------
        InputError
            if a prompt or a parameter is not right; nothing is computed then
        RankError
            if a rank dies
        """
        many = isinstance(prompts, list | tuple) and not is_tokens(prompts)
        prompts = list(prompts) if many else [prompts]
        each = list(params) if isinstance(params, list | tuple) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise InputError(
                f"{len(each)} SamplingParams for {len(prompts)} prompts; give one, or one for each"
            )
        wanted = [
            (self.encode(prompt), sampling(p, options)) for prompt, p in zip(prompts, each, strict=True)
        ]
        completions = [Completion(ids) for ids, _ in wanted]
        disable = None if progress and many else True  # None: unless it is no terminal
        with tqdm(total=len(prompts), unit="prompt", disable=disable) as bar:
            for n, update in self._updates(wanted):
                completions[n].add(update)
                if update.finish_reason is not None:
                    bar.update()
        return completions if many else completions[0]

    def stream(self, prompt, params=None, **options):
        """An iterator over the pieces of a prompt's continuation, each as soon as it is there.

        Whoever stops iterating stops the request. Parameters and errors as of `generate`.
        """
        return self._pieces(self.encode(prompt), sampling(params, options))

    def chat(self, messages, params=None, **options):
        """The model's answer to a conversation: a Completion.

        Parameters
        ----------
        messages : str or list of dict
            What the user says, or all that has been said: {"role": "user", "content": ".."} and so on.
        params : SamplingParams, optional
            Without, and without max_new_tokens, the answer may take all of the context.
        """
        ids, params = self._conversation(messages, params, options)
        return self.generate(ids, params)

    def stream_chat(self, messages, params=None, **options):
        """`chat` as an iterator over the pieces of the answer."""
        return self._pieces(*self._conversation(messages, params, options))

    def encode(self, prompt):
        """The token ids of a prompt, checked; it may be token ids already."""
        if isinstance(prompt, str):
            prompt = self._known_tokenizer().encode(prompt)
        elif not isinstance(prompt, list | tuple) or not is_tokens(prompt):
            shown = " ".join(repr(prompt).split())[:50]
            raise InputError(f"prompt {shown}: expected a text or a list of token ids")
        ids = [int(token) for token in prompt]
        check_prompt(ids, self.source.config, self.description["context"])
        return ids

    def encode_chat(self, messages):
        """The token ids of a conversation, as the model's template writes it."""
        text = self.chat_template.render(messages)
        return self.encode(self._known_tokenizer().encode(text, add_special_tokens=False))

    @cached_property
    def chat_template(self):
        """The model's ChatTemplate; InputError if it has none."""
        return self.source.chat_template()

    def submit(self, prompt_ids, params, listener):
        """Send a request and return at once: what `generate`, `stream` and the server are made of.

        Parameters
        ----------
        prompt_ids : list of int
            From `encode` or `encode_chat`.
        params : SamplingParams
        listener : callable
            Gets each engine.client.Update, in another thread; it must not wait.

        Returns
        -------
        callable
            That stops the request; its blocks are free within a step.
        """
        return partial(self._ranks.drop, self._ranks.add(prompt_ids, params, listener))

    def _updates(self, wanted):
        """(n, Update) of each (prompt_ids, params) as they come, until all are done."""
        updates, stops = queue.SimpleQueue(), []
        try:
            for n, (ids, params) in enumerate(wanted):
                stops.append(self.submit(ids, params, lambda update, n=n: updates.put((n, update))))
            left = len(wanted)
            while left:
                n, update = updates.get()
                if update.error is not None:
                    raise update.error
                yield n, update
                left -= update.finish_reason is not None
        finally:
            for stop in stops:
                stop()

    def _pieces(self, ids, params):
        self._known_tokenizer()

        def pieces():
            for _, update in self._updates([(ids, params)]):
                if update.text:
                    yield update.text

        return pieces()

    def _conversation(self, messages, params, options):
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if params is None:
            options = {"max_new_tokens": self.description["context"], **options}
        return self.encode_chat(messages), sampling(params, options)

    def _known_tokenizer(self):
        if self.tokenizer is None:
            raise InputError(f"{self.source.name} has no tokenizer.json; give token ids to `generate`")
        return self.tokenizer


def serve_rank_0(model, tp, options, world):
    """Be one of the other ranks of a user's mpirun, while the script goes on in rank 0; the exit code."""
    try:
        options = options_of(model, tp, options)
    except InputError as error:
        return error.exit_code  # rank 0 says it
    return join_world(options, world)


def options_of(model, tp, options):
    """EngineOptions from what LLM was given, None meaning the default; InputError for a name that is none."""
    known = [field.name for field in fields(EngineOptions)]
    for name in options:
        if name not in known:
            raise InputError(f"unrecognized arguments: {option(name)}")
    given = {name: value for name, value in options.items() if value is not None}
    return EngineOptions(str(model), str(tp), **given)


@contextmanager
def loading_bar(name):
    """Shows on a terminal how much of the weights has been loaded: what it yields gets (bytes, of all)."""
    with tqdm(desc=f"loading {name}", unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def show(done, total):
            bar.total = total
            bar.update(done - bar.n)

        yield show
