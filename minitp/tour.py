r"""Run a Llama model with tensor parallelism, all in one file that can be read from top to bottom.

    mpirun -n 4 python -m minitp.tour "Once upon a time"        (with --gpu, each rank uses a GPU)

N processes, called ranks, compute one model together. Each holds about 1/N of every matrix. A product x @ w
can be split in two ways (Shoeybi et al., Megatron-LM, 2019, section 3):

    column-parallel                                 row-parallel
    w = [ w_0 | w_1 ]                               w = [ w_0 ]      x = [ x_0 | x_1 ]
                                                        [ w_1 ]
    x @ w = [ x @ w_0 | x @ w_1 ]                   x @ w = x_0 @ w_0 + x_1 @ w_1
    Every rank computes its own columns.            Every rank computes a term; an all-reduce adds them.

In this order, the columns that a rank computes in the first product are its input for the second, because
operations in between treat every column or head separately. A layer has two such pairs and two all-reduces:

    token ids -> embedding, each rank has a part of the vocabulary                   all-reduce
      per layer: norm -> q, k, v -> RoPE -> KV cache -> attention -> o               all-reduce, + x
                 norm -> gate, up -> SwiGLU -> down                                  all-reduce, + x
      norm -> logits, each rank has a part of the vocabulary                         all-gather
      next token, chosen by rank 0                                                   broadcast

The shape of every array is noted next to it. Everything is float32, and weights are [in, out]. The letters:
    T tokens of this pass   S tokens so far, including these   D hidden   d head_dim   V vocabulary
    H query heads   K key/value heads   F FFN columns   H_r, K_r, F_r, V_r: this rank's part
"""

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

# The ranks share the cores. NumPy reads this on import. MPICH gives the number of ranks; else assume 4.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() // int(os.getenv("MPI_LOCALNRANKS") or 4) or 1))
import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer


# --- 1. The split and the weights: each rank reads its own slices and nothing else ---
def split_evenly(n, size, rank):
    """Return the slice of n items that this rank holds: of 9 heads, 4 ranks get 3, 2, 2 and 2."""
    length, longer = divmod(n, size)
    start = rank * length + min(rank, longer)
    return slice(start, start + length + (rank < longer))


