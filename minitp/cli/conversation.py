"""A conversation with a model: the messages so far, and the streaming of the next answer."""

import queue
import sys
from time import perf_counter

from minitp.engine.completion import Completion
from minitp.errors import ContextError, InputError
from minitp.util.format import counted
from minitp.util.stdout import write_out

ROOM = 4  # 1 / ROOM of the context, or max_new_tokens if that is less, is left for an answer


def message(role, content):
    """Return a chat message as a dict."""
    return {"role": role, "content": content}


def note(text):
    """Print a line to stderr, apart from the model's answers."""
    print(text, file=sys.stderr)


class Conversation:
    """A conversation between the user and the model.

    Parameters
    ----------
    llm : LLM
    params : SamplingParams
    opening : list of dict
        The system message, if there is one; it is never dropped.
    stats : bool
        Print the length and speed of each answer.
    chat_template_kwargs : dict, optional
        Variables of the chat template.
    """

    def __init__(self, llm, params, opening, stats, chat_template_kwargs=None):
        self.chat_template_kwargs = chat_template_kwargs
        self.llm, self.params, self.opening, self.stats = llm, params, opening, stats
        self._updates = queue.SimpleQueue()  # updates of the current answer
        self.reset()

    def reset(self):
        """Forget all messages except the opening."""
        self.messages, self.has_outgrown = [], False

    def say(self, text):
        """Stream the answer to a message; return False if stdout is closed.

        A message that is too long is reported, and the conversation can continue.
        """
        self._updates = queue.SimpleQueue()
        try:
            messages, ids = self.within_context([*self.messages, message("user", text)])
            answer, times = Completion(ids), [perf_counter()]
            for update in self._updates_of(ids):
                times.append(perf_counter())
                answer.add(update)
                if not write_out(update.text):
                    return False
        except InputError as error:
            note(f"minitp: {error}")
            return True
        if answer.text or answer.finish_reason:  # not if it was stopped before its first word
            self.messages = [*messages, message("assistant", answer.text)]
        is_read = write_out("\n")
        self._remark(answer, times)
        return is_read

    def interrupt(self):
        """Stop the current answer; signal handlers may call this."""
        self._updates.put(None)

    def within_context(self, messages):
        """Return the newest messages that leave room for an answer, and their token ids.

        If messages must be dropped, they are dropped down to half of the context, because all messages that
        follow must then be recomputed.
        """
        context = self.llm.description["context"]
        most = context - min(context // ROOM, self.params.max_new_tokens)
        kept = messages
        while True:
            try:
                ids = self.llm.encode_chat([*self.opening, *kept], self.chat_template_kwargs)
                if len(ids) <= most or len(kept) == 1:
                    break
            except ContextError:
                if len(kept) == 1:
                    raise
            kept, most = kept[2:], context // 2
        if len(kept) < len(messages) and not self.has_outgrown:
            self.has_outgrown = True
            note(
                f"[the conversation has outgrown its context of {counted(context, 'token')}; "
                "the oldest messages are dropped]"
            )
        return kept, ids

    def _updates_of(self, ids):
        """Yield the updates of an answer until it ends or is interrupted."""
        stop = self.llm.submit(ids, self.params, self._updates.put)
        try:
            while (update := self._updates.get()) is not None:
                if update.error is not None:
                    raise update.error
                yield update
                if update.finish_reason is not None:
                    return
        finally:
            stop()

    def _remark(self, answer, times):
        """Print whether the answer was cut off and, with --stats, its length and speed."""
        new = len(answer.token_ids)
        if answer.finish_reason == "length" and new == self.params.max_new_tokens:
            note(f"[cut at {counted(new, 'token')}; -n allows more]")
        elif answer.finish_reason == "length":
            note(f"[cut at {counted(new, 'token')}: the context is full]")
        if self.stats and new:
            speed = f", {(new - 1) / (times[-1] - times[1]):.1f} tokens/s after the first" if new > 1 else ""
            note(
                f"[{counted(len(answer.prompt_token_ids), 'prompt token')}, first new token after "
                f"{times[1] - times[0]:.3f} s; {counted(new, 'new token')}{speed}]"
            )
