"""What several commands take: a prompt or tokens in its place, how to sample, passes, a file to write."""

import tempfile
from pathlib import Path

from minitp.errors import InputError, ParameterError
from minitp.request import check_vocabulary
from minitp.sampling import SamplingParams
from minitp.trace.record import passes_of


def prompt_tokens(args, source):
    """The token ids of PROMPT or --tokens."""
    if (args.prompt is None) == (args.tokens is None):
        raise InputError(f"{args.command} needs either a PROMPT or --tokens 1,2,3")
    if args.tokens is not None:
        return args.tokens
    return tokenizer_of(source).encode(args.prompt)


def tokenizer_of(source):
    """The Tokenizer of a ModelSource; InputError if it has none."""
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise InputError(f"{source.name} has no tokenizer.json; give --tokens 1,2,3 in place of the prompt")
    return tokenizer


def sampling_params(args):
    """What the options say of how a continuation is chosen and when it ends."""
    try:
        return SamplingParams(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            stop=tuple(args.stop),
            ignore_eos=args.ignore_eos,
        )
    except ParameterError as error:
        option = f"--{error.name.replace('_', '-')}"
        raise InputError(f"{option} {error.value}: expected {error.expected}") from error


def passes_wanted(args, source, token_ids):
    """The passes of the prompt and --decode, refused if the model's context cannot hold them."""
    if args.decode < 0:
        raise InputError(f"--decode {args.decode}: expected 0 or more")
    if not token_ids:
        raise InputError("the prompt is empty and this model adds no BOS token; give at least one word")
    check_vocabulary(token_ids, source.config)
    context = source.config.max_position_embeddings
    if len(token_ids) + args.decode > context:
        raise InputError(
            f"{len(token_ids)} tokens and --decode {args.decode} exceed the model's context of {context}"
        )
    return passes_of(len(token_ids), args.decode)


def check_output(name, suffix):
    """Refuse early a file that could not be written in the end."""
    path = Path(name)
    if path.suffix != suffix:
        raise InputError(f"{name}: expected a name that ends in {suffix}")
    try:
        if path.is_dir():
            raise IsADirectoryError
        with tempfile.TemporaryFile(dir=path.parent):  # to ask for permission is not enough, as root has all
            pass
    except OSError as error:
        raise InputError(f"{name}: cannot be written there; give a file in a directory that can") from error