def load_model(directory, config, ranks):
    """Return this rank's part of the model. In the files a projection is [out, in], the transpose of w."""
    H, K, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    heads, ffn, vocab = (split_evenly(config[n], ranks.size, ranks.rank) for n in SPLIT)  # H_r, F_r, V_r long
    # H / K query heads read the same KV head. Two ranks may need the same one; then both hold and compute it.
    read_heads = [head * K // H for head in range(heads.start, heads.stop)]  # [H_r]: KV heads
    q, kv = slice(heads.start * d, heads.stop * d), slice(read_heads[0] * d, (read_heads[-1] + 1) * d)
    index = directory / "model.safetensors.index.json"  # exists if the model has several files
    files = json.loads(index.read_text())["weight_map"] if index.exists() else {}

    def read(name, *part):
        return ranks.xp.asarray(read_slice(directory / files.get(name, "model.safetensors"), name, part))

    def column_parallel(name, columns):
        return ranks.xp.ascontiguousarray(read(name, columns).T)  # [in, a part of out]

    def row_parallel(name, rows):
        return ranks.xp.ascontiguousarray(read(name, slice(None), rows).T)  # [a part of in, out]

    def layer(prefix):
        return SimpleNamespace(
            attn_norm=read(prefix + "input_layernorm.weight"),  # [D]
            w_q=column_parallel(prefix + "self_attn.q_proj.weight", q),  # [D, H_r d]
            w_k=column_parallel(prefix + "self_attn.k_proj.weight", kv),  # [D, K_r d]
            w_v=column_parallel(prefix + "self_attn.v_proj.weight", kv),  # [D, K_r d]
            w_o=row_parallel(prefix + "self_attn.o_proj.weight", q),  # [H_r d, D]
            mlp_norm=read(prefix + "post_attention_layernorm.weight"),  # [D]
            w_gate=column_parallel(prefix + "mlp.gate_proj.weight", ffn),  # [D, F_r]
            w_up=column_parallel(prefix + "mlp.up_proj.weight", ffn),  # [D, F_r]
            w_down=row_parallel(prefix + "mlp.down_proj.weight", ffn),  # [F_r, D]
        )

    model = SimpleNamespace(config=config, first_token=vocab.start, K_r=read_heads[-1] + 1 - read_heads[0])
    model.kv_of_head = ranks.xp.asarray(read_heads) - read_heads[0]  # [H_r]
    model.layers = [layer(f"model.layers.{i}.") for i in range(config["num_hidden_layers"])]
    model.final_norm = read("model.norm.weight")  # [D]
    model.embed = read("model.embed_tokens.weight", vocab)  # [V_r, D]
    tied = config.get("tie_word_embeddings")  # then it is the embedding, too
    model.lm_head = model.embed.T if tied else column_parallel("lm_head.weight", vocab)  # [D, V_r]
    return model


def read_slice(file, name, part):
    """Return a slice of a tensor in float32, without reading the rest of the tensor."""
    with safe_open(file, "np") as tensors:
        tensor = tensors.get_slice(name)
        if tensor.get_dtype() != "BF16":
            return tensor[part or slice(None)].astype(np.float32)  # shape of the slice
    # NumPy has no bfloat16. It is the upper half of a float32, so read the bits at the header's offsets.
    raw = np.memmap(file, np.uint8, "r")  # [bytes]
    first = 8 + int(raw[:8].view(np.uint64)[0])  # the first byte after the header
    start, stop = json.loads(raw[8:first].tobytes())[name]["data_offsets"]
    bits = raw[first:][start:stop].view(np.uint16).reshape(tensor.get_shape())[part]  # shape of the slice
    return (bits.astype(np.uint32) << 16).view(np.float32)  # shape of the slice


# --- 2. Collectives: the only place where arrays are sent from rank to rank ---
class MpiRanks:
    """Ranks that compute with NumPy and communicate through MPI."""

    def __init__(self, world):
        self.world, self.rank, self.size = world, world.Get_rank(), world.Get_size()
        self.xp, self.to_host = np, np.asarray

    def all_reduce(self, x):
        """Return the sum of x over the ranks. MPI recommends, but does not promise, the same bits on all."""
        total = np.empty_like(x)  # shape of x
        self.world.Allreduce(x, total)
        return total

    def all_gather(self, part):
        """Return the parts of all ranks, which may differ in length, concatenated on the host."""
        return np.concatenate(self.world.allgather(self.to_host(part)))  # [sum of the lengths]


class NcclRanks(MpiRanks):
    """Ranks that compute with CuPy, each on a GPU, and communicate through NCCL."""

    def __init__(self, world):
        import cupy
        from cupy.cuda import nccl

        super().__init__(world)
        cupy.cuda.Device(self.rank % cupy.cuda.runtime.getDeviceCount()).use()
        self.stream = cupy.cuda.Stream(non_blocking=True).use()  # runs everything in order
        self.xp, self.to_host, self.nccl = cupy, cupy.asnumpy, nccl
        self.kind, self.sum = nccl.NCCL_FLOAT32, nccl.NCCL_SUM

    @functools.cached_property
    def communicator(self):
        """The NCCL communicator, created on first use from an id that rank 0 makes and MPI broadcasts."""
        unique_id = self.world.bcast(self.nccl.get_unique_id() if self.rank == 0 else None)
        return self.nccl.NcclCommunicator(self.size, unique_id, self.rank)

    def all_reduce(self, x):
        total = self.xp.empty_like(x)  # shape of x
        self.communicator.allReduce(x.data.ptr, total.data.ptr, x.size, self.kind, self.sum, self.stream.ptr)
        return total


# --- 3. The model: each layer is two pairs, column-parallel and then row-parallel ---
def rms_norm(xp, x, weight, eps):
    """Divide each row by its root mean square and multiply by weight (Zhang and Sennrich, RMSNorm, 2019)."""
    return x / xp.sqrt((x * x).sum(axis=-1, keepdims=True) / x.shape[-1] + eps) * weight  # as x: [.., D]


def rope(xp, x, cos, sin):
    """Rotate each pair (x[i], x[i + d/2]) by the angle of its position (Su et al., RoFormer, 2021)."""
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]  # [heads, T, d/2], [heads, T, d/2]
    return xp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)  # [heads, T, d]


