"""`minitp judge`: name the first wrong operation in a recording of another engine."""

import os
import sys
from dataclasses import replace

from minitp.cli.color import judged
from minitp.cli.command import OneProcess
from minitp.cli.options import SHARES, add_report, add_split, token_ids
from minitp.errors import InputError, shown
from minitp.util.format import counted
from minitp.util.shares import numbers_only
from minitp.util.stdout import write_out

DTYPES = ("float32", "float16", "bfloat16", "float64")


class JudgeCommand(OneProcess):
    """The command `minitp judge`."""

    name = "judge"
    inputs = "FILE"
    summary = "find the first wrong operation of another engine"
    description = (
        "Repeat every operation of a recording in float64, on the inputs that the engine really had, and "
        "compare. If the error of a step exceeds its bound, the exit code is 1, and the last lines name the "
        "first wrong operation, its rank and, if a common mistake explains it, the mistake. Record a model "
        "of transformers, vLLM, mlx-lm or llama.cpp with minitp.probe; docs/judge.md says what to save from "
        "other engines."
    )
    examples = (
        (
            "minitp judge engine.safetensors --model ./Llama-3.2-1B",
            "with the checkpoint that the engine runs",
        ),
        (
            "minitp judge engine/ --model ./Llama-3.2-1B",
            "rank0.safetensors, rank1.safetensors, .. in a folder",
        ),
        (
            "minitp judge mine.npz --model ./Llama-3.2-1B --rope interleaved --report judge.html",
            "arrays of an engine that rotates neighboring dimensions; write a report",
        ),
    )
    verbose = "show a row for each layer"

    def add_options(self, parser):
        group = parser.groups["input"]
        group.add_argument(
            "file",
            metavar="FILE",
            help="a recording: a .safetensors or .npz file, or a folder with rank0.safetensors, ..",
        )
        group.add_argument(
            "--tokens",
            type=token_ids,
            metavar="IDS",
            help="the token ids of all passes, as in 1,2,3 (default: those of the recording)",
        )
        group.add_argument(
            "--dtype",
            choices=DTYPES,
            help="the dtype in which the engine computes (default: that of the recording)",
        )
        group.add_argument(
            "--rope",
            choices=("interleaved", "half"),
            help="the RoPE layout of the engine's heads; interleaved heads are converted to half-split ones "
            "(default: half, or that of the engine in --map)",
        )
        group.add_argument(
            "--map",
            metavar="NAMES",
            help="the engine whose names the arrays have: hf, llama.cpp, megatron, vllm or mlx; or a JSON "
            "file of names of minitp trace to names in FILE, as for `compare` (default: the names of minitp "
            "trace)",
        )
        group = parser.groups["model"]
        group.add_argument(
            "--model",
            help="the model that the engine should run, as for `check` (default: that of the recording)",
        )
        group.add_argument(
            "--revision",
            metavar="NAME",
            help="branch, tag or commit of a Hugging Face id (default: its main branch)",
        )

        add_split(parser, f"{SHARES}, for --map with an engine of unequal ranks (default: equal shares)")
        add_report(parser)

    def run(self, args):
        """Print the table and the verdict; return 1 if a step is wrong, else 0."""
        from tqdm import tqdm

        from minitp.cli.inputs import check_output
        from minitp.cli.judge_text import judgement_text, remarks, table
        from minitp.judge.recording import EngineRecording, check_model
        from minitp.judge.run import judge
        from minitp.trace.reference import open_oracle

        if args.report is not None:
            check_output(args.report, ".html")
        files, rope = open_files(args)
        source = open_recorded_model(args, files)
        check_model(files, source)
        recording = EngineRecording(files, source, args.tokens, args.dtype, rope)
        hidden = not sys.stderr.isatty()
        with tqdm(total=files.layers, desc="judging", unit="layer", leave=False, disable=hidden) as bar:
            judgement = judge(recording, open_oracle(source), bar.update)
        result, ranks = of_assembled(judgement.result, recording.assembled_from)
        lines = [
            title(args, recording, source),
            "",
            *table(result, args.verbose),
            "",
            *remarks(recording, judgement),
        ]
        write_out("\n".join(lines) + "\n")
        said, *more = judgement_text(source, recording, judgement, result, ranks)
        if args.report is not None:
            report(args.report, source, recording, judgement.result, [said, *more], ranks)
        write_out("\n".join((judged(said, result.ok, sys.stdout), *more)) + "\n")
        return 0 if result.ok else 1


