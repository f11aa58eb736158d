"""Two hosts on one machine: namespaces joined by a virtual cable, each with its own name and SSH server.

    host-a   10.99.0.1  eth0 <----------> eth0  10.99.0.2   host-b

    python tests/support/hosts.py mpirun -hosts host-a,host-b -n 4 minitp generate "The capital of France is"

runs a command on host-a. The hosts have separate networks, processes and shared memory; they share all files,
as a cluster with a common file system does. Needs Linux, root, and Debian's iproute2 and openssh-server.
"""

import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

ADDRESSES = {"host-a": "10.99.0.1", "host-b": "10.99.0.2"}
SSHD = "/usr/sbin/sshd"  # often not in the PATH; sshd must be started by its absolute path
START_S = 10
FIRST_OUTPUT_S = 60
NAMESPACES = ["--net", "--uts", "--mount", "--ipc", "--pid", "--mount-proc"]

START_HOST = f"""
set -e
hostname "$1"
ip link set lo up
for place in /run /dev/shm; do mount -t tmpfs none $place; done
mkdir /run/sshd /run/cgroup
mount --rbind /sys/fs/cgroup /run/cgroup
mount -t sysfs none /sys # a new mount shows the interfaces of this namespace
mount --rbind /run/cgroup /sys/fs/cgroup
for file in hosts ssh/ssh_config; do mount --bind "$2/$(basename $file)" /etc/$file; done
exec {SSHD} -D -e -f "$2/sshd_config" 2>"$2/$1.log"
"""


@cache
def missing():
    """Return why this machine cannot have such hosts, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "several hosts on one machine need Linux and root"
    for program in ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", SSHD):
        if shutil.which(program) is None:
            return f"several hosts on one machine need {program}: apt install iproute2 openssh-server"
    done = subprocess.run(["unshare", "--fork", *NAMESPACES, "true"], capture_output=True, text=True)
    return f"this machine allows no namespaces: {done.stderr.strip()}" if done.returncode else None


class Host:
    """A running host; `pid` is its first process, and all others end with it."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        command = ["unshare", "--fork", "--kill-child", *NAMESPACES]
        self.process = subprocess.Popen(
            [*command, "bash", "-c", START_HOST, "bash", name, folder], stderr=subprocess.DEVNULL
        )
        self.pid = wait_for(self._child)

    def _child(self):
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return children.read_text().strip() if children.exists() else ""

    def inside(self, *command, cwd=None):
        """Return the command line that runs a command on this host, with this Python first in the PATH."""
        path = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"
        words = [str(word) for word in command]
        return ["nsenter", "--all", f"--wdns={cwd or os.getcwd()}", "--target", self.pid, "env", path, *words]

    def run(self, *command, timeout=60, check=False):
        return subprocess.run(
            self.inside(*command), capture_output=True, text=True, timeout=timeout, check=check
        )

    def check_nothing_runs(self, pattern):
        """Check that within seconds no command line matches the pattern; kill the processes that still do."""
        deadline = time.monotonic() + 5
        while (left := self.run("pgrep", "-fa", pattern).stdout) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.run("pkill", "-KILL", "-f", pattern)
        assert not left

    @contextmanager
    def seeing(self, other, directory):
        """Mount the directory `other` over another directory on this host while the block runs."""
        self.run("mount", "--bind", other, directory, check=True)
        try:
            yield
        finally:
            self.run("umount", directory, check=True)


def started(command):
    """Start a command and wait up to FIRST_OUTPUT_S for its first output; return the Popen."""
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not select.select([running.stdout], [], [], FIRST_OUTPUT_S)[0]:
        running.kill()
        raise AssertionError(f"no output after {FIRST_OUTPUT_S} s: {running.communicate()[1]}")
    assert running.stdout.read(1)
    return running


def ended(running, within):
    """Wait for the end and return (exit code, stderr); kill the command after a time limit."""
    try:
        _, err = running.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        running.kill()
        raise AssertionError(f"still running after {within} s: {running.communicate()[1]}") from None
    return running.returncode, err


def set_cable(pair, state):
    """Connect the cable ("up") or disconnect it ("down"); return when both hosts have noticed."""
    for host in pair:
        host.run("ip", "link", "set", "eth0", state, check=True)
    look = ["cat", "/sys/class/net/eth0/operstate"]
    for host in pair:
        wait_for(lambda host=host: host.run(*look).stdout == f"{state}\n")


@contextmanager
def two_hosts():
    """Yield [host-a, host-b]; when the block is left, all their processes are killed. One pair at a time."""
    lock = open(Path(tempfile.gettempdir(), "minitp-hosts.lock"), "w")  # noqa: SIM115  closed by the block
    with lock, tempfile.TemporaryDirectory(prefix="minitp-hosts-") as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_files(Path(folder))
        hosts = [Host(name, folder) for name in ADDRESSES]
        try:
            a, b = hosts
            cable = f"ip link add eth0 netns {a.pid} type veth peer name eth0 netns {b.pid}"
            wait_for(lambda: a.run("test", "-d", "/run/sshd").returncode == 0)
            subprocess.run(cable.split(), check=True)
            for host in hosts:
                address = f"{ADDRESSES[host.name]}/24"
                host.run("ip", "addr", "add", address, "dev", "eth0", check=True)
            set_cable(hosts, "up")
            for one, other in ((a, b), (b, a)):
                wait_for(lambda one=one, other=other: one.run("ssh", other.name, "true").returncode == 0)
            yield hosts
        finally:
            for host in hosts:
                with suppress(ProcessLookupError):
                    os.kill(int(host.pid), signal.SIGKILL)  # the first process, which ends the host
                host.process.wait()


def write_files(folder):
    """Write the keys, names and settings that both hosts share, as a cluster's administrator would."""
    for name in ("user_key", "host_key"):
        make_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
        subprocess.run(make_key, check=True)
    names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    (folder / "ssh_config").write_text(
        f"Host *\n IdentityFile {folder}/user_key\n UserKnownHostsFile {folder}/known_hosts\n"
        " StrictHostKeyChecking accept-new\n BatchMode yes\n LogLevel ERROR\n"
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\n"
        "PidFile none\nUsePAM no\n"
    )


def wait_for(look):
    """Call `look` until it returns something true; return that."""
    deadline = time.monotonic() + START_S
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no host within {START_S} s")
        time.sleep(0.02)
    return found


def run_as_command(why_not, prepare=lambda pair: ()):
    """Run the script's arguments as a command on host-a, after the words that `prepare` returns."""
    if why_not:
        sys.exit(f"{Path(sys.argv[0]).name}: {why_not}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that the hosts are removed
    with two_hosts() as pair:
        sys.exit(subprocess.run(pair[0].inside(*prepare(pair), *sys.argv[1:])).returncode)


if __name__ == "__main__":
    run_as_command(missing())
