"""Saved models: safetensors and JSON, nothing that is executed.

A folder holds `config.json`, whose `quantization_config` (record.py) tells how every packed matrix lies, and tensors in files that
it names. `save` and `load_saved` are for any module; transformers loads such a folder too once sparsec is imported (hub.py).
"""

from sparsec.checkpoint.reading import load_saved
from sparsec.checkpoint.writing import save

__all__ = ["load_saved", "save"]
