"""A pruned model on a task of lm-evaluation-harness: it is an ordinary transformers model, so nothing has to be told twice.

pip install "sparsec[eval]"
python examples/lm_eval_task.py                       # a small random model, which can only guess
python examples/lm_eval_task.py MODEL "wanda(0.5),freeze,lower(auto)"

A saved model is named as any other, by its folder. lm-eval's own command knows it once sparsec is imported:

python -c "import sparsec, lm_eval.__main__ as m; m.cli_evaluate()" --model hf --model_args pretrained=FOLDER \
    --tasks arc_easy

The task is made of local data here; `tasks=["arc_easy"]` and the like take theirs from the hub.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import sparsec
from sparsec.calibrate import windows
from sparsec.data import load_model

QUESTIONS = [
    ("The opposite of hot is", ["cold", "warm", "loud", "green"]),
    ("The day after Monday is", ["Tuesday", "Friday", "Sunday", "March"]),
    ("Two plus two is", ["four", "seven", "eleven", "one"]),
    ("The capital of France is", ["Paris", "Madrid", "Tokyo", "Cairo"]),
    ("Water freezes into", ["ice", "steam", "sand", "wood"]),
    ("A baby dog is called a", ["puppy", "kitten", "calf", "chick"]),
    ("The sun rises in the", ["east", "west", "north", "evening"]),
    ("We see with our", ["eyes", "ears", "hands", "shoes"]),
]
"""The first answer is the right one."""


def task(folder: Path) -> dict[str, Any]:
    """A multiple-choice task on a file of QUESTIONS in the folder."""
    file = folder / "questions.jsonl"
    rows = [{"question": question, "choices": choices, "answer": 0} for question, choices in QUESTIONS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "task": "everyday",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }


def main(name: str = "tiny", passes: str = "wanda(0.5),freeze,lower(auto)") -> dict[str, float]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        sys.exit('this example needs lm-eval: pip install "sparsec[eval]"')

    loaded = load_model(name)
    sequences, length = (4, 64) if name == "tiny" else (32, 1024)
    tokens = windows(None, loaded.tokenizer, sequences, length)
    sparse = sparsec.compile(loaded.model, passes, calibration=tokens)

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, model in {"dense": loaded.model, passes: sparse}.items():
            harness = HFLM(pretrained=model, tokenizer=loaded.tokenizer, batch_size=4)
            results = lm_eval.simple_evaluate(harness, tasks=[task(Path(folder))], bootstrap_iters=0)
            found[label] = results["results"]["everyday"]["acc,none"]
        sparse.save_pretrained(folder, tokenizer=loaded.tokenizer)
        named = {"pretrained": folder, "device": str(sparse.device)}
        results = lm_eval.simple_evaluate("hf", named, tasks=[task(Path(folder))], batch_size=4, bootstrap_iters=0)
        found["saved"] = results["results"]["everyday"]["acc,none"]
    for label, right in found.items():
        print(f"{label:<36} right answers {right:.3f} of {len(QUESTIONS)} questions")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
