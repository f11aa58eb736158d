"""Ranks on two hosts, which are namespaces of this machine: the same tokens, and an end after any fault."""

import ast
import json
import re
import sys

import hosts
import pytest
from paths import FAULTY_WORKER
from running import alone
from tiny import write_tiny

from minitp import LLM

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.hosts,
    pytest.mark.skipif(bool(hosts.missing()), reason=str(hosts.missing())),
]
MPIRUN = ["mpirun", "-hosts", "host-a,host-b"]
IMPATIENT = [  # the command with limits of a few seconds
    sys.executable,
    "-c",
    "import sys\n"
    "from minitp.cli.main import main\n"
    "from minitp.comm import wait\n"
    "wait.LATE_S, wait.LOST_S = 1, 3\n"
    "sys.exit(main())",
]
ENDLESS = ["generate", "--tokens", "1,2,3", "-n", "900000", "--ignore-eos"]


@pytest.fixture(scope="module")
def pair():
    with hosts.two_hosts() as pair:
        yield pair


@pytest.fixture
def endless(tmp_path):
    """Return the arguments of a run that takes minutes."""
    model = write_tiny(tmp_path / "endless", tokenizer=False, max_position_embeddings=1_000_000)
    return [*ENDLESS, "--model", model]


def run_both(first, argv, *options, ranks=4):
    done = first.run(*MPIRUN, *options, "-n", ranks, "minitp", *argv)
    return done.returncode, done.stdout, done.stderr


# Four ranks: two on each host. Three ranks: 0 and 2 on host-a by default; 0 and 1 with -ppn 2.
@pytest.mark.parametrize(("ranks", "options"), [(4, []), (3, []), (3, ["-ppn", "2"]), (2, [])])
@pytest.mark.parametrize("transport", ["auto", "mpi"])
def test_the_same_tokens(pair, tiny, capsys, ranks, options, transport):
    argv = ["generate", "Hello", "-n", "12", "--json", "--comm", transport, "--model", tiny]
    code, out, err = run_both(pair[0], argv, *options, ranks=ranks)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["token_ids"], found["stats"]["tp"]) == (alone(argv, capsys)["token_ids"], ranks)


def test_check_covers_every_rank(pair, tiny):
    code, out, err = run_both(pair[0], ["check", "Hello", "--model", tiny], ranks=3)
    assert (code, err) == (0, "")
    assert re.search(r"all steps within bounds .* on 3 ranks\)\n$", out)


