"""The `minitp` command with a fault in one of its ranks; test_processes starts it instead of `minitp`.

MINITP_TEST_FAULT names the fault, the place and the rank, for example "kill forward 2". MINITP_TEST_LOST_S is
the number of seconds after which rank 0 gives up on another rank; it warns after half that time.

    raise   an unexpected exception
    kill    SIGKILL
    exit    the process exits silently with code 7
    lag     a delay of three seconds
    stop    SIGSTOP
    stick   a delay of ten minutes; other ranks wait inside NCCL for only one second
    spoil   one column of the loaded weights is multiplied by 1.001

    starting   before anything else
    importing  a package is missing (the only possible fault is `raise`)
    loading    while the weights are loaded (the only place for `spoil`)
    forward    in the fifth forward pass
    batch      in the fifth forward pass of a rank that serves requests
    launch     in the fifth decode pass on a GPU
"""

import os
import signal
import sys
import time

from minitp.cli import main as cli
from minitp.comm import wait
from minitp.util.environment import env_rank

FORWARD_CALL = 5


def fail(kind):
    """Cause the fault, after printing a message that the test looks for in the output."""
    print(f"last words of rank {env_rank(os.environ)}", file=sys.stderr, flush=True)
    if kind == "raise":
        raise ZeroDivisionError("a fault\nfor the test")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "exit":
        os._exit(7)
    time.sleep({"lag": 3, "stick": 600, "stop": 0}[kind])


def plant(kind, place):
    """Make `place` fail once."""
    if place == "starting":
        fail(kind)
        return
    if place == "importing":
        sys.modules["ml_dtypes"] = None
        return
    from minitp.cuda.decode_graph import DecodeGraph
    from minitp.loading.weights import Loader
    from minitp.model import Model

    if kind == "spoil":
        load = Loader.load
        Loader.load = lambda loader: spoilt(load(loader))
        return
    owner, name, fatal_call = {
        "loading": (Loader, "load", 1),
        "forward": (Model, "forward", FORWARD_CALL),
        "batch": (Model, "forward_batch", FORWARD_CALL),
        "launch": (DecodeGraph, "launch", FORWARD_CALL),
    }[place]
    right = getattr(owner, name)
    calls = 0

    def wrong(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == fatal_call:
            fail(kind)
        return right(*args, **kwargs)

    setattr(owner, name, wrong)


def spoilt(weights):
    """Multiply one column of the last layer's down projection by 1.001."""
    weights.layers[-1].w_down[:, 3] *= 1.001
    return weights


if __name__ == "__main__":
    what, where, rank = os.environ["MINITP_TEST_FAULT"].split()
    if "MINITP_TEST_LOST_S" in os.environ:
        wait.LOST_S = float(os.environ["MINITP_TEST_LOST_S"])
        wait.LATE_S = wait.LOST_S / 2
    if what == "stick":
        from minitp.cuda.nccl import NcclComm

        NcclComm.__init__.__defaults__ = (1.0, False)  # patience_s, auto
    if env_rank(os.environ) == int(rank):
        plant(what, where)
    sys.exit(cli.main())
