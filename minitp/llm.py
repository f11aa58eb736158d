"""The class `LLM`: a model on several ranks, for scripts, notebooks, and scripts under mpirun.

from minitp import LLM

with LLM("smollm2", tp=2) as llm:
    print(llm.generate("The capital of France is", max_new_tokens=20).text)
"""

from __future__ import annotations

import os
import queue
import weakref
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, NoReturn

from tqdm.auto import tqdm

from minitp.engine.client import JoinedRanks, StartedRanks, join_world
from minitp.engine.completion import Completion, is_tokens, sampling
from minitp.engine.options import options_from
from minitp.engine.replicas import joined_replicas, started_replicas
from minitp.errors import InputError, RankError
from minitp.launch.devices import check_gpus
from minitp.launch.run import ranks_of_replica
from minitp.loading.source import open_model, warn_of_unread_fields
from minitp.request import check_length, check_logit_bias, check_prompt, context_length
from minitp.util import environment
from minitp.util.format import counted
from minitp.util.shares import MEASURED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Unpack

    from minitp.engine.ranks import Update
    from minitp.sampling import SamplingFields, SamplingParams
    from minitp.text.chat_template import ChatTemplate

    Prompt = str | Sequence[int]
    Messages = str | list[dict[str, str]]


class LLM:
    """A model that is loaded once and then serves many prompts at a time.

    Outside MPI, an LLM starts its ranks and watches them. They end when its `with` block is left, when it is
    garbage-collected, or when the process ends for any reason. Under mpirun, an LLM joins the ranks that
    mpirun has started. The script continues on rank 0 only: on the other ranks this call does not return;
    they serve rank 0 and exit when it is done. So the script does its work once in either case.

    An LLM can be used from several threads, but not in a forked child, which needs its own.

    Parameters
    ----------
    model : str or Path
        A directory, a .gguf file, a Hugging Face id, "smollm2", or "random:NAME".
    tp : int or str
        The number of ranks, or "auto": one per GPU, or without GPUs one per physical core, at most 4. Under
        mpirun, it must be "auto" or the number of ranks that mpirun has started, divided by `replicas`.
    split : str or sequence of float
        The ranks' shares of the model, as in (3, 1) or "0.6,0.4", which also give the number of ranks; "auto"
        measures the ranks' devices, and "memory" follows their memory. By default the shares are equal.
    replicas : int
        The number of copies of the model, each on `tp` ranks of its own. Each request goes to one of them. If
        a rank dies, its replica ends, and the others go on.
    revision : str
        A branch, tag or commit of a Hugging Face id; by default its main branch.
    layers, device, dtype, kv_dtype, comm, share_gpu, max_context, cache_tokens, block_size
        See `engine.options.EngineOptions` for these parameters and the next three.
    max_tokens_per_step, max_sequences, verbose
    on_end : callable
        A function that is called in another thread with the RankError if the ranks, or those of one replica,
        end unexpectedly.

    Attributes
    ----------
    description : dict
        The settings in use: tp, dtype, context (maximum positions of a prompt and its continuation), ..; see
        `engine.run.describe`.

    Raises
    ------
    InputError
        If a parameter or the model is invalid.
    RankError
        If a rank fails to start.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2",
        tp: int | str = "auto",
        *,
        split: str | Sequence[float] | None = None,
        replicas: int = 1,
        revision: str | None = None,
        layers: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        kv_dtype: str = "auto",
        comm: str = "auto",
        share_gpu: bool = False,
        max_context: int | None = None,
        cache_tokens: int | None = None,
        block_size: int = 16,
        max_tokens_per_step: int = 512,
        max_sequences: int = 64,
        verbose: bool = False,
        on_end: Callable[[RankError], object] = lambda error: None,
        **unknown: NoReturn,
    ) -> None:
        given = dict(
            model=model, tp=tp, layers=layers, device=device, dtype=dtype, kv_dtype=kv_dtype, comm=comm
        )
        given |= dict(split=split, replicas=replicas, revision=revision, share_gpu=share_gpu)
        given |= dict(max_context=max_context)
        given |= dict(cache_tokens=cache_tokens, block_size=block_size, max_sequences=max_sequences)
        given |= dict(max_tokens_per_step=max_tokens_per_step, verbose=verbose, **unknown)
        world = environment.world_size(os.environ)
        if world is not None and environment.env_rank(os.environ) != 0:
            raise SystemExit(_serve_rank_0(given, world))
        options = options_from(given)
        size = ranks_of_replica(options, world)
        if world is None:  # under mpirun the ranks check these together
            environment.check_cupy(options.device)
            check_gpus(options.device, options.share_gpu, size, options.replicas)
            self.source = open_model(options.model, size, options.layers, options.revision, options.split)
            context_length(self.source.config, options.max_context)
            warn_of_unread_fields(self.source)
        with loading_bar(options.model) as show:
            self._ranks = start_or_join(options, size, world, on_loading=show, on_end=on_end)
            self._close = weakref.finalize(self, self._ranks.close)
            try:
                self._ranks.wait()
            except BaseException:  # Ctrl-C
                self.close()
                raise
        if self._ranks.error is not None:
            self.close()
            raise self._ranks.error
        self.description = self._ranks.description
        if world is not None or options.split in MEASURED:
            split = self.description["split"]
            self.source = open_model(options.model, size, options.layers, options.revision, split)
        self.tokenizer = self.source.tokenizer()

    def __repr__(self) -> str:
        state = "closed" if not self._close.alive else "failed" if self.error else "ready"
        shown = self.description
        replicas = "" if shown["replicas"] == 1 else f"{shown['replicas']} replicas of "
        return (
            f"<LLM {self.source.name}: {replicas}{counted(shown['tp'], 'rank')}, {shown['dtype']}, context "
            f"{shown['context']}, {state}>"
        )

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, wait: bool = True) -> None:
        """End the ranks and wait until they have ended; requests still running raise a RankError.

        With `wait=False` the ranks are killed, even if another thread is waiting in `close` for them to end.
        """
        if not wait:
            self._ranks.kill()
        self._close()

    @property
    def error(self) -> RankError | None:
        """The error that ended the ranks, or the last replica; None while one runs."""
        return self._ranks.error

    @property
    def load(self) -> dict[str, int]:
        """The current load, by name: running, waiting, blocks_in_use, preempted, reused_tokens."""
        return self._ranks.load

    @property
    def replicas(self) -> list[dict[str, object]]:
        """The state of each replica: whether it is ready, and its load, with waiting_tokens (engine.routing).

        With a single replica, the list is empty.
        """
        return [
            {"replica": one.index, "ready": one.ready, **one.current_load(), "waiting_tokens": one.waiting}
            for one in getattr(self._ranks, "replicas", [])
        ]

    def restart(self) -> list[int]:
        """Start the replicas that have ended again, and wait for them; the others go on.

        Returns
        -------
        list of int
            The replicas that have been started.

        Raises
        ------
        InputError
            If there is only one replica.
        RankError
            If a replica does not start.
        """
        return self._ranks.restart()

    @property
    def ranks(self) -> list[dict[str, object]]:
        """The part of each rank and its times so far; see engine.run.describe_rank and service.RankTimes."""
        parts = self.description["ranks"]
        return [{**part, **times} for part, times in zip(parts, self._ranks.rank_times, strict=True)]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        **options: Unpack[SamplingFields],
    ) -> Completion | list[Completion]:
        """Generate the continuation of one prompt, or of several prompts at the same time.

        Parameters
        ----------
        prompts : str, list of int, or a list of these
            One prompt, as text or token ids, or a list of prompts.
        params : SamplingParams or list of SamplingParams, optional
            Sampling parameters for all prompts, or a list with one for each.
        progress : bool
            Show a progress bar on a terminal if there are several prompts.
        **options
            Fields of SamplingParams, which override those of `params`.

        Returns
        -------
        Completion, or a list of them in the order of the prompts

        Raises
        ------
        InputError
            If a prompt or a parameter is invalid; then nothing is computed.
        RankError
            If a rank dies.
        """
        many = isinstance(prompts, list | tuple) and not is_tokens(prompts)
        prompts = list(prompts) if many else [prompts]
        each = list(params) if isinstance(params, list | tuple) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise InputError(
                f"{len(each)} SamplingParams for {counted(len(prompts), 'prompt')}; pass one, or one for each"
            )
        each = [self._sampling(one, options) for one in each]
        wanted = [
            (self.encode(prompt, room=min(1, one.max_new_tokens)), one)
            for prompt, one in zip(prompts, each, strict=True)
        ]
        completions = [Completion(ids) for ids, _ in wanted]
        disable = None if progress and many else True  # None: disabled unless stderr is a terminal
        with tqdm(total=len(prompts), unit="prompt", disable=disable) as bar:
            for n, update in self._updates(wanted):
                completions[n].add(update)
                if update.finish_reason is not None:
                    bar.update()
        return completions if many else completions[0]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingFields]
    ) -> Iterator[str]:
        """Return an iterator over the pieces of a prompt's continuation, as they are generated.

        Closing the iterator stops the request. Parameters and errors are as in `generate`.
        """
        return self._pieces(self.encode(prompt), self._sampling(params, options))

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        chat_template_kwargs: dict[str, object] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        **options: Unpack[SamplingFields],
    ) -> Completion:
        """Generate the answer to a conversation.

        Parameters
        ----------
        messages : str or list of dict
            A user's message, or the whole conversation: {"role": "user", "content": ".."} and so on.
        params : SamplingParams, optional
            If neither `params` nor max_new_tokens is given, the answer may fill the context.
        chat_template_kwargs : dict, optional
            Variables of the model's chat template, such as {"enable_thinking": False} for Qwen 3.
        add_generation_prompt : bool, optional
            Begin a new message of the assistant; the default unless the final message is continued.
        continue_final_message : bool
            Continue the final message, as in [.., {"role": "assistant", "content": "Sure,"}]; the completion
            has only the text that follows it.
        **options
            Fields of SamplingParams, which override those of `params`.
        """
        ending = add_generation_prompt, continue_final_message
        ids, params = self._conversation(messages, params, chat_template_kwargs, ending, options)
        return self.generate(ids, params)

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        chat_template_kwargs: dict[str, object] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        **options: Unpack[SamplingFields],
    ) -> Iterator[str]:
        """Return an iterator over the pieces of an answer; parameters are as in `chat`."""
        ending = add_generation_prompt, continue_final_message
        return self._pieces(*self._conversation(messages, params, chat_template_kwargs, ending, options))

    def encode(self, prompt: Prompt, room: int = 1) -> list[int]:
        """Tokenize a prompt, unless it is token ids already; check the ids and return them.

        The prompt must leave `room` positions of the context for new tokens.
        """
        if isinstance(prompt, str):
            check_length(prompt, self.description["context"])
            prompt = self._require_tokenizer().encode(prompt)
        elif not isinstance(prompt, list | tuple) or not is_tokens(prompt):
            shown = " ".join(repr(prompt).split())[:50]
            raise InputError(f"prompt {shown}: expected a string or a list of token ids")
        ids = [int(token) for token in prompt]
        check_prompt(ids, self.source.config, self.description["context"], room)
        return ids

    def encode_chat(
        self,
        messages: list[dict[str, str]],
        chat_template_kwargs: dict[str, object] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        room: int = 1,
    ) -> list[int]:
        """Return the token ids of a conversation, rendered by the model's chat template; see `chat`.

        The prompt must leave `room` positions of the context for new tokens.
        """
        text = self.chat_template.render(
            messages, chat_template_kwargs, add_generation_prompt, continue_final_message
        )
        check_length(text, self.description["context"])
        return self.encode(self._require_tokenizer().encode(text, add_special_tokens=False), room)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's ChatTemplate; raises InputError if the model has none."""
        return self.source.chat_template()

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, listener: Callable[[Update], object]
    ) -> Callable[[], None]:
        """Send a request and return at once; `generate`, `stream` and the server are built on this.

        Parameters
        ----------
        prompt_ids : list of int
            Token ids that `encode` or `encode_chat` has returned.
        params : SamplingParams
        listener : callable
            A function that is called in another thread with each `engine.ranks.Update`; it must not block.

        Returns
        -------
        callable
            A function that cancels the request; its blocks are freed after the current batch.
        """
        return partial(self._ranks.abort, self._ranks.add(prompt_ids, params, listener))

    def submit_all(
        self,
        prompt_ids: list[int],
        requests: list[tuple[SamplingParams, Callable[[Update], object]]],
    ) -> list[Callable[[], None]]:
        """Send several requests with the same prompt to the same replica, as `submit` sends one."""
        return [partial(self._ranks.abort, number) for number in self._ranks.add_all(prompt_ids, requests)]

    def _updates(self, wanted):
        """Yield (n, Update) for the n-th (prompt_ids, params) as updates arrive, until all are done."""
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
        self._require_tokenizer()

        def pieces():
            for _, update in self._updates([(ids, params)]):
                if update.text:
                    yield update.text

        return pieces()

    def _conversation(self, messages, params, variables, ending, options):
        """Return the token ids and the SamplingParams of a chat."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if params is None:
            options = {"max_new_tokens": self.description["context"], **options}
        params = self._sampling(params, options)
        return self.encode_chat(messages, variables, *ending, min(1, params.max_new_tokens)), params

    def _sampling(self, params, options):
        """Return `params` with the fields in `options` replaced, checked against the model."""
        params = sampling(params, options)
        check_logit_bias(params, self.source.config)
        return params

    def _require_tokenizer(self):
        if self.tokenizer is None:
            raise InputError(f"{self.source.name} has no tokenizer.json; pass token ids as the prompt")
        return self.tokenizer


def _serve_rank_0(given, world):
    """Serve the script that runs on rank 0, on another rank of mpirun; return the exit code."""
    try:
        options = options_from(given)
        ranks_of_replica(options, world)
    except InputError as error:
        return error.exit_code  # rank 0 prints the error
    return join_world(options, world)


def start_or_join(options, size, world, **callbacks):
    """Start the ranks, or join the `world` ranks of mpirun; return their handle, a Ranks or ReplicaRanks."""
    if options.replicas > 1:
        if world is None:
            return started_replicas(options, size, **callbacks)
        return joined_replicas(options, world, **callbacks)
    if world is None:
        return StartedRanks(options, size, **callbacks)
    return JoinedRanks(options, world, **callbacks)


@contextmanager
def loading_bar(name):
    """Show the progress of loading on a terminal; yield a function that takes (bytes done, total bytes)."""
    with tqdm(desc=f"loading {name}", unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def show(done, total):
            bar.total = total
            bar.update(done - bar.n)

        yield show