@pytest.mark.parametrize("options", [[], ["-ppn", "2"]])
def test_replica_groups_stay_on_their_hosts(pair, options):
    """Place ranks 0 and 2 on host-a, as mpirun does by default, or with -ppn 2 ranks 0 and 1."""
    code = (
        "import platform\n"
        "from minitp.comm.groups import split_into_groups\n"
        "from minitp.comm.mpi import MpiComm\n"
        "from minitp.launch.transport import select_host_comm\n"
        "world = MpiComm()\n"
        "comm = select_host_comm(split_into_groups(world, 2))\n"
        "own = comm.rank, type(comm).__name__, platform.node(), comm.local_rank(), comm.name(0)\n"
        "found = comm.all_groups.allgather_object(own)\n"
        "if world.rank == 0: print(found)\n"
        "comm.close()"
    )
    done = pair[0].run(*MPIRUN, *options, "-n", 4, sys.executable, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    first_of_b = "rank 2" if options else "rank 1"
    assert ast.literal_eval(done.stdout) == [
        (rank, "SharedMemoryComm", host, rank, first)
        for host, first in (("host-a", "rank 0"), ("host-b", first_of_b))
        for rank in (0, 1)
    ]


@pytest.mark.parametrize(("ranks", "replicas"), [(4, 2), (4, 4), (6, 2), (2, 2)])
def test_replicas_on_two_hosts(pair, tiny, ranks, replicas):
    argv = ["check", "Hello", "--model", tiny, "--replicas", replicas]
    code, out, err = run_both(pair[0], argv, ranks=ranks)
    assert (code, err) == (0, "")
    assert out.endswith(f"; {replicas} replicas with the same bits\n")


def test_requests_reach_replicas_on_the_other_host(pair, tiny):
    code = (
        "import sys\n"
        "from minitp import LLM\n"
        "with LLM(sys.argv[1], replicas=2, cache_tokens=4096) as llm:\n"
        "    found = llm.generate([[n, 2, 3] for n in range(4)], max_new_tokens=8)\n"
        "    print([one.token_ids for one in found])\n"
    )
    done = pair[0].run(*MPIRUN, "-n", 4, sys.executable, "-c", code, tiny)
    assert (done.returncode, done.stderr) == (0, "")
    with LLM(tiny, tp=1) as llm:
        expected = llm.generate([[n, 2, 3] for n in range(4)], max_new_tokens=8)
    assert ast.literal_eval(done.stdout) == [one.token_ids for one in expected]


def test_shared_memory_needs_a_common_host(pair, tiny):
    argv = ["generate", "Hello", "--model", tiny, "--comm", "shm"]
    code, _, err = run_both(pair[0], argv, ranks=2)
    assert code == 2
    assert err == "minitp: --comm shm: no two ranks share a host; use --comm mpi\n"


@pytest.mark.parametrize("part", ["config", "weights"])
def test_another_model_on_the_other_host(pair, tmp_path, part):
    model = write_tiny(tmp_path / "model")
    other = {"config": {"rms_norm_eps": 1e-3}, "weights": {"seed": 1}}[part]
    different = write_tiny(tmp_path / "different", **other)
    with pair[1].seeing(different, model):
        code, out, err = run_both(pair[0], ["generate", "Hello", "--model", model], ranks=3)
    assert (code, out) == (2, "")
    assert err == (
        f"minitp: --model {model}: rank 1 on host-b found a different model than rank 0 on host-a "
        f"(in {part}); copy the same files to all hosts\n"
    )


def test_no_model_on_the_other_host(pair, tmp_path):
    model, empty = write_tiny(tmp_path / "model"), tmp_path / "empty"
    empty.mkdir()
    with pair[1].seeing(empty, model):
        code, out, err = run_both(pair[0], ["generate", "Hello", "--model", model], ranks=2)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"minitp: --model {model}: the directory is empty; .*\n", err)


def test_another_version_on_the_other_host(pair, tiny):
    code = (
        "import platform, sys\n"
        "import minitp\n"
        "minitp.__version__ = f'of {platform.node()}'\n"
        "from minitp.cli.main import main\n"
        "sys.exit(main())"
    )
    worker = [sys.executable, "-c", code, "generate", "Hello", "--model", tiny]
    done = pair[0].run(*MPIRUN, "-n", 3, *worker)
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(
        r"minitp: rank 0 \(pid \d+ on host-a\) has minitp of host-a and rank 1 \(pid \d+ on host-b\) "
        r"has of host-b; install the same version on all hosts\n",
        done.stderr,
    )


def started(pair, argv):
    """Start a run of four ranks on both hosts; wait until it writes tokens."""
    return hosts.started(pair[0].inside(*MPIRUN, "-n", 4, *IMPATIENT, *argv))


def test_a_killed_rank_ends_all(pair, endless):
    running = started(pair, endless)
    pair[1].run("pkill", "-KILL", "-n", "-f", "900000", check=True)
    code, err = hosts.ended(running, within=10)
    assert code in (9, 255)  # mpirun sets the code and writes the messages, which vary
    assert err
    for host in pair:
        host.check_nothing_runs("900000")


def test_a_stopped_rank_is_named_and_ends_all(pair, endless):
    running = started(pair, endless)
    pid = pair[1].run("pgrep", "-n", "-f", "900000", check=True).stdout.strip()
    pair[1].run("kill", "-STOP", pid, check=True)
    code, err = hosts.ended(running, within=15)
    assert code == 3
    rank = next(rank for rank in (1, 3) if f"rank {rank} (pid {pid} on host-b)" in err)
    # Rank 1 collects for host-b. So rank 0 waits for rank 1, and rank 1 knows which rank is missing.
    assert "has waited 1 s for rank 1 " in err
    assert "minitp: rank 0 on host-a failed: waited 3 s for rank 1 " in err
    if rank == 3:
        assert f"on host-b) has waited 1 s for rank 3 (pid {pid} on host-b)\n" in err
    for host in pair:
        host.check_nothing_runs("900000")


