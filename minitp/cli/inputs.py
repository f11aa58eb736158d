"""Checks of inputs that several commands share: prompts, sampling parameters, passes, output files."""

import tempfile
from dataclasses import fields
from pathlib import Path

from minitp.engine.options import option
from minitp.errors import InputError, ParameterError
from minitp.request import check_logit_bias, check_vocabulary
from minitp.sampling import SamplingParams
from minitp.util.format import counted


def prompt_tokens(args, source):
    """Return the token ids of PROMPT or --tokens."""
    if (args.prompt is None) == (args.tokens is None):
        raise InputError(f"{args.command} needs a PROMPT or --tokens 1,2,3, and not both")
    if args.tokens is not None:
        return args.tokens
    return tokenizer_of(source).encode(args.prompt)


def tokenizer_of(source):
    """Return the Tokenizer of a ModelSource; raise InputError if it has none."""
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise InputError(f"{source.name} has no tokenizer.json; give --tokens 1,2,3 instead of a prompt")
    return tokenizer


def sampling_params(args, config):
    """Return the SamplingParams from the options; raise InputError if one is invalid for the model."""
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
    given = {one.name: getattr(args, one.name) for one in fields(SamplingParams) if hasattr(args, one.name)}
    try:
        params = SamplingParams(**{**given, "stop": tuple(args.stop)})
    except ParameterError as error:
        raise InputError(f"{option(error.name)} {error.value!s:.100}: expected {error.expected}") from error
    check_logit_bias(params, config, option("logit_bias"))
    return params


def check_passes(args, source, token_ids):
    """Reject a prompt and --decode that are invalid for the model or exceed its context."""
    if args.decode < 0:
        raise InputError(f"--decode {args.decode}: expected 0 or more")
    if not token_ids:
        raise InputError("the prompt is empty and this model adds no BOS token; give at least one word")
    check_vocabulary(token_ids, source.config)
    context = source.config.max_position_embeddings
    if len(token_ids) + args.decode > context:
        raise InputError(
            f"{counted(len(token_ids), 'token')} and --decode {args.decode} exceed the model's context of "
            f"{context}"
        )


def check_output(name, suffix):
    """Reject an output file that could not be written."""
    path = Path(name)
    if path.suffix != suffix:
        raise InputError(f"{name}: expected a name that ends in {suffix}")
    try:
        if path.is_dir():
            raise IsADirectoryError
        with tempfile.TemporaryFile(dir=path.parent):  # os.access is not enough: for root it is always true
            pass
    except OSError as error:
        reason = error.strerror or "it is a directory"
        raise InputError(
            f"{name}: cannot be written ({reason}); give a file name in a writable directory"
        ) from error
