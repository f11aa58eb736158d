"""A /dev/shm of another size, for the processes of a mount namespace. Needs Linux and root.

    python tests/support/small_shm.py 100

starts `minitp serve --restart` with two ranks in a /dev/shm of 8 MB, kills a rank 100 times, and prints what
the restarts have left there.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import httpx
from served import Served, metric, write_chatty

MOUNT = 'mount -t tmpfs -o "$1" none /dev/shm && echo && exec sleep infinity'
RESTART_S = 30


@cache
def missing():
    """Return why this machine cannot have such a /dev/shm, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "another /dev/shm needs Linux and root"
    done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    return f"this machine allows no mount namespace: {done.stderr.strip()}" if done.returncode else None


class SharedMemory:
    """A /dev/shm that the commands of `inside` see; `pid` is a process that sees it, too."""

    def __init__(self, pid):
        self.pid = pid

    def inside(self, *command):
        return ["nsenter", "--mount", "--target", self.pid, *map(str, command)]

    def files(self):
        """Return the names of its files."""
        return os.listdir(f"/proc/{self.pid}/root/dev/shm")


@contextmanager
def shared_memory(options):
    """Yield a SharedMemory with these mount options, such as "size=8m"."""
    command = ["unshare", "--mount", "bash", "-c", MOUNT, "bash", options]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"\n"
            yield SharedMemory(str(process.pid))
        finally:
            process.kill()


def restart(served, times):
    """Kill a rank of a server again and again, each time after it has answered a request."""
    for number in range(times):
        answer = served.client().completions.create(model="model", prompt="Hi", max_tokens=2)
        assert answer.usage.completion_tokens >= 1
        lines = served.processes().items()
        ranks = sorted(pid for pid, line in lines if re.match(r"\S*python.* minitp ranks", line))
        os.kill(ranks[number % len(ranks)], signal.SIGKILL)
        deadline = time.monotonic() + RESTART_S
        while not (metric(served, "minitp_rank_restarts_total") > number and healthy(served)):
            assert time.monotonic() < deadline, served.lines
            time.sleep(0.1)


def healthy(served):
    return httpx.get(f"{served.url}/health").is_success


def main(times):
    if why_not := missing():
        sys.exit(f"small_shm.py: {why_not}")
    with tempfile.TemporaryDirectory() as folder, shared_memory("size=8m") as memory:
        model = write_chatty(Path(folder) / "model")
        command = memory.inside(sys.executable, "-m", "minitp")
        served = Served(model, "--tp", 2, "--restart", command=command)
        restart(served, times)
        served.stop()
        print(f"{times} restarts; files left in /dev/shm: {memory.files()}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
