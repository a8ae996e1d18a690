"""The base model: loading, quantization, attention route, paged KV memory and adapter modules."""
