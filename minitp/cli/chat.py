"""`minitp chat`: a conversation with a model, in the terminal or line by line through a pipe.

stdout receives the model's answers, and stderr everything else.
"""

import sys

from minitp.cli.command import Caller
from minitp.cli.options import add_chat_template_kwargs, add_max_context, add_run, add_sampling, llm_options
from minitp.errors import InputError


class ChatCommand(Caller):
    """The command `minitp chat`."""

    name = "chat"
    summary = "chat with a model in the terminal"
    description = (
        "Chat with a model in the terminal. A pasted text of several lines is one message, and Alt+Enter "
        "starts a new line; such messages are easy to edit if the Python package prompt_toolkit is there. "
        "If stdin is not a terminal, each line of it is a message, which the model answers."
    )
    examples = (
        ("minitp chat --system 'You are a poet.' --temperature 0.7", "a conversation with the demo model"),
        ("minitp chat -n 50 < questions.txt", "an answer of at most 50 tokens to each line"),
    )

    def add_options(self, parser):
        parser.groups["input"].add_argument(
            "--system",
            metavar="TEXT",
            help="system message: instructions for the model (default: none)",
        )
        add_chat_template_kwargs(parser, "input")
        add_sampling(parser, max_new_tokens=None)
        add_run(parser)
        add_max_context(parser)
        parser.groups["output"].add_argument(
            "--stats", action="store_true", help="print each answer's length and speed to stderr"
        )
        parser.set_defaults(max_sequences=1)

    def run(self, args, tp):
        """Answer messages until the user leaves or stdin ends."""
        from minitp.cli.conversation import Conversation, message
        from minitp.cli.terminal import at_terminal, line_by_line
        from minitp.llm import LLM

        opening = [] if args.system is None else [message("system", args.system)]
        params = check(args, tp, [*opening, message("user", "?")])
        sys.stdin.reconfigure(errors="replace")
        with LLM(**llm_options(args, tp)) as llm:
            conversation = Conversation(llm, params, opening, args.stats, args.chat_template_kwargs)
            if sys.stdin.isatty():
                at_terminal(conversation)
            else:
                line_by_line(conversation)
        return 0


def check(args, tp, shortest):
    """Reject invalid options before any rank starts; return the SamplingParams for all answers.

    `shortest` are the messages of the shortest conversation, which must fit the context.
    """
    from minitp.cli.inputs import sampling_params
    from minitp.loading.source import open_model
    from minitp.request import check_prompt, context_length

    source = open_model(args.model, tp, args.layers, args.revision, args.split)
    tokenizer, context = source.tokenizer(), context_length(source.config, args.max_context)
    if tokenizer is None:
        raise InputError(f"{source.name} has no tokenizer.json, which chat needs")
    text = source.chat_template().render(shortest, args.chat_template_kwargs)
    check_prompt(tokenizer.encode(text, add_special_tokens=False), source.config, context)
    if args.max_new_tokens is None:
        args.max_new_tokens = context
    return sampling_params(args, source.config)
