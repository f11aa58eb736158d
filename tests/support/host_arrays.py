"""Conversion of a rank's arrays to NumPy while a hook of `faulty_model` computes with them.

NumPy's functions accept CuPy's arrays, but deliberately not the stand-in's. So a hook always gets NumPy
arrays, and `numpy` as `xp`, and its results are copied back to the GPU. On a CPU nothing is copied.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np


class HostArrays:
    """A converter of arrays between a Device and its host.

    Parameters
    ----------
    device : Device
    """

    def __init__(self, device):
        self._device, self._weights = device, []  # (GPU array, host array) for each array of a Layer

    def run(self, hook, original, *args, **kwargs):
        """Call hook(original, *args, **kwargs) with host arrays; `original` still runs on the device."""
        if not self._device.is_gpu:
            return hook(original, *args, **kwargs)

        def on_device(*args, **kwargs):
            return self.down(original(*self.up(args), **self.up(kwargs)))

        return self.up(hook(on_device, *self.down(args), **self.down(kwargs)))

    @contextmanager
    def lent(self, *objects):
        """Keep the array attributes of some objects on the host within a `with` block."""
        for thing in objects:
            vars(thing).update(self.down(vars(thing)))
        yield
        for thing in objects:
            vars(thing).update(self.up(vars(thing)))

    def of(self, layer):
        """Return a Layer with its arrays on the host; hooks get these same arrays as arguments too."""
        if layer is None or not self._device.is_gpu:
            return layer
        arrays = [x for x in vars(layer).values() if isinstance(x, self._device.cupy.ndarray)]
        self._weights = [(x, self._device.to_host(x)) for x in arrays]
        return SimpleNamespace(**self.down(vars(layer)))

    def down(self, x):
        """Copy x to the host: an array, an `xp`, or those in a tuple, list or dict; others are unchanged."""
        if not self._device.is_gpu or x is self._device.xp:
            return np if x is self._device.xp else x
        if isinstance(x, self._device.cupy.ndarray):
            known = [host for array, host in self._weights if array is x]
            return known[0] if known else self._device.to_host(x)
        return _each(self.down, x)

    def up(self, x):
        """Copy x back to the device, the inverse of `down`."""
        if not self._device.is_gpu or x is np:
            return self._device.xp if x is np else x
        if isinstance(x, np.ndarray) and not isinstance(x, self._device.cupy.ndarray):
            known = [array for array, host in self._weights if host is x]
            return known[0] if known else self._device.from_host(x)
        return _each(self.up, x)


def _each(move, x):
    if type(x) in (tuple, list):
        return type(x)(move(part) for part in x)
    return {name: move(part) for name, part in x.items()} if type(x) is dict else x
