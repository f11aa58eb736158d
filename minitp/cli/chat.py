"""`minitp chat`: a conversation with a model, in the terminal or line by line through a pipe.

stdout gets what the model says, stderr the rest.
"""

import queue
import signal
import sys
from contextlib import contextmanager, suppress
from time import perf_counter

from minitp.cli.inputs import sampling_params
from minitp.cli.shared_options import llm_options
from minitp.engine.completion import Completion
from minitp.errors import ContextError, InputError
from minitp.launch.run import Terminated, raised_on_sigterm
from minitp.llm import LLM
from minitp.loading.demo import cache_directory
from minitp.loading.source import open_model
from minitp.request import check_prompt, context_length
from minitp.util.stdout import write_out

ROOM = 4  # an answer has at least the ROOM-th part of the context
KEPT_LINES = 1000  # of what has been typed, for the next sessions
HELP = """\
/help   this
/reset  forget what has been said
/exit   leave, as Ctrl-D does
Ctrl-C stops an answer; what has been said of it is remembered.
A line with a space before its / is a message."""


def run(args, tp):
    """Answer messages until there are no more; the exit code."""
    opening = [] if args.system is None else [message("system", args.system)]
    params = check(args, tp, opening)
    sys.stdin.reconfigure(errors="replace")
    try:
        with raised_on_sigterm(), LLM(**llm_options(args, tp)) as llm:
            conversation = Conversation(llm, params, opening, args.stats)
            if sys.stdin.isatty():
                at_terminal(conversation)
            else:
                line_by_line(conversation)
        return 0
    except Terminated:
        return 143


def check(args, tp, opening):
    """Refuse before ranks start what cannot be; the SamplingParams of all answers."""
    source = open_model(args.model, tp, args.layers)
    tokenizer, context = source.tokenizer(), context_length(source.config, args.max_context)
    if tokenizer is None:
        raise InputError(f"{source.name} has no tokenizer.json: it has no words to chat in")
    template = source.chat_template()
    shortest = template.render([*opening, message("user", "?")])
    check_prompt(tokenizer.encode(shortest, add_special_tokens=False), source.config, context)
    if args.max_new_tokens is None:
        args.max_new_tokens = context
    return sampling_params(args)


def message(role, content):
    return {"role": role, "content": content}


def line_by_line(conversation):
    """Each line of stdin is a message."""
    for line in sys.stdin:
        if line.strip() and not conversation.say(line.strip()):
            return


def at_terminal(conversation):
    """Prompt for messages and commands until the user leaves, or nobody reads the answers."""
    if sys.stderr.isatty():
        note(banner(conversation.llm))
    with line_editing():
        for line in typed_lines():
            command = line.rstrip()
            if command == "/exit":
                return
            if command == "/help":
                note(HELP)
            elif command == "/reset":
                conversation.reset()
                note("[conversation reset]")
            elif command.startswith("/"):
                note(f"{command.split()[0]} is no command; /help lists them")
            elif command:
                with on_ctrl_c(conversation.interrupt):
                    if not conversation.say(line.strip()):
                        return


def banner(llm):
    about = llm.description
    ranks = "1 rank" if about["tp"] == 1 else f"{about['tp']} ranks"
    return (
        f"{llm.source.name} on {ranks}, {about['dtype']}, context {about['context']}\n"
        "/help for help; Ctrl-C stops an answer, Ctrl-D leaves"
    )


def note(text):
    print(text, file=sys.stderr)


def typed_lines():
    """The lines that the user types, up to Ctrl-D. Ctrl-C clears a line; twice in a row it gets through."""
    interrupted = False
    while True:
        try:
            line = input("> " if sys.stdout.isatty() else "")
            interrupted = False
            yield line
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("")
            if interrupted:
                raise
            interrupted = True
            note("Ctrl-C again, or Ctrl-D, leaves")


@contextmanager
def line_editing():
    """Where Python has readline: lines can be edited, and those of earlier sessions are there."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = cache_directory() / "chat-history"
    readline.set_history_length(KEPT_LINES)
    with suppress(OSError):  # of the first session; and a history is no reason to fail
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


@contextmanager
def on_ctrl_c(act):
    """Ctrl-C calls `act` instead of raising KeyboardInterrupt, which could hit a message to the ranks."""
    before = signal.signal(signal.SIGINT, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Conversation:
    """What the user and the model have said, and how the next answer comes about.

    Parameters
    ----------
    llm : LLM
    params : SamplingParams
    opening : list of dict
        Messages that are never left out: the system's, if there is one.
    stats : bool
        Tell after each answer how fast it was.
    """

    def __init__(self, llm, params, opening, stats):
        self.llm, self.params, self.opening, self.stats = llm, params, opening, stats
        self._updates = queue.SimpleQueue()  # of the present answer
        self.reset()

    def reset(self):
        """Forget what has been said."""
        self.messages, self.has_outgrown = [], False

    def say(self, text):
        """Stream the answer to a message, or refuse it; False if nobody reads any more."""
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
        if answer.text or answer.finish_reason:  # else it was stopped before the first word
            self.messages = [*messages, message("assistant", answer.text)]
        is_read = write_out("\n")
        self._remark(answer, times)
        return is_read

    def interrupt(self):
        """Stop the answer that is on its way; for signal handlers."""
        self._updates.put(None)

    def within_context(self, messages):
        """The messages, and their token ids; without the oldest if they leave an answer no room.

        Then enough is left out to be done with it for a while: all that follows has to be computed anew.
        """
        context = self.llm.description["context"]
        most = context - min(context // ROOM, self.params.max_new_tokens)
        kept = messages
        while True:
            try:
                ids = self.llm.encode_chat([*self.opening, *kept])
                if len(ids) <= most or len(kept) == 1:
                    break
            except ContextError:
                if len(kept) == 1:
                    raise
            kept, most = kept[2:], context // 2
        if len(kept) < len(messages) and not self.has_outgrown:
            self.has_outgrown = True
            note(f"[the conversation outgrows the context of {context} tokens: the oldest of it is left out]")
        return kept, ids

    def _updates_of(self, ids):
        """What comes of a prompt, up to its end or an `interrupt`."""
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
        """Say what an answer does not show: that it is not whole, and how fast it came."""
        new = len(answer.token_ids)
        if answer.finish_reason == "length" and new == self.params.max_new_tokens:
            note(f"[cut at {new} tokens; -n allows more]")
        elif answer.finish_reason == "length":
            note(f"[cut at {new} tokens: the context is full]")
        if self.stats and new:
            speed = f", {(new - 1) / (times[-1] - times[1]):.1f} tokens/s after the first" if new > 1 else ""
            note(
                f"[{len(answer.prompt_token_ids)} prompt tokens, first new token after "
                f"{times[1] - times[0]:.3f} s; {new} new tokens{speed}]"
            )
