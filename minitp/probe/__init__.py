"""The recording of another engine: its steps under the names of `minitp trace`, for `minitp compare`.

    import minitp.probe

    with minitp.probe.record(model, "engine.safetensors"):
        model(input_ids)

recipes.py   tables of module paths: which step an input or output is, and in which layout
record.py    `record`: hooks on the modules and functions of a PyTorch model, and the file
"""

from minitp.probe.record import record

__all__ = ["record"]