def attention(xp, model, layer, x, start, keys, values, cos, sin):
    """Return the term of this rank's heads. Heads mix only in the output projection; no others are cached."""
    T, d, S = len(x), model.config["head_dim"], start + len(x)
    h = rms_norm(xp, x, layer.attn_norm, model.config["rms_norm_eps"])  # [T, D]
    q, k, v = h @ layer.w_q, h @ layer.w_k, h @ layer.w_v  # [T, H_r d], [T, K_r d], [T, K_r d]
    q, k, v = (y.reshape(T, -1, d).transpose(1, 0, 2) for y in (q, k, v))  # [H_r, T, d], 2x [K_r, T, d]
    keys[:, start:S], values[:, start:S] = rope(xp, k, cos, sin), v  # [K_r, T, d], [K_r, T, d]
    k, v = keys[model.kv_of_head, :S], values[model.kv_of_head, :S]  # [H_r, S, d], [H_r, S, d]
    seen = xp.arange(S) <= xp.arange(start, S)[:, None]  # [T, S]: a token sees no later one
    scores = xp.where(seen, rope(xp, q, cos, sin) @ k.transpose(0, 2, 1) / d**0.5, -np.inf)  # [H_r, T, S]
    weights = xp.exp(scores - scores.max(axis=-1, keepdims=True))  # [H_r, T, S]: at most 1, no overflow
    context = weights / weights.sum(axis=-1, keepdims=True) @ v  # [H_r, T, d]
    return context.transpose(1, 0, 2).reshape(T, -1) @ layer.w_o  # [T, H_r d] @ [H_r d, D] -> [T, D]


def feed_forward(xp, model, layer, x):
    """Return this rank's term of SwiGLU's output (Shazeer, 2020). The -80 keeps exp from overflowing."""
    h = rms_norm(xp, x, layer.mlp_norm, model.config["rms_norm_eps"])  # [T, D]
    gate, up = h @ layer.w_gate, h @ layer.w_up  # [T, F_r], [T, F_r]
    return (gate / (1 + xp.exp(-xp.maximum(gate, -80))) * up) @ layer.w_down  # [T, F_r] @ [F_r, D] -> [T, D]


def forward(model, ranks, token_ids, start, cache):
    """Return the logits [V] after a prompt or a new token; `start` tokens before it are in the cache."""
    xp, config, d = ranks.xp, model.config, model.config["head_dim"]
    positions = np.arange(start, start + len(token_ids))  # [T]
    angles = positions[:, None] * config["rope_theta"] ** (-np.arange(0, d, 2) / d)  # [T, d/2]
    cos, sin = xp.asarray(np.cos(angles), np.float32), xp.asarray(np.sin(angles), np.float32)  # [T, d/2] each
    # Only one rank has a token's row of the embedding. The others use zeros, so the sum is that row.
    row = xp.asarray(token_ids) - model.first_token  # [T]
    here = (row >= 0) & (row < len(model.embed))  # [T]
    x = ranks.all_reduce(model.embed[xp.where(here, row, 0)] * here[:, None])  # [T, D]
    for layer, (keys, values) in zip(model.layers, cache, strict=True):
        x = x + ranks.all_reduce(attention(xp, model, layer, x, start, keys, values, cos, sin))  # [T, D]
        x = x + ranks.all_reduce(feed_forward(xp, model, layer, x))  # [T, D]
    x = rms_norm(xp, x[-1], model.final_norm, config["rms_norm_eps"])  # [D]
    return ranks.all_gather(x @ model.lm_head)  # [V]


def generate(model, ranks, prompt_ids, count):
    """Yield up to `count` new tokens, the most probable one each time, on all ranks."""
    shape = model.K_r, len(prompt_ids) + count, model.config["head_dim"]  # [K_r, maximum of S, d]
    cache = [[ranks.xp.empty(shape, np.float32) for _ in ("keys", "values")] for _ in model.layers]
    start, token_ids = 0, prompt_ids
    for _ in range(count):
        logits = forward(model, ranks, token_ids, start, cache)  # [V]
        token = ranks.world.bcast(int(np.argmax(logits)))  # rank 0's: last bits may differ between ranks
        yield token
        if token in model.config["eos_token_id"]:
            return
        start, token_ids = start + len(token_ids), [token]


# --- 4. The command: it checks its arguments and the model, and all ranks exit together ---
DEMO = os.path.expanduser(os.getenv("XDG_CACHE_HOME") or "~/.cache") + "/minitp/smollm2-135m-instruct-q4_1"
SPLIT = "num_attention_heads", "intermediate_size", "vocab_size"  # H, F and V
DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "eos_token_id": []}
PLAIN = {"model_type": ("llama", "mistral"), "hidden_act": (None, "silu"), "rope_type": (None, "default")}
PLAIN |= {"partial_rotary_factor": (None, 1), "sliding_window": (None,), "rope_scaling": (None,)}
PLAIN |= dict.fromkeys(("attention_bias", "mlp_bias", "rope_interleaved", "quantization_config"), (None,))


