"""A decode pass (`decode_pass`) that is captured as a CUDA graph and replayed for every token.

Everything that changes from one token to the next (tokens, lengths, block tables) is read from GPU memory,
and all memory is allocated in advance. So a pass is captured once per batch size and replayed for every
token, whatever the lengths are.
"""

from minitp.cuda.comm import LocalComm, captured, in_turn
from minitp.cuda.decode_pass import DecodePass


class DecodeGraph(DecodePass):
    """A decode pass whose launches are captured at the first `launch`, if its collectives can be captured.

    Parameters
    ----------
    model, pool, batch, most_blocks
        The same as for DecodePass.
    """

    def __init__(self, model, pool, batch, most_blocks):
        super().__init__(model, pool, batch, most_blocks)
        self._graph = None

    def launch(self):
        """Run the pass, as a graph if the collectives can be captured."""
        if not self.comm.capturable:
            self.run()
            return
        if self._graph is None:
            self._compile()
            self._graph = self._captured()
        with self.comm.launching():
            self._graph.launch(self.model.device.stream)

    def _compile(self):
        """Compile all kernels, which must be done before the capture, by running a pass over padding.

        The pass uses no collectives, so no rank waits in one. Rank 0 compiles first; then the other ranks
        find the kernels in CuPy's cache.
        """
        comm, state = self.comm, self._state.copy()
        self.comm = LocalComm(comm, self.model.device)
        self.fill([], [], [])
        in_turn(comm, self.run)
        self.comm = comm
        self._state[...] = state

    def _captured(self):
        return captured(self.model.device, self.run)
