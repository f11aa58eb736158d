"""`minitp judge`: name the first wrong operation in a recording of another engine."""

import sys

from minitp.cli.check_text import table, verdict
from minitp.cli.color import judged
from minitp.cli.command import OneProcess
from minitp.util.format import counted
from minitp.util.stdout import write_out


class JudgeCommand(OneProcess):
    """The command `minitp judge`."""

    name = "judge"
    inputs = "FILE"
    summary = "find the first wrong operation of another engine"
    description = (
        "Repeat every operation of a recording in float64, on the inputs that the engine really had, and "
        "compare. If the error of a step exceeds its bound, the exit code is 1, and the last lines name the "
        "first wrong operation and, if a common mistake explains it, the mistake. Record a model of Hugging "
        "Face transformers with minitp.probe."
    )
    examples = (
        (
            "minitp judge engine.safetensors --model ./Llama-3.2-1B",
            "with the checkpoint that the engine runs",
        ),
        (
            "minitp judge engine.safetensors -v",
            "also a row for each layer; the model is that of the recording",
        ),
    )
    verbose = "show a row for each layer"

    def add_options(self, parser):
        parser.groups["input"].add_argument(
            "file", metavar="FILE", help="a recording: a .safetensors file with the metadata of a trace"
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

    def run(self, args):
        """Print the table and the verdict; return 1 if a step is wrong, else 0."""
        from tqdm import tqdm

        from minitp.judge.recording import EngineRecording
        from minitp.judge.run import judge
        from minitp.loading.source import open_model
        from minitp.trace.reference import open_oracle

        recording = EngineRecording(args.file)
        layers = recording.metadata.layers
        source = open_model(args.model or recording.model, 1, layers, args.revision)
        recording.check_model(source)
        hidden = not sys.stderr.isatty()
        with tqdm(total=layers, desc="judging", unit="layer", leave=False, disable=hidden) as bar:
            judgement = judge(recording, source, open_oracle(source), bar.update)
        result = judgement.result
        tokens = counted(len(recording.metadata.token_ids), "token")
        lines = [
            f"{args.file}: {recording.engine}, {recording.dtype.name}, {tokens} in "
            f"{counted(len(recording.passes), 'pass')}, judged with {source.name}",
            "",
            *table(result, args.verbose),
            "",
            *([f"not recorded: {', '.join(judgement.missing)}"] if judgement.missing else []),
            judged(verdict(source, result).replace("wrong step", "wrong operation"), result.ok, sys.stdout),
            *([f"what it seems to compute: {judgement.explanation}"] if judgement.explanation else []),
        ]
        write_out("\n".join(lines) + "\n")
        return 0 if result.ok else 1
