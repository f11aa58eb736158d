"""The refusal of quantized checkpoints, which minitp reads only as GGUF files."""

from minitp.errors import InputError, shown

# Fields of config.json, each with its method if the field itself has no quant_method.
FIELDS = {"quantization_config": None, "compression_config": "compressed-tensors", "quantization": "MLX"}
METHODS = {"fp8": "FP8", "awq": "AWQ", "gptq": "GPTQ", "mxfp4": "MXFP4"}  # in their usual spelling

# The names of tensors in place of `.weight`, with the methods that use them.
TENSORS = {"qweight": "GPTQ or AWQ", "weight_packed": "compressed-tensors"}

WAY_OUT = "use an unquantized checkpoint of this model, or a GGUF file"


def refuse_quantized_config(fields, where):
    """Raise InputError if the fields of a config.json say that the weights are quantized."""
    for name, method in FIELDS.items():
        value = fields.get(name)
        if value is None:
            continue
        entries = value if isinstance(value, dict) else {}
        if "load_in_4bit" in entries or "load_in_8bit" in entries:  # older files have no quant_method
            method = "bitsandbytes"
        method = entries.get("quant_method") or method
        method = shown(value) if method is None else METHODS.get(str(method), str(method)[:40])
        raise InputError(
            f"{where}: {name}: the weights are quantized ({method}), which is not supported; {WAY_OUT}"
        )


def refuse_quantized_tensor(tensors, missing, where):
    """Raise InputError if a checkpoint has a quantized tensor in place of the one that is missing."""
    for suffix, method in TENSORS.items():
        name = f"{missing.rpartition('.')[0]}.{suffix}"
        if name in tensors:
            raise InputError(
                f"{where}: tensor {name} instead of {missing}: the weights are quantized ({method}), "
                f"which is not supported; {WAY_OUT}"
            )


def hint_for(dtype):
    """Return the way out for a tensor of an integer or 8-bit dtype (safetensors' name), or ""."""
    return f"; {WAY_OUT}" if dtype.startswith(("F8", "F4", "F6", "I", "U")) else ""
