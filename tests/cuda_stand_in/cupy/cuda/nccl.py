"""A stand-in for NCCL: ranks, as threads or processes, connect to a socket that the unique id names.

It is stricter than NCCL, which hangs or mixes up data if ranks make different calls: all ranks must make the
same call with the same arguments, and not on the null stream.
"""

import ctypes
import os
import pickle
import socket
import struct
import tempfile
import threading
from pathlib import Path

import ml_dtypes
import numpy as np

NCCL_SUM = 0
NCCL_INT8, NCCL_INT32, NCCL_INT64 = 0, 2, 4
NCCL_FLOAT16, NCCL_FLOAT32, NCCL_BFLOAT16 = 6, 7, 9
NCCL_UNIQUE_ID_BYTES = 128
DTYPES = {
    NCCL_INT8: np.int8,
    NCCL_INT32: np.int32,
    NCCL_INT64: np.int64,
    NCCL_FLOAT16: np.float16,
    NCCL_FLOAT32: np.float32,
    NCCL_BFLOAT16: ml_dtypes.bfloat16,
}


class NcclError(RuntimeError):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def get_version():
    return 23203


def get_build_version():
    return 23203


def get_unique_id():
    path = Path(tempfile.mkdtemp(prefix="nccl-")) / "meet"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    threading.Thread(target=_serve, args=(listener, path), daemon=True).start()
    return str(path).encode().ljust(NCCL_UNIQUE_ID_BYTES, b"\0")


def groupStart():
    pass


def groupEnd():
    pass


def _send(connection, value, payload=b""):
    head = pickle.dumps(value)
    connection.sendall(struct.pack("qq", len(head), len(payload)) + head + payload)


def _receive(connection):
    lengths = struct.unpack("qq", _exactly(connection, 16))
    return pickle.loads(_exactly(connection, lengths[0])), _exactly(connection, lengths[1])


def _exactly(connection, count):
    found = bytearray()
    while len(found) < count:
        piece = connection.recv(min(1 << 20, count - len(found)))
        if not piece:
            raise ConnectionError("closed")
        found += piece
    return bytes(found)


def _serve(listener, path):
    """Serve all ranks' calls in a thread of rank 0."""
    ranks, size = {}, None
    while size is None or len(ranks) < size:
        connection, _ = listener.accept()
        (rank, rank_size), _ = _receive(connection)
        if rank in ranks or size not in (None, rank_size):
            _send(connection, f"rank {rank} of {rank_size}: invalid argument")
            continue
        ranks[rank], size = connection, rank_size
    listener.close()
    path.unlink()
    path.parent.rmdir()
    connections = [ranks[rank] for rank in range(size)]
    for connection in connections:
        _send(connection, None)
    try:
        while True:
            calls = [_receive(connection) for connection in connections]
            heads = [head for head, _ in calls]
            if any(head != heads[0] for head in heads):
                error = f"ranks make different calls: {heads}"
                for connection in connections:
                    _send(connection, error)
                return
            result = _combine(heads[0], [payload for _, payload in calls])
            for connection in reversed(connections):  # rank 0 last: its next kernel may stop this thread
                _send(connection, None, result)
    except (ConnectionError, OSError):
        for connection in connections:
            connection.close()


def _combine(head, payloads):
    name, dtype = head[0], DTYPES[head[2]]
    if name == "broadcast":
        return payloads[head[3]]
    if name == "allGather":
        return b"".join(payloads)
    arrays = [np.frombuffer(payload, dtype) for payload in payloads]
    total = arrays[0].astype(np.promote_types(dtype, np.float32))
    for array in arrays[1:]:
        total += array
    return total.astype(dtype).tobytes()


class NcclCommunicator:
    def __init__(self, size, unique_id, rank):
        from . import Device

        if not isinstance(unique_id, bytes) or len(unique_id) != NCCL_UNIQUE_ID_BYTES:
            raise TypeError("a unique id is 128 bytes")
        if os.environ.get("STAND_IN_NCCL_FAILS") == str(rank):
            raise NcclError(2, "NCCL_ERROR_SYSTEM_ERROR: the stand-in fails")
        self._rank, self._size, self.calls, self._device = rank, size, [], Device().id
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(unique_id.rstrip(b"\0").decode())
        _send(self._socket, (rank, size))
        refusal, _ = _receive(self._socket)
        if refusal:
            raise NcclError(4, f"NCCL_ERROR_INVALID_ARGUMENT: {refusal}")

    def rank_id(self):
        return self._rank

    def size(self):
        return self._size

    def device_id(self):
        return self._device

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
        if op != NCCL_SUM:
            raise NotImplementedError
        self._enqueue(("allReduce", count, datatype), sendbuf, recvbuf, stream)

    def allGather(self, sendbuf, recvbuf, count, datatype, stream):
        self._enqueue(("allGather", count, datatype), sendbuf, recvbuf, stream)

    def broadcast(self, sendbuf, recvbuf, count, datatype, root, stream):
        self._enqueue(("broadcast", count, datatype, root), sendbuf, recvbuf, stream)

    def check_async_error(self):
        if self._socket is None:
            raise NcclError(5, "NCCL_ERROR_INVALID_USAGE: invalid usage")

    def abort(self):
        if self._socket is not None:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket = None

    def destroy(self):
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _enqueue(self, head, sendbuf, recvbuf, stream):
        from .stream import stream_of

        if self._socket is None:
            raise NcclError(5, "NCCL_ERROR_INVALID_USAGE: invalid usage")
        if not stream_of(stream).non_blocking:
            raise NcclError(4, "the stand-in needs the rank's own stream")
        self.calls.append(head)
        stream_of(stream).give(lambda: self._call(head, sendbuf, recvbuf), (sendbuf, recvbuf))

    def _call(self, head, sendbuf, recvbuf):
        nbytes = head[1] * np.dtype(DTYPES[head[2]]).itemsize
        try:
            _send(self._socket, head, ctypes.string_at(sendbuf, nbytes))
            error, result = _receive(self._socket)
        except (ConnectionError, OSError, AttributeError) as broken:
            raise NcclError(6, "NCCL_ERROR_REMOTE_ERROR: a rank has gone") from broken
        if error:
            raise NcclError(4, error)
        ctypes.memmove(recvbuf, result, len(result))