def read_config(directory):
    """Return config.json with defaults. Fields of PLAIN must have its values; 0, false and null mean None."""
    fields = json.loads((directory / "config.json").read_text())
    config = DEFAULTS | ({"sliding_window": 4096} if fields.get("model_type") == "mistral" else {}) | fields
    config |= config.get("rope_parameters") or {}  # newer files have rope_theta there
    for field, plain in PLAIN.items():
        if (value := config.get(field) or None) not in plain:
            raise ValueError(f"config.json: {field} {value!r} is not supported; use `minitp generate`")
    config["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    generation = directory / "generation_config.json"
    more = json.loads(generation.read_text()).get("eos_token_id", []) if generation.exists() else []
    config["eos_token_id"] = [*np.ravel(config["eos_token_id"]), *np.ravel(more)]  # each is one id or several
    return config


def prepare(argv, world):
    """Return everything that a rank needs to generate. Raise an exception if an input is invalid."""
    parser = argparse.ArgumentParser(prog="minitp tour", description="Tensor parallelism in one file.")
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--tokens", metavar="1,2,3", help="token ids instead of the prompt")
    parser.add_argument("--model", type=Path, default=DEMO, metavar="DIR", help="a Hugging Face directory")
    parser.add_argument("-n", "--max-new-tokens", type=int, default=40, metavar="N")
    parser.add_argument("--gpu", action="store_true", help="CuPy and NCCL instead of NumPy and MPI")
    args = parser.parse_args(argv)
    if args.model == Path(DEMO) and not args.model.exists():
        raise ValueError("there is no demo model yet; `minitp generate Hello` downloads it")
    config = read_config(args.model)
    if world.Get_size() > (most := min(config[n] for n in SPLIT)):
        raise ValueError(f"use at most {most} ranks (one per attention head, FFN column and token)")
    fields = {} if args.tokens else json.loads((args.model / "tokenizer.json").read_text())
    fields |= {"truncation": None, "padding": None}  # the prompt is used as it is
    tokenizer = None if args.tokens else Tokenizer.from_str(json.dumps(fields))
    prompt_ids = tokenizer.encode(args.prompt).ids if tokenizer else list(map(int, args.tokens.split(",")))
    V, limit, n = config["vocab_size"], config["max_position_embeddings"], len(prompt_ids)
    if unknown := [token for token in prompt_ids if not 0 <= token < V]:
        raise ValueError(f"token id {unknown[0]} is outside the vocabulary, 0 to {V - 1}")
    if not 0 < n < limit:
        raise ValueError(f"the prompt has {n} tokens; expected 1 to {limit - 1} (less than the context)")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
    ranks, count = NcclRanks(world) if args.gpu else MpiRanks(world), min(args.max_new_tokens, limit - n)
    return load_model(args.model, config, ranks), ranks, tokenizer, prompt_ids, count


def main(argv=None):
    """Run the command on this rank and return its exit code, or None on success."""
    from mpi4py import MPI

    world, problem, new_ids, shown = MPI.COMM_WORLD, None, [], ""
    if world.rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  only rank 0 prints
    try:
        model, ranks, tokenizer, prompt_ids, count = prepare(argv, world)
    except Exception as error:
        problem = " ".join(str(error).split()) or repr(error)
    if problems := [text for text in world.allgather(problem) if text]:  # if any rank has one, all exit
        print(f"minitp tour: {problems[0]}", file=sys.stderr)
        return 2
    try:
        for token in generate(model, ranks, prompt_ids, count):
            new_ids.append(token)
            text = tokenizer.decode(prompt_ids + new_ids) if tokenizer else " ".join(map(str, new_ids))
            if not text.endswith("\ufffd"):  # not the first bytes of a character
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print(text[len(shown) :])
    except Exception as error:  # without Abort, the other ranks would wait forever
        print(f"minitp tour: rank {world.rank} failed: {error!r}", file=sys.__stderr__, flush=True)
        time.sleep(0.5)  # lets mpirun forward the message
        world.Abort(3)


if __name__ == "__main__":
    sys.exit(main())
