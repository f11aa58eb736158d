"""The recording of another engine: its steps under the names of `minitp trace`, for `minitp judge`.

    import minitp.probe

    with minitp.probe.record(model, "engine.safetensors"):
        model(input_ids)

record.py      `record`: hooks on the modules of a model; start here
recorder.py    the steps that the hooks give, and the file; hooks.py: the hooks, by the tables of `mapping`
transformers.py, vllm.py, mlx.py: what each of these engines needs besides
ranks.py       the rank of this process, if the model is sharded
llama_cpp.py   `record_llama_cpp`, through the callback of llama.cpp; ggml.py: its arrays
"""

from minitp.probe.llama_cpp import record_llama_cpp
from minitp.probe.record import record

__all__ = ["record", "record_llama_cpp"]