def open_recorded_model(args, files):
    """Return the ModelSource of --model, or else that of the recording, with the recorded layers."""
    from minitp.loading.source import open_config, open_model
    from minitp.trace.write import UNNAMED

    name = args.model or files.model
    if name is None:
        raise InputError(f"{args.file}: it does not say which model it is of; give --model")
    if args.model is None and name == UNNAMED:
        raise InputError(f"{args.file}: it does not say where the checkpoint is; give --model")
    try:
        layers = open_config(name, revision=args.revision).num_hidden_layers
    except InputError as error:
        if args.model is not None:
            raise
        raise InputError(
            f"{args.file}: it is of the model {shown(name)}, which cannot be opened; give --model"
        ) from error
    recorded = None if files.metadata is None else files.metadata.config.num_hidden_layers
    if recorded not in (None, layers) and files.layers <= layers:
        raise InputError(
            f"{args.file}: the engine's config has num_hidden_layers {recorded}, and that of {name} "
            f"{layers}: it runs another model, or only some of its layers"
        )
    if files.layers > layers:
        raise InputError(
            f"{args.file}: it has arrays of {counted(files.layers, 'layer')}, and {name} has {layers}: it "
            "is a recording of another model"
        )
    return open_model(name, 1, files.layers, args.revision)


def open_files(args):
    """Return the RecordedFiles, and the RoPE layout of the heads in them."""
    from minitp.judge.files import RecordedFiles
    from minitp.loading.source import open_config
    from minitp.mapping.tensors import ENGINES, rotates_neighbors

    split = numbers_only(args.split, "depends on devices, which judge does not know")
    if split is not None and args.map not in ENGINES:
        raise InputError(
            f"--split {shown(split)} needs --map with the engine that has these shares; or omit it"
        )
    if args.map is None:
        return RecordedFiles(args.file), args.rope or "half"
    if args.map not in ENGINES:
        if not args.map.endswith(".json") and not os.path.exists(args.map):
            raise InputError(
                f"--map {shown(args.map)}: expected {', '.join(ENGINES)}, or a JSON file of names"
            )
        return RecordedFiles(args.file, names=args.map), args.rope or "half"
    if args.model is None:
        raise InputError(f"--map {args.map} needs the model's config; give --model")
    config = open_config(args.model, revision=args.revision)
    rope = "interleaved" if rotates_neighbors(args.map, config) else "half"
    return RecordedFiles(args.file, args.map, config, split=split), args.rope or rope


def of_assembled(result, ranks):
    """Return the result for the text, and where the arrays are from.

    No single rank can be blamed for an array that was assembled from those of several.
    """
    if ranks == 1:
        return result, f"on {counted(result.tp, 'rank')}"
    findings = [replace(finding, rank="all") for finding in result.findings]
    return replace(result, findings=findings), f"assembled from {counted(ranks, 'rank')}"


def title(args, recording, source):
    """Return the heading: the engine, its dtype, the tokens and the model."""
    tokens = counted(len(recording.token_ids), "token")
    passes = counted(len(recording.passes), "pass")
    ran = f"{recording.engine}, {recording.dtype.name}, {tokens} in {passes}"
    return f"{args.file}: {ran}, judged with {source.name}"


def report(path, source, recording, result, lines, ranks):
    """Write the page of a judgement, with some lines as its verdict."""
    from minitp.report.check import report_data
    from minitp.report.page import write_report

    source = replace(source, plan=recording.plan)
    said = "; ".join(filter(None, lines))
    data = report_data(source, recording.dtype, result, said, command="judge", engine=recording.engine)
    write_report(path, data | {"title": f"{recording.engine}: {source.name}, {ranks}"})
    write_out(f"report: {path}\n")
