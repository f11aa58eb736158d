"""`minitp ranks`: what LLM, `minitp chat` and `minitp serve` start; it serves requests and has no output."""

from minitp.commands.loading import check_room, device_of
from minitp.engine.engine import Engine
from minitp.engine.service import serve
from minitp.errors import InputError
from minitp.generate import Request, context_length
from minitp.model import load_model
from minitp.weights import shard_nbytes

REPORTS = 100  # of how much has been loaded


class Ranks:
    """`minitp ranks`."""

    @staticmethod
    def prepare(args, source):
        """Check the options, as those who start this do beforehand."""
        context_length(source.config, args.max_context)
        for option in ("block_size", "max_tokens_per_step", "max_sequences"):
            if getattr(args, option) < 1:
                name = option.replace("_", "-")
                raise InputError(f"--{name} {getattr(args, option)}: expected at least 1")
        if args.cache_tokens is not None and args.cache_tokens < args.block_size:
            raise InputError(
                f"--cache-tokens {args.cache_tokens}: expected at least a block, {args.block_size}"
            )

    @staticmethod
    def run(args, comm, source, caller):
        """Load the model, then serve the caller of rank 0 until it wants no more."""
        device = device_of(args, comm, source)
        check_room(comm, source, device)
        with comm.agreed():
            progress = (lambda nbytes: None) if comm.rank else Loading(source, comm, device, caller)
            model = load_model(source, comm, device, progress, args.kv_dtype)
        model.connect()
        fit = device.cache_room(comm.size) // model.new_pool(1, args.block_size).nbytes
        blocks = blocks_wanted(args, source.config, min(comm.exchange(fit)))
        context = min(context_length(source.config, args.max_context), blocks * args.block_size)
        with comm.agreed():
            engine = Engine(model, blocks, args.block_size, args.max_tokens_per_step, args.max_sequences)
            tokenizer = source.tokenizer() if comm.rank == 0 else None
        if comm.rank == 0:
            caller.say({"ready": described(args, engine, context), "load": engine.scheduler.load()})

        def make_request(prompt_ids, params):
            return Request(params, source.config.eos_token_ids, prompt_ids, context, tokenizer)

        serve(engine, caller, make_request)
        return 0


class Loading:
    """Tells the caller now and then how much of rank 0's weights has been loaded."""

    def __init__(self, source, comm, device, caller):
        self.total, self.caller = shard_nbytes(source.plan, comm.share, device), caller
        self.done = self.told = 0

    def __call__(self, nbytes):
        self.done += nbytes
        if self.done - self.told >= self.total / REPORTS:
            self.told = self.done
            self.caller.say({"loading": self.done, "of": self.total})


def blocks_wanted(args, config, fit):
    """How many blocks every rank has.

    As many as --cache-tokens fill; else for as many sequences as may run at once, each as long as it may
    become, but no more than `fit`.
    """
    if args.cache_tokens is not None:
        return args.cache_tokens // args.block_size
    longest = -(-context_length(config, args.max_context) // args.block_size)
    return max(1, min(longest * args.max_sequences, fit))


def described(args, engine, context):
    """What the caller should know of these ranks."""
    return {
        "tp": engine.model.comm.size,
        "dtype": engine.model.device.dtype.name,
        "kv_dtype": args.kv_dtype,
        "context": context,
        "blocks": engine.scheduler.allocator.blocks,
        "block_size": args.block_size,
        "max_sequences": args.max_sequences,
        "max_tokens_per_step": args.max_tokens_per_step,
        "weight_bytes_per_rank": engine.model.weights.nbytes,
        "cache_bytes_per_rank": engine.pool.nbytes,
    }
