"""Where models and texts come from: folders, GGUF files, hub ids, the packaged model, and texts to evaluate on."""

from sparsec.data.models import LoadedModel, load_model
from sparsec.data.text import Text, load_text

__all__ = ["LoadedModel", "Text", "load_model", "load_text"]