def test_rank_0_may_be_late(pair, tiny):
    """Let rank 0 be late: ranks that wait for it through another rank must not give up either."""
    fault = ["-genv", "MINITP_TEST_FAULT", "lag forward 0", "-genv", "MINITP_TEST_LOST_S", "1"]
    worker = FAULTY_WORKER
    argv = ["generate", "Hello", "-n", "8", "--ignore-eos", "--json", "--model", tiny]
    done = pair[0].run(*MPIRUN, *fault, "-n", 4, *worker, *argv)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 8
    # Ranks 1 and 3 are on host-b, where rank 1 collects for all: rank 3 cannot know why rank 1 is late.
    assert re.search(r"rank 3 \(pid \d+ on host-b\) has waited 0.5 s for rank 1 ", done.stderr)
    assert "for rank 0" not in done.stderr


def test_no_time_limit_for_large_objects(pair):
    """Gather 300 MB with allgather_object, which takes longer than LOST_S allows for other waits."""
    code = (
        "from minitp.comm import wait\n"
        "wait.LOST_S = 0.02\n"
        "from minitp.comm.mpi import MpiComm\n"
        "comm = MpiComm()\n"
        "parts = comm.allgather_object(bytes(300_000_000) if comm.rank == 0 else b'')\n"
        "assert [len(part) for part in parts] == [300_000_000, 0]"
    )
    done = pair[0].run(*MPIRUN, "-n", 2, sys.executable, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_rank_that_does_not_reach_the_end(pair):
    code = (
        "import time\n"
        "from minitp.comm import wait\n"
        "wait.LATE_S, wait.LOST_S = 0.5, 1\n"
        "from minitp.comm.mpi import MpiComm\n"
        "from minitp.launch.transport import select_host_comm\n"
        "comm = select_host_comm(MpiComm())\n"
        "comm.allgather_object(None)\n"
        "if comm.rank == 3: time.sleep(60)\n"
        "try: comm.close()\n"
        "except Exception as error:\n"
        "    print(error, flush=True)\n"
        "    comm.abort(3)"
    )
    done = pair[0].run(*MPIRUN, "-n", 4, sys.executable, "-c", code, timeout=20)
    assert done.returncode == 3
    assert re.match(r"waited 1 s for rank 3 \(pid \d+ on host-b\): it, or a rank", done.stdout)


def test_a_cut_cable_ends_the_job(pair, endless):
    running = started(pair, endless)
    hosts.set_cable(pair, "down")
    try:
        code, err = hosts.ended(running, within=15)
        pair[0].check_nothing_runs("900000")
    finally:
        hosts.set_cable(pair, "up")
    assert code == 3
    assert "minitp: rank 0 on host-a failed: waited 3 s for rank 1 (pid " in err
    pair[1].check_nothing_runs("900000")  # ranks there end once the cable is back


def test_the_wrong_interface(pair, tiny):
    """Add a network of the same name and address on both hosts that connects to nothing, as Docker does."""
    argv = ["generate", "Hello", "-n", "4", "--model", tiny]
    add = "ip link add docker0 type veth peer name inner; ip addr add 172.17.0.1/16 dev docker0"
    for host in pair:
        host.run("bash", "-c", f"{add}; ip link set docker0 up; ip link set inner up", check=True)
    try:
        wrong, right = (
            run_both(pair[0], argv, "-genv", "UCX_NET_DEVICES", name, ranks=2) for name in ("docker0", "eth0")
        )
    finally:
        for host in pair:
            host.run("ip", "link", "delete", "docker0", check=True)
    assert (wrong[0], "Destination is unreachable" in wrong[2]) == (15, True)
    assert (right[0], right[2]) == (0, "")
