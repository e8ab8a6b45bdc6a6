"""What runs in another environment, beside the benchmark: one peer with one model in one type, which decodes when it is told to.

This file is given to another Python as text, so it imports nothing of sparsec, and no package before it is asked for. Its argument
is JSON. It answers each line of its input with one line of JSON: `prefill` reads the prompt from an empty cache, `decode N` decodes
N tokens more, each the likeliest; both tell seconds and the last token. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter
from typing import Any

PACKAGES = ("llama_cpp", "openvino_genai")
BITS = {"INT8": 8, "INT4": 4}
GROUP = 64


class LlamaCpp:
    """llama.cpp, of a GGUF file that it quantises itself where another type is wanted."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        import llama_cpp
        import numpy

        self._numpy, self._library = numpy, llama_cpp
        path, kind = wanted["source"], wanted["type"]
        if kind != wanted["stored"]:
            made = os.path.join(wanted["folder"], kind + ".gguf")
            options = llama_cpp.llama_model_quantize_default_params()
            name = "LLAMA_FTYPE_ALL_F32" if kind == "F32" else "LLAMA_FTYPE_MOSTLY_" + kind
            options.ftype, options.nthread = getattr(llama_cpp, name), wanted["threads"]
            if llama_cpp.llama_model_quantize(path.encode(), made.encode(), options):
                raise RuntimeError("llama.cpp did not quantise the model to " + kind)
            path = made
        self._model = llama_cpp.Llama(
            path,
            n_ctx=wanted["positions"],
            n_batch=max(512, len(wanted["prompt"])),
            n_threads=wanted["threads"],
            n_threads_batch=wanted["threads"],
            verbose=False,
        )
        self._prompt, self._token = wanted["prompt"], 0

    def prefill(self) -> tuple[float, int]:
        """Seconds, and the token that follows the prompt."""
        self._model.reset()
        return self._eval(self._prompt), self._token

    def decode(self, tokens: int) -> tuple[float, int]:
        """Seconds of all of them, and the last one."""
        return sum(self._eval([self._token]) for _ in range(tokens)), self._token

    def _eval(self, tokens: list[int]) -> float:
        start = perf_counter()
        self._model.eval(tokens)
        logits = self._library.llama_get_logits_ith(self._model.ctx, -1)
        self._token = int(self._numpy.ctypeslib.as_array(logits, shape=(self._model.n_vocab(),)).argmax())
        return perf_counter() - start


class OpenVino:
    """OpenVINO GenAI, of a folder that optimum-intel converts. It reads the prompt anew before every round of tokens."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        import numpy
        import openvino
        import openvino_genai
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        kind, made = wanted["type"], os.path.join(wanted["folder"], "openvino-" + wanted["type"])
        options: dict[str, Any] = {"load_in_8bit": False}
        if kind in BITS:
            size = -1 if BITS[kind] == 8 else GROUP
            options = {"quantization_config": OVWeightQuantizationConfig(bits=BITS[kind], sym=True, group_size=size)}
        OVModelForCausalLM.from_pretrained(wanted["source"], export=True, compile=False, **options).save_pretrained(
            made
        )
        settings = {"INFERENCE_NUM_THREADS": wanted["threads"]}
        if kind not in BITS:
            settings["INFERENCE_PRECISION_HINT"] = {"F32": "f32", "BF16": "bf16", "F16": "f16"}[kind]
        self._pipeline = openvino_genai.LLMPipeline(made, "CPU", **settings)
        ids = numpy.array([wanted["prompt"]], dtype=numpy.int64)
        self._inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
        self._config = openvino_genai.GenerationConfig

    def prefill(self) -> tuple[float, int]:
        """Seconds, and the token that follows the prompt."""
        found = self._generate(1)
        return found.perf_metrics.get_ttft().mean / 1e3, int(found.tokens[0][0])

    def decode(self, tokens: int) -> tuple[float, int]:
        """Seconds of all of them, and the last one."""
        found = self._generate(tokens + 1)
        return found.perf_metrics.get_tpot().mean / 1e3 * tokens, int(found.tokens[0][-1])

    def _generate(self, tokens: int) -> Any:
        options = self._config(max_new_tokens=tokens, min_new_tokens=tokens, ignore_eos=True, do_sample=False)
        return self._pipeline.generate(self._inputs, options)


PEERS: dict[str, Any] = {"llama_cpp": LlamaCpp, "openvino_genai": OpenVino}


def importable() -> dict[str, dict[str, str]]:
    """Of each package its version, or why it cannot be imported."""
    found: dict[str, dict[str, str]] = {}
    for name in PACKAGES:
        try:
            module = __import__(name)
            found[name] = {"version": str(getattr(module, "__version__", "unknown"))}
        except Exception as error:  # of a library that does not load, say
            found[name] = {"missing": type(error).__name__ + ": " + str(error)}
    return found


def serve(wanted: dict[str, Any], told: Any) -> None:
    """Answers until the input ends."""

    def tell(**content: Any) -> None:
        told.write(json.dumps(content) + "\n")
        told.flush()

    try:
        peer = PEERS[wanted["package"]](wanted)
        tell(ready=True)
        for line in sys.stdin:
            what, *count = line.split()
            seconds, token = peer.prefill() if what == "prefill" else peer.decode(int(count[0]))
            tell(seconds=seconds, token=token)
    except Exception as error:
        tell(failed=type(error).__name__ + ": " + str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    """What the libraries print goes to the standard error, and only answers to the standard output."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    wanted = json.loads(sys.argv[1])
    if wanted is None:
        told.write(json.dumps(importable()) + "\n")
        told.flush()
    else:
        serve(wanted, told)


if __name__ == "__main__":
    main()
