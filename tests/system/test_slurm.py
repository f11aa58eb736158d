"""Slurm on two hosts: ranks that srun starts, and a launcher whose ranks stay on its own host."""

import json
import subprocess

import hosts
import pytest
import slurm_hosts
from running import alone
from tiny import write_tiny

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.hosts,
    pytest.mark.skipif(bool(slurm_hosts.missing()), reason=str(slurm_hosts.missing())),
]
TASKS = ["-N", "2", "-n", "4", "-O"]


class Slurm:
    def __init__(self, pair):
        self.pair, self.variable = pair, slurm_hosts.start(pair, pair[0].folder)

    def inside(self, *command):
        """Return the command line for host-a; as on most clusters, the hosts do not share TMPDIR."""
        return self.pair[0].inside("env", self.variable, "TMPDIR=/run", *command)

    def __call__(self, *command):
        return subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def slurm():
    with hosts.two_hosts() as pair:
        yield Slurm(pair)


@pytest.fixture
def argv(tiny):
    return ["generate", "Hello", "-n", "8", "--json", "--model", tiny]


@pytest.mark.parametrize("start", [["srun", "--mpi=pmi2", *TASKS], ["salloc", *TASKS, "mpirun"]])
def test_the_same_tokens(slurm, argv, capsys, start):
    done = slurm(*start, "minitp", *argv)
    assert done.returncode == 0, done.stderr
    assert "minitp" not in done.stderr
    found = json.loads(done.stdout)
    assert (found["token_ids"], found["stats"]["tp"]) == (alone(argv, capsys)["token_ids"], 4)


def test_srun_without_pmi(slurm, argv):
    done = slurm("srun", "--mpi=none", *TASKS, "minitp", *argv)
    assert (done.returncode, done.stdout) == (3, "")
    said = [line for line in done.stderr.splitlines() if line.startswith("minitp: ")]
    assert len(said) == 1
    assert "srun started 4 processes but mpi4py sees a world of 1" in said[0]
    assert said[0].endswith("use srun --mpi=pmi2, or another type that srun --mpi=list shows")


def test_the_launcher_starts_all_ranks_on_its_host(slurm, argv, capsys):
    done = slurm("salloc", *TASKS, "minitp", *argv, "--tp", "4")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == alone(argv, capsys)["token_ids"]
    assert "one of the 2 nodes of the allocation; to use them all, run srun -K" in done.stderr


@pytest.mark.parametrize("kind", ["pmi2", "none"])
def test_a_shell_of_srun_is_no_rank(slurm, argv, kind):
    done = slurm(
        "srun", f"--mpi={kind}", "-n", "1", "bash", "-c", '"$@"', "bash", "minitp", *argv, "--tp", "2"
    )
    assert (done.returncode, json.loads(done.stdout)["stats"]["tp"]) == (0, 2), done.stderr


def test_a_killed_rank_ends_all(slurm, tmp_path):
    model = write_tiny(tmp_path / "endless", tokenizer=False, max_position_embeddings=1_000_000)
    endless = ["minitp", "generate", "--tokens", "1,2,3", "-n", "900000", "--ignore-eos", "--model", model]
    running = hosts.started(slurm.inside("srun", "-K", "--mpi=pmi2", *TASKS, *endless))
    slurm.pair[1].run("pkill", "-KILL", "-n", "-f", "minitp generate.*900000", check=True)
    code, err = hosts.ended(running, within=15)
    assert code != 0
    assert "srun: error: host-b: task" in err
    for host in slurm.pair:
        host.check_nothing_runs("minitp generate.*900000")
