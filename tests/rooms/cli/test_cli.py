"""The command line: bad input exits with code 2 and one line on stderr, and good input works as promised."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from refusal import check_refusal
from tiny import BOS, write_tiny

from minitp.cli.arguments import GROUPS, parser
from minitp.cli.commands import COMMANDS
from minitp.cli.main import main
from minitp.comm import run_threads
from minitp.comm.single import SingleRank
from minitp.device import open_device
from minitp.errors import InputError
from minitp.generate import generate
from minitp.launch.devices import check_gpus
from minitp.launch.mpirun import mpi_environment
from minitp.launch.run import ranks_to_start
from minitp.load import load_model
from minitp.loading.source import open_model
from minitp.model import Model
from minitp.request import Request
from minitp.sampling import SamplingParams
from minitp.util import environment
from minitp.util.suggest import ALIASES

COMMAND = [sys.executable, "-m", "minitp"]
BUFFERED = {
    name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"
}  # as users have it
BY_LAUNCHER, ALONE = ["--tp", "4"], ["--tp", "1"]
NO_TOKENIZER = "random:smollm2-135m"


def run_command(*argv, **options):
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "env": BUFFERED,
        "timeout": 120,
    } | options
    return subprocess.run([*COMMAND, *map(str, argv)], **options)


def run_json(*argv):
    done = run_command("generate", *argv, "--json")
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


# --- prompts and options --------------------------------------------------------------------------------

TOO_LONG = ",".join(["5"] * 600)
BAD_GENERATE = {
    "empty prompt": ([""], "the prompt is empty"),
    "long prompt": (["a" * 600], "600 tokens, which leaves no room"),
    "long tokens": (["--tokens", TOO_LONG], "600 tokens, which leaves no room"),
    "prompt fills the context": (["a" * 512], "leaves no room for a new one"),
    "prompt over --max-context": (["aaaa", "--max-context", "4"], "4 tokens, which leaves no room"),
    "token id too large": (["--tokens", "1,258,3"], "token id 258 is outside the vocabulary, 0 to 257"),
    "token id far too large": (["--tokens", "9" * 30], "outside the vocabulary, 0 to 257"),
    "token id negative": (["--tokens=-1"], "token id -1 is outside the vocabulary, 0 to 257"),
    "tokens empty": (["--tokens", ""], "'': expected numbers and commas"),
    "tokens not numbers": (["--tokens", "1,x"], "'1,x': expected numbers and commas"),
    "tokens with a gap": (["--tokens", "1,,2"], "expected numbers and commas"),
    "prompt and tokens": (["hi", "--tokens", "1,2"], "needs a PROMPT or --tokens"),
    "neither prompt nor tokens": ([], "needs a PROMPT or --tokens"),
    "two prompts": (
        ["The", "capital"],
        "unexpected argument 'capital'; put a text of several",
    ),
    "no new tokens": (["hi", "-n", "0"], "--max-new-tokens 0: expected at least 1"),
    "negative new tokens": (["hi", "-n", "-3"], "--max-new-tokens -3: expected at least 1"),
    "new tokens not a number": (["hi", "-n", "many"], "invalid int value: 'many'"),
    "negative temperature": (["hi", "--temperature", "-1"], "--temperature -1.0: expected 0 or a positive"),
    "temperature nan": (["hi", "--temperature", "nan"], "--temperature nan: expected 0 or a positive"),
    "temperature inf": (["hi", "--temperature", "inf"], "--temperature inf: expected 0 or a positive"),
    "top-p 0": (["hi", "--top-p", "0"], "--top-p 0.0: expected above 0 and at most 1"),
    "top-p over 1": (["hi", "--top-p", "1.1"], "--top-p 1.1: expected above 0 and at most 1"),
    "top-p nan": (["hi", "--top-p", "nan"], "--top-p nan: expected above 0 and at most 1"),
    "top-k negative": (["hi", "--top-k", "-1"], "--top-k -1: expected 0 (all) or more"),
    "seed negative": (["hi", "--seed", "-1"], "--seed -1: expected 0 or more"),
    "stop empty": (["hi", "--stop", ""], "--stop"),
    "one stop of two empty": (["hi", "--stop", "a", "--stop", ""], "expected up to 32 non-empty strings"),
    "stop too long": (["hi", "--stop", "a" * 1025], "non-empty strings of up to 1024 characters"),
    "too many stops": (["hi", *["--stop", "a"] * 33], "expected up to 32 non-empty strings"),
    "max-context 0": (["hi", "--max-context", "0"], "--max-context 0: this model's context is 512"),
    "max-context too large": (
        ["hi", "--max-context", "513"],
        "--max-context 513: this model's context is 512",
    ),
    "layers 0": (["hi", "--layers", "0"], "--layers 0"),
    "layers negative": (["hi", "--layers", "-1"], "--layers -1"),
    "layers too many": (["hi", "--layers", "3"], "has 2 layers; choose from 1 to 2"),
    "unknown option": (
        ["hi", "--no-such-option"],
        "unrecognized option --no-such-option (see",
    ),
    "option without its value": (["hi", "--seed"], "argument --seed: expected one argument"),
    "unknown dtype": (["hi", "--dtype", "int4"], "invalid choice: 'int4'"),
    "unknown device": (["hi", "--device", "abacus"], "invalid choice: 'abacus'"),
}


@pytest.mark.parametrize("how", [BY_LAUNCHER, ALONE], ids=["launcher", "alone"])
@pytest.mark.parametrize("case", BAD_GENERATE)
def test_bad_prompt_or_option(refused, tiny, case, how):
    argv, expected = BAD_GENERATE[case]
    assert expected in refused("generate", *argv, "--model", tiny, *how)


@pytest.mark.parametrize("how", [BY_LAUNCHER, ALONE], ids=["launcher", "alone"])
@pytest.mark.parametrize("argv", [["hi"], ["--tokens", "1", "--stop", "x"]], ids=["prompt", "stop"])
def test_text_without_a_tokenizer(refused, tmp_path, argv, how):
    assert "no tokenizer.json" in refused("generate", *argv, "--model", NO_TOKENIZER, "--layers", 1, *how)
    directory = write_tiny(tmp_path / "model", tokenizer=False)
    assert "no tokenizer.json" in refused("generate", *argv, "--model", directory, *how)


@pytest.mark.parametrize(
    "tp",
    ["-1", "0", "5", "1000000", "9" * 30, "four", "", "2.5", "1e1", "0x2", "\N{ARABIC-INDIC DIGIT FOUR}"],
)
def test_bad_tp(refused, tiny, tp):
    assert f"--tp {tp}: " in refused("generate", "hi", "--model", tiny, "--tp", tp)


def test_too_many_ranks_are_told_the_limit(refused, tiny):
    assert "any size from 1 to 4 works" in refused("generate", "hi", "--model", tiny, "--tp", 5)


def test_tp_of_five_thousand_digits(refused, tiny):
    refused("generate", "hi", "--model", tiny, "--tp", "9" * 5000)


def test_bos_makes_an_empty_prompt_possible(tmp_path, capsys):
    directory = write_tiny(tmp_path / "model", bos=True)
    assert main(["generate", "", "--model", str(directory), "--tp", "1", "-n", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_token_ids"] == [BOS]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], 'no command given; try minitp generate "Once upon a time"'),
        (["sing"], "unknown command 'sing' (see minitp --help)"),
        (["generat", "hi"], "unknown command 'generat'; did you mean generate?"),
        (["Once upon a time"], "unknown command 'Once upon a time'; did you mean generate?"),
        (["run", "hi"], "did you mean generate?"),
        (["rankz"], "unknown command 'rankz' (see minitp --help)"),
        (["--no-such-option"], "unrecognized option --no-such-option (see minitp --help)"),
        (["--no-such-option", "generate"], "unrecognized option --no-such-option (see minitp --help)"),
        (["--versoin"], "unrecognized option --versoin; did you mean --version?"),
        (["--tp", "2", "generate", "hi"], "unrecognized option --tp (see minitp --help)"),
        (["serve", "some/model"], "unexpected argument 'some/model' (see minitp serve --help)"),
        (["generate", "hi", "--", "you"], "unexpected argument 'you'; put a text of several words in quotes"),
        (["perplexity"], "the following arguments are required: FILE"),
    ],
)
def test_bad_command(refused, argv, expected):
    line = refused(*argv)
    assert "--help" in line
    assert expected in line
    assert not re.search(r"\branks\b", line), "an internal command"


@pytest.mark.parametrize(
    ("argv", "beginning"),
    [
        (["generate", "hi", "--bogus", "--help"], "usage: minitp generate "),
        (["-h", "nonsense"], "usage: minitp COMMAND "),
        (["--version", "nonsense"], "minitp "),
    ],
)
def test_help_and_version_win_over_mistakes(capsys, argv, beginning):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code in (0, None)
    assert capsys.readouterr().out.startswith(beginning)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["generate", "hi", "--max-tokens", "5"],
            "--max-tokens; did you mean --max-new-tokens? (see",
        ),
        (["generate", "--temprature=1", "hi"], "--temprature; did you mean --temperature?"),
        (["generate", "hi", "--tensor-parallel-size", "2"], "--tensor-parallel-size; did you mean --tp?"),
        (["serve", "--max-model-len", "9"], "--max-model-len; did you mean --max-context?"),
        (["serve", "--gpu-memory-utilization", "1"], "--gpu-memory-utilization (see minitp serve --help)"),
        (["trace", "hi", "--outptu", "x"], "--outptu; did you mean --output?"),  # before "-o is required"
        (["generate", "hi", "-x"], "-x (see minitp generate --help)"),
        # Unambiguous abbreviations are rejected, too: a later option could make them ambiguous.
        (["generate", "hi", "--max", "5"], "--max (see minitp generate --help)"),
        (["generate", "hi", "--max-c", "5"], "--max-c; did you mean --max-context?"),
        (["generate", "hi", "--temp", "0"], "--temp; did you mean --temperature?"),
    ],
)
def test_an_option_that_does_not_exist(refused, argv, expected):
    assert refused(*argv).startswith(f"minitp: unrecognized option {expected}")


def test_words_that_only_look_like_options_are_prompts(tiny, capsys):
    argv = ["generate", "-n", "1", "--model", str(tiny), "--tp", "1", "--json"]
    for words in (["--tokens are words"], ["--", "--nope"]):
        assert main([*argv, *words]) == 0
        assert json.loads(capsys.readouterr().out)["prompt_token_ids"]


def test_aliases_stand_for_what_there_is():
    names = set(COMMANDS)
    for sub in parser().commands.values():
        names |= {name[2:].replace("-", "_") for name in sub._option_string_actions if len(name) > 2}
    assert set(filter(None, ALIASES.values())) <= names
    assert not names & set(ALIASES), "a name that exists needs no alias"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "ranks"])
def test_help_of_a_command_is_whole(name, capsys):
    """Every option is in a known group with a help that says its default, and the examples are valid."""
    sub = parser().commands[name]
    command = COMMANDS[name]
    assert command.summary
    assert command.summary[0].islower()
    assert command.description.endswith(".")
    assert command.examples
    for line, what in command.examples:
        words = shlex.split(line.partition(" < ")[0])
        assert parser().parse_args(words[1:]).command == name
        assert what
    for action in sub._actions:
        assert action.help, action.option_strings
        is_flag = action.nargs == 0 and action.option_strings
        if (
            action.option_strings
            and not is_flag
            and not action.required
            and action.dest not in ("of", "tokens")
        ):
            assert "(default: " in action.help, action.option_strings
    with pytest.raises(SystemExit):
        parser().parse_args([name, "--help"])
    text = capsys.readouterr().out
    titles = re.findall(r"^([a-z ]+):$", text, re.MULTILINE)
    assert [title for title in titles if not title.startswith("example")] == [
        title for title in GROUPS if title in titles
    ]


def test_auto_is_the_gpus_or_else_up_to_four_cores(monkeypatch):
    monkeypatch.setattr(environment, "gpus", lambda: 0)
    monkeypatch.setattr(environment, "physical_cores", lambda: 2)
    assert environment.ranks_wanted("auto") == 2
    monkeypatch.setattr(environment, "physical_cores", lambda: 64)
    assert environment.ranks_wanted("auto") == 4
    assert environment.ranks_wanted("7") == 7
    monkeypatch.setattr(environment, "gpus", lambda: 8)
    assert [environment.ranks_wanted("auto", device) for device in ("auto", "cuda", "cpu")] == [8, 8, 4]


@pytest.mark.parametrize(
    ("gpus", "cores", "replicas", "each"),
    [(8, 64, 2, 4), (8, 64, 3, 2), (1, 64, 2, 1), (0, 6, 2, 3), (0, 2, 4, 1)],
)
def test_replicas_divide_the_gpus_or_cores(monkeypatch, gpus, cores, replicas, each):
    monkeypatch.setattr(environment, "gpus", lambda: gpus)
    monkeypatch.setattr(environment, "physical_cores", lambda: cores)
    assert environment.ranks_wanted("auto", "auto", replicas) == each
    assert environment.ranks_wanted("5", "auto", replicas) == 5


def test_jobs_of_replicas_divide_the_cores(monkeypatch):
    monkeypatch.setattr(environment, "cores", lambda: 16)
    for name in [*environment.BLAS_THREADS, "SLURM_CPUS_PER_TASK"]:
        monkeypatch.delenv(name, raising=False)
    found = mpi_environment(2, (1, 4))
    assert (found["OMP_NUM_THREADS"], environment.replica_of(found)) == ("2", (1, 4))
    assert environment.replica_of(mpi_environment(2)) == (0, 1)
    assert environment.replica_of({}) == (0, 1)


def test_more_replicas_than_gpus(monkeypatch, refused, tiny):
    monkeypatch.setattr("minitp.launch.devices.gpus", lambda: 3)
    line = refused("check", "Hello", "--model", tiny, "--tp", 2, "--replicas", 2)
    assert line == (
        "minitp: --replicas 2 of 2 ranks: each rank needs a GPU, and this host has 3 GPUs for 4; use fewer, "
        "or --share-gpu (results are correct but slow), or --device cpu\n"
    )
    check_gpus("cpu", False, 2, 2)
    check_gpus("auto", True, 2, 2)
    check_gpus("auto", False, 3, 1)
    monkeypatch.setattr("minitp.launch.devices.gpus", lambda: 0)
    check_gpus("auto", False, 2, 2)


@pytest.mark.parametrize(("device", "gpus"), [("auto", 0), ("cpu", 3)])
def test_more_replicas_than_the_cores_allow(monkeypatch, refused, tiny, device, gpus):
    monkeypatch.setattr("minitp.launch.devices.gpus", lambda: gpus)
    monkeypatch.setattr("minitp.launch.devices.cores", lambda: 2)
    line = refused("check", "Hi", "--model", tiny, "--tp", 3, "--replicas", 11, "--device", device)
    assert line == (
        "minitp: --replicas 11 of 3 ranks: 33 ranks are too many for 2 cores; use at most 16 per core\n"
    )
    check_gpus(device, False, 2, 16)
    check_gpus(device, False, 33, 1)


def test_auto_is_at_most_a_rank_for_each_head(monkeypatch, tiny):
    monkeypatch.setattr(environment, "gpus", lambda: 0)
    monkeypatch.setattr(environment, "physical_cores", lambda: 64)
    assert ranks_to_start("auto", "auto", str(tiny)) == 4
    monkeypatch.setattr(environment, "gpus", lambda: 8)
    assert ranks_to_start("auto", "auto", str(tiny)) == 4, "the model has 4 heads"
    assert ranks_to_start("auto", "auto", "random:mistral-7b") == 8
    assert ranks_to_start("9", "auto", str(tiny)) == 9, "a number is checked with the model, and refused"


def test_tp_is_the_number_of_shares(tiny):
    assert ranks_to_start("auto", "auto", str(tiny), split="2,1,1") == 3
    assert ranks_to_start("3", "auto", str(tiny), split="2,1,1") == 3
    assert ranks_to_start("2", "auto", str(tiny), split="auto") == 2
    with pytest.raises(InputError, match="--tp 2, but --split '2,1,1' is for 3 ranks; omit --tp"):
        ranks_to_start("2", "auto", str(tiny), split="2,1,1")


@pytest.mark.parametrize(
    ("variables", "world", "rank"),
    [
        ({}, None, 0),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, 4, 3),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}, 2, 1),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, 8, 5),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None, 0),  # a shell
        ({"SLURM_NTASKS": "8"}, None, 0),  # a batch script, before srun
        ({"PMI_SIZE": "1", "PMI_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, None, 0),  # srun --mpi=pmi2 --pty
        ({"PMI_SIZE": "1", "PMI_RANK": "0", "MPI_LOCALNRANKS": "1"}, 1, 0),  # mpirun -n 1
        ({"PMIX_NAMESPACE": "slurm.pmix.7.0", "PMIX_RANK": "0"}, None, 0),  # a shell under PMIx
        ({"PMI_SIZE": "", "OMPI_COMM_WORLD_SIZE": "", "SLURM_STEP_NUM_TASKS": ""}, None, 0),
        ({"PMI_RANK": "", "OMPI_COMM_WORLD_RANK": "", "PMIX_RANK": "", "SLURM_PROCID": ""}, None, 0),
        ({"PMI_SIZE": "", "PMI_RANK": "", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, 4, 3),
    ],
)
def test_launchers_are_recognised(variables, world, rank):
    assert environment.world_size(variables) == world
    assert environment.env_rank(variables) == rank


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "command", ["generate hi", "perplexity text", "trace hi -o t", "check hi", "bench", "chat", "serve"]
)
def test_a_gpu_needs_cupy(tiny, refused, monkeypatch, command, tp):
    monkeypatch.setitem(sys.modules, "cupy", None)
    said = refused(*command.split(), "--model", tiny, "--device", "cuda", "--tp", tp)
    assert said.startswith("minitp: --device cuda needs CuPy: pip install 'minitp[cuda12]'")


@pytest.mark.parametrize("name", ["PMI_SIZE", "PMI_RANK"])
def test_a_variable_that_is_no_number(tiny, refused, monkeypatch, name):
    monkeypatch.setenv(name, "four")
    said = refused("generate", "hi", "--model", tiny, "--tp", "2")
    assert said == f"minitp: {name}=four: expected a number; unset the variable\n"


def test_ranks_of_the_launcher_are_a_world_of_their_own(monkeypatch):
    tuning = ["OMPI_MCA_btl", "PMIX_MCA_gds", "PRTE_MCA_rmaps", "MPICH_ASYNC_PROGRESS", "MPIR_CVAR_DEBUG"]
    tuning += ["UCX_TLS", "FI_PROVIDER", "HYDRA_IFACE", "I_MPI_DEBUG", "NCCL_DEBUG", "SLURM_JOB_ID", "HOME"]
    places = ["PMI_SIZE", "PMI_FD", "PMIX_NAMESPACE", "PMIX_RANK", "HYDI_CONTROL_FD", "MPI_LOCALRANKID"]
    places += ["OMPI_COMM_WORLD_RANK", "OMPI_MCA_ess_base_jobid", "PRTE_LAUNCHED", "SLURM_PROCID"]
    places += ["SLURM_STEP_NUM_TASKS", "HYDRA_HOST_FILE"]
    for name in [*tuning, *places]:
        monkeypatch.setenv(name, "7")
    found = mpi_environment(2)
    assert {found.get(name) for name in tuning} == {"7"}
    assert [name for name in places if name in found] == []


def test_cores_are_shared(monkeypatch):
    monkeypatch.setattr(environment, "cores", lambda: 10)
    empty = {"OMP_NUM_THREADS": "", "SLURM_CPUS_PER_TASK": ""}
    environment.limit_blas_threads(empty, 4)
    assert {empty[name] for name in environment.BLAS_THREADS} == {"2"}
    environment.limit_blas_threads(variables := {}, 4)
    assert set(variables) == set(environment.BLAS_THREADS)
    assert set(variables.values()) == {"2"}
    environment.limit_blas_threads(variables := {}, 40)
    assert variables["OMP_NUM_THREADS"] == "1"
    environment.limit_blas_threads(variables := {"OPENBLAS_NUM_THREADS": "7"}, 4)
    assert variables["OPENBLAS_NUM_THREADS"] == "7", "the user's own"
    assert variables["MKL_NUM_THREADS"] == "2"
    environment.limit_blas_threads(variables := {"OMP_NUM_THREADS": "7"}, 4)
    assert variables == {"OMP_NUM_THREADS": "7"}, "the user's own; BLAS would prefer another variable to it"


# --- models ---------------------------------------------------------------------------------------------


def spoil_config(directory):
    (directory / "config.json").write_text('{"model_type": "llama", ')


def spoil_config_bytes(directory):
    (directory / "config.json").write_bytes(b'{"model_type": "\xff"}')


def spoil_config_type(directory):
    (directory / "config.json").write_text("[1, 2]")


def remove_config(directory):
    (directory / "config.json").unlink()


def spoil_weights(directory):
    (directory / "model.safetensors").write_bytes(b"these are no safetensors " * 100)


def empty_weights(directory):
    (directory / "model.safetensors").write_bytes(b"")


def truncate_weights(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove_weights(directory):
    (directory / "model.safetensors").unlink()


def spoil_tokenizer(directory):
    (directory / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "nonsense"}}')


def spoil_tokenizer_json(directory):
    (directory / "tokenizer.json").write_text("{")


def spoil_index(directory):
    remove_weights(directory)
    (directory / "model.safetensors.index.json").write_text("{")


def miss_indexed_file(directory):
    remove_weights(directory)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


SPOILT = {
    spoil_config: ("config.json", "not valid JSON"),
    spoil_config_bytes: ("config.json", "not valid JSON"),
    spoil_config_type: ("config.json", "expected a JSON object"),
    remove_config: ("model", "has weights but no config.json"),
    spoil_weights: ("model.safetensors", "not a safetensors file"),
    empty_weights: ("model.safetensors", "not a safetensors file"),
    truncate_weights: ("model.safetensors", "truncated"),
    remove_weights: ("model", "neither model.safetensors nor"),
    spoil_tokenizer: ("tokenizer.json", "not a valid tokenizer.json"),
    spoil_tokenizer_json: ("tokenizer.json", "not a valid tokenizer.json"),
    spoil_index: ("model.safetensors.index.json", "not valid JSON"),
    miss_indexed_file: ("model-00001-of-00002.safetensors", "listed in the index, but missing"),
}


@pytest.mark.parametrize("how", [BY_LAUNCHER, ALONE], ids=["launcher", "alone"])
@pytest.mark.parametrize("spoil", SPOILT, ids=lambda function: function.__name__)
def test_spoilt_model(refused, tmp_path, spoil, how):
    directory = write_tiny(tmp_path / "model")
    spoil(directory)
    file, expected = SPOILT[spoil]
    line = refused("generate", "hi", "--model", directory, *how)
    assert expected in line
    assert str(directory.parent / "model" / file if file != "model" else directory) in line


@pytest.mark.parametrize("text", ["[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"], ids=["deep", "long"])
def test_config_that_json_gives_up_on(refused, tmp_path, text):
    directory = write_tiny(tmp_path / "model")
    (directory / "config.json").write_text(text)
    assert "config.json" in refused("generate", "hi", "--model", directory, *ALONE)


@pytest.mark.parametrize("how", [BY_LAUNCHER, ALONE], ids=["launcher", "alone"])
def test_no_such_model(refused, tmp_path, how):
    missing = tmp_path / "missing"
    assert f"--model {missing}: no such directory" in refused("generate", "hi", "--model", missing, *how)
    assert "--model : no such directory" in refused("generate", "hi", "--model", "", *how)
    line = refused("generate", "--tokens", "1", "--model", "random:gpt-9", *how)
    assert "--model random:gpt-9: unknown model" in line
    assert "smollm2-135m" in line, "the choices are named"


# --- perplexity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [BY_LAUNCHER, ALONE], ids=["launcher", "alone"])
def test_bad_perplexity_input(refused, tiny, tmp_path, how):
    def line(content, *argv):
        path = tmp_path / "text"
        if content is not None:
            path.write_bytes(content)
        return refused("perplexity", path, "--model", tiny, *how, *argv)

    assert "text: no such file" in line(None)
    assert "text: not UTF-8 text" in line(b"caf\xe9 au lait")
    assert "text: 0 tokens; perplexity needs at least 2" in line(b"")
    assert "text: 1 token; perplexity needs at least 2" in line(b"a")
    assert "--max-context 0" in line(b"some text", "--max-context", "0")
    assert "--max-context 513" in line(b"some text", "--max-context", "513")
    assert "--layers 9" in line(b"some text", "--layers", "9")
    line(b"some text", "--max-context", "1")
    assert "a directory, expected a file" in refused("perplexity", tmp_path, "--model", tiny, *how)
    assert "no tokenizer.json" in refused("perplexity", tmp_path / "text", "--model", NO_TOKENIZER, *how)


def test_perplexity_prints_its_number(tiny, tmp_path, capsys):
    (tmp_path / "text").write_text("It was a dark and stormy night.")
    argv = ["perplexity", str(tmp_path / "text"), "--model", str(tiny), "--tp", "1"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 31
    assert result["scored_tokens"] == 30
    assert result["perplexity"] > 1
    assert main(argv) == 0
    assert capsys.readouterr().out == f"perplexity {result['perplexity']:.4f} over 30 tokens\n"


# --- the real command -----------------------------------------------------------------------------------


def test_refusals_of_the_real_command(tiny, tmp_path):
    for argv, expected in [
        (["generate", "", "--model", tiny], b"the prompt is empty"),
        (["generate", "hi", "--model", tmp_path / "missing", "--tp", "1"], b"no such directory"),
        (["generate", "hi", "--model", tiny, "--tp", "nine"], b"--tp nine: expected a number of ranks"),
        (["generate", "hi", "--nope"], b"unrecognized option --nope"),
    ]:
        done = run_command(*argv)
        check_refusal(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert expected in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has bytes as arguments")
@pytest.mark.parametrize("how", [BY_LAUNCHER, ALONE], ids=["launcher", "alone"])
def test_argument_that_is_not_utf8(tiny, how):
    argv = [b"generate", b"caf\xe9", b"--model", os.fsencode(tiny), *map(os.fsencode, how)]
    done = subprocess.run([*map(os.fsencode, COMMAND), *argv], capture_output=True, timeout=120)
    check_refusal(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert b"argument 2 is not valid UTF-8: b'caf\\xe9'" in done.stderr


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_is_quick(argv):
    """The help needs neither numpy nor anything that imports it."""
    code = (
        "import sys, atexit\n"
        "heavy = 'numpy mpi4py tokenizers safetensors huggingface_hub ml_dtypes tqdm'.split()\n"
        "found = lambda: [name for name in heavy if name in sys.modules]\n"
        "atexit.register(lambda: print('loaded:', *found(), file=sys.stderr))\n"
        "from minitp.cli.main import main\n"
        "main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == "loaded:\n"
    assert ("minitp 0" if argv == ["--version"] else "usage: minitp") in done.stdout


def test_help_names_every_promised_option():
    text = run_command("generate", "--help").stdout.decode()
    options = (
        "--tokens --max-new-tokens --temperature --top-k --top-p --seed --stop --ignore-eos --no-kv-cache "
        "--max-context --layers --json --stats --model --tp --device --dtype --comm --verbose"
    )
    for option in ["-n", "-v", *options.split()]:
        assert f" {option}" in text, option


STATS = {"ttft_s", "decode_tokens_per_s", "weight_bytes_per_rank", "comm_share"}


def check_json(text, new_tokens):
    assert text.endswith("}\n")
    assert text.count("\n") == 1, "one object, on one line"
    result = json.loads(text)
    assert set(result) == {"prompt_token_ids", "token_ids", "text", "finish_reason", "stats"}
    assert set(result["stats"]) >= STATS
    assert len(result["token_ids"]) == new_tokens
    assert result["finish_reason"] == "length"
    assert result["stats"]["ttft_s"] > 0
    assert result["stats"]["decode_tokens_per_s"] > 0
    assert result["stats"]["weight_bytes_per_rank"] > 0
    assert 0 <= result["stats"]["comm_share"] <= 1
    return result


def test_json_and_text_agree(tiny, capsys):
    argv = ["generate", "hi", "--model", str(tiny), "--tp", "1", "-n", "20"]
    assert main([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    result = check_json(captured.out, new_tokens=20)
    assert len(result["prompt_token_ids"]) == 2

    assert main([*argv, "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.out == result["text"] + "\n"
    assert "2 prompt tokens" in captured.err, "--stats goes to stderr"
    assert "20 new tokens" in captured.err
    assert "MB of weights" in captured.err


def test_tokens_in_tokens_out(capsys):
    argv = ["generate", "--tokens", "1,2,3", "--model", NO_TOKENIZER, "--layers", "1", "--tp", "1", "-n", "4"]
    assert main([*argv, "--json"]) == 0
    result = check_json(capsys.readouterr().out, new_tokens=4)
    assert result["prompt_token_ids"] == [1, 2, 3]
    assert result["text"] is None
    assert main(argv) == 0
    assert capsys.readouterr().out.split() == [str(token) for token in result["token_ids"]]


def test_one_new_token_has_no_decode_speed(tiny, capsys):
    assert main(["generate", "hi", "--model", str(tiny), "--tp", "1", "-n", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["decode_tokens_per_s"] is None


def test_without_kv_cache_the_same_tokens(tiny, capsys, monkeypatch):
    steps, forward = [], Model.forward
    monkeypatch.setattr(
        Model,
        "forward",
        lambda self, ids, *rest, **at: steps.append(len(ids)) or forward(self, ids, *rest, **at),
    )
    argv = ["generate", "Once upon", "--model", str(tiny), "--tp", "1", "-n", "24", "--json"]
    assert main(argv) == 0
    tokens = json.loads(capsys.readouterr().out)["token_ids"]
    assert steps == [9] + 23 * [1]
    steps.clear()
    assert main([*argv, "--no-kv-cache"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == tokens
    assert steps == list(range(9, 9 + 24)), "the whole sequence each time"


def test_context_limit_ends_the_text(tiny, capsys):
    argv = [
        "generate",
        "abcd",
        "--model",
        str(tiny),
        "--tp",
        "1",
        "-n",
        "50",
        "--max-context",
        "10",
        "--json",
    ]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["token_ids"]) == 6
    assert result["finish_reason"] == "length"


def test_stop_string_is_cut_off(tiny, capsys):
    argv = ["generate", "hi", "--model", str(tiny), "--tp", "1", "-n", "60", "--json"]
    assert main(argv) == 0
    whole = json.loads(capsys.readouterr().out)
    stop = whole["text"][20:23]
    assert main([*argv, "--stop", stop, "--stop", "never in it"]) == 0
    cut = json.loads(capsys.readouterr().out)
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["token_ids"] == whole["token_ids"][: len(cut["token_ids"])]
    assert len(cut["token_ids"]) < 60


# --- sampling -------------------------------------------------------------------------------------------

SAMPLED = ["hi", "-n", "24", "--temperature", "0.9", "--top-p", "0.95"]


def test_same_seed_same_text(tiny, capsys):
    def text(*argv):
        assert main(["generate", *SAMPLED, "--model", str(tiny), "--tp", "1", "--json", *argv]) == 0
        return json.loads(capsys.readouterr().out)

    assert text("--seed", "7")["token_ids"] == text("--seed", "7")["token_ids"]
    assert text("--seed", "7")["token_ids"] != text("--seed", "8")["token_ids"]
    fresh = text()
    assert fresh["token_ids"] != text()["token_ids"], "without a seed it is random"
    assert fresh["token_ids"] == text("--seed", str(fresh["stats"]["seed"]))["token_ids"], (
        "the seed is reported"
    )


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["--presence-penalty", "1.5"], {"presence_penalty": 1.5}),
        (["--frequency-penalty", "-0.5"], {"frequency_penalty": -0.5}),
        (["--repetition-penalty", "1.3"], {"repetition_penalty": 1.3}),
        (["--logit-bias", '{"70": 6}'], {"logit_bias": {70: 6}}),
        (
            ["--min-p", "0.3", "--temperature", "1.5", "--seed", "2"],
            {"min_p": 0.3, "temperature": 1.5, "seed": 2},
        ),
    ],
)
def test_options_that_change_the_choice(tiny, capsys, argv, options):
    command = f"generate --tokens 65,66,65 -n 40 --tp 1 --json --model {tiny}".split()
    assert main([*command, *argv]) == 0
    found = json.loads(capsys.readouterr().out)["token_ids"]
    model = load_model(open_model(str(tiny), 1), SingleRank(), open_device())
    eos = model.config.eos_token_ids

    def tokens(**options):
        request = Request(SamplingParams(max_new_tokens=40, **options), eos, [65, 66, 65], 512)
        return list(generate(model, [65, 66, 65], request))

    assert found == tokens(**options)
    assert found != tokens()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--min-p", "1.5"], "--min-p 1.5: expected a number from 0 to 1"),
        (["--presence-penalty", "3"], "--presence-penalty 3.0: expected a number from -2 to 2"),
        (["--repetition-penalty", "0"], "--repetition-penalty 0.0: expected a number from 0.01 to 100"),
        (
            ["--logit-bias", '{"a": 1}'],
            "--logit-bias {'a': 1}: expected numbers from -100 to 100 by token id",
        ),
        (["--logit-bias", '{"999": 1}'], "--logit-bias: token id 999 is outside the vocabulary"),
        (["--logit-bias", "5"], "--logit-bias: '5': expected a JSON object"),
    ],
)
def test_an_option_that_is_out_of_range_is_rejected(tiny, capsys, argv, words):
    code = main(["generate", "hi", "--model", str(tiny), "--tp", "1", *argv])
    captured = capsys.readouterr()
    check_refusal(code, *captured)
    assert words in captured.err


@pytest.mark.mpi
def test_same_seed_same_text_on_ranks(tiny):
    argv = [*SAMPLED, "--model", tiny, "--tp", "2", "--seed", "7"]
    first = run_json(*argv)
    assert first["stats"]["tp"] == 2
    assert len(first["token_ids"]) == 24
    assert run_json(*argv)["token_ids"] == first["token_ids"]


@pytest.mark.parametrize("tp", [1, 3])
def test_top_k_of_one_is_greedy(tiny, tp):
    def tokens(comm, **options):
        model = load_model(open_model(str(tiny), tp), comm, open_device())
        request = Request(SamplingParams(max_new_tokens=24, **options), (), [1, 2], 512)
        return list(generate(model, [1, 2], request))

    greedy = run_threads(tp, tokens)
    assert greedy == run_threads(tp, lambda comm: tokens(comm, temperature=5.0, top_k=1, seed=3))
    assert greedy != run_threads(tp, lambda comm: tokens(comm, temperature=5.0, seed=3))
    assert all(rank == greedy[0] for rank in greedy)


@pytest.mark.filterwarnings("error")
def test_smallest_temperature_is_greedy(tiny, capsys):
    argv = ["generate", "hi", "--model", str(tiny), "--tp", "1", "-n", "8", "--json"]
    tokens = []
    for extra in [[], ["--temperature", "1e-310", "--seed", "1"]]:
        assert main([*argv, *extra]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert tokens[0] == tokens[1]


# --- a closed or full stdout ----------------------------------------------------------------------------


def read_and_close(*argv):
    """Run the command, read a byte of its stdout and close it; return the byte, the exit code and stderr."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([*COMMAND, *map(str, argv)], stdout=pipe, stderr=pipe, env=BUFFERED)
    first = os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    return first, process.returncode, errors


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A tiny model whose context would take minutes to fill."""
    return write_tiny(tmp_path_factory.mktemp("models") / "endless", max_position_embeddings=1_000_000)


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.mpi)])
def test_closed_stdout_ends_quietly(endless, tp):
    """`| head` reads a little and exits; the generation, which would take minutes, ends too."""
    argv = ["generate", "--tokens", "1,2,3", "--model", endless, "-n", "900000", "--ignore-eos", "--tp", tp]
    first, code, errors = read_and_close(*argv)
    assert len(first) == 1
    assert (code, errors) == (0, b"")


def run_without_reader(*argv):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return run_command(*argv, stdout=writer)
    finally:
        os.close(writer)


@pytest.mark.parametrize("extra", [[], ["--json"]], ids=["text", "json"])
def test_stdout_closed_before_anything_is_written(tiny, extra):
    done = run_without_reader("generate", "hi", "--model", tiny, "--tp", "1", "-n", "2", *extra)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_with_a_closed_stdout(argv):
    done = run_without_reader(*argv)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("extra", [[], ["--json"]], ids=["text", "json"])
def test_full_disk_is_reported(tiny, extra):
    with open("/dev/full", "wb") as full:
        done = run_command("generate", "hi", "--model", tiny, "--tp", "1", "-n", "2", *extra, stdout=full)
    assert done.returncode == 3
    assert done.stderr.startswith(b"minitp: ")
    assert done.stderr.count(b"\n") == 1
    assert b"No space left" in done.stderr


def test_text_that_the_locale_lacks(tmp_path):
    """A terminal with another encoding than UTF-8 shows substitutes, and the text continues."""
    environment = {**BUFFERED, "PYTHONIOENCODING": "ascii"}
    directory = write_tiny(tmp_path / "model")
    argv = ["generate", "hi", "--model", directory, "--tp", "1", "-n", "40", "--ignore-eos"]
    done = run_command(*argv, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_rank_never_becomes_a_launcher(tiny, monkeypatch, capsys):
    """An mpirun that does not say how many ranks it starts must not make each of them start ranks."""
    monkeypatch.setenv("MINITP_SUPERVISOR", "/nonexistent")
    assert main(["generate", "hi", "--model", str(tiny)]) == 3
    assert "neither PMI_SIZE nor OMPI_COMM_WORLD_SIZE" in capsys.readouterr().err


def test_perplexity_of_a_token_without_a_row(refused, tmp_path):
    """The tokenizer has more tokens than the model."""
    directory = write_tiny(tmp_path / "model", vocab_size=100)
    (tmp_path / "text").write_text("\u00e9\u00e9", encoding="utf-8")
    said = refused("perplexity", tmp_path / "text", "--model", directory, *ALONE)
    assert "outside the vocabulary, 0 to 99" in said
