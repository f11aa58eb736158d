"""The recording of another engine: its steps under the names of `minitp trace`, for `minitp compare`.

    import minitp.probe

    with minitp.probe.record(model, "engine.safetensors"):
        model(input_ids)

record.py    `record`: hooks on the modules and functions of a PyTorch model, and the file
"""

from minitp.probe.record import record

__all__ = ["record"]
