"""`sparsec compress` killed with SIGKILL at random moments: with `--resume` it writes the files of a run that is left alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsec.checkpoint.checking import examine
from sparsec.data import load_model

HERE = Path(__file__).parent
PASSES = (
    "wanda(0.5, order='true'),freeze,sparsity,flops,fuse,lower(bitmap)",
    "sparsegpt(0.5),freeze,recover(method='blocks', steps=2, length=64),round('int8'),lower(csr, values='int8')",
    "magnitude(0.5),freeze,recover(steps=2, length=64),fuse,lower(auto)",
)


def small(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder with a tiny model in several files and its tokenizer."""
    loaded = load_model("tiny", dtype)
    loaded.model.save_pretrained(folder, max_shard_size="60KB")
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("passes", PASSES)
def test_killed_at_any_moment_it_goes_on_and_writes_the_same_files(passes: str, tmp_path: Path) -> None:
    kills = int(os.environ.get("SPARSEC_KILLS", "3"))
    small(tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(str(number**3) for number in range(200)))
    drawn = ["--calibration", str(tmp_path / "text"), "--calibration-sequences", "4", "--calibration-length", "64"]
    options = ["--passes", passes, *drawn, "--max-shard-size", "50KB"]
    words = [str(kills), "0", str(tmp_path / "record.json"), str(tmp_path / "model"), str(tmp_path / "a ü"), *options]
    ended = subprocess.run(
        [sys.executable, str(HERE / "killed_compress.py"), *words], capture_output=True, text=True, timeout=1500
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((tmp_path / "record.json").read_text())
    print({key: found[key] for key in ("seconds", "kills")}, len(found["results"]), "results")
    assert found["kills"] >= kills
    first, *others = ({n: h for n, h in each.items() if _same(n)} for each in found["results"])
    assert len(first) > 5
    assert others
    assert all(first == other for other in others)
    assert len({json.dumps(_timeless(each), sort_keys=True) for each in found["configs"]}) == 1
    once = len(found["learnt"][0])
    for learnt in found["learnt"]:  # a site that was learnt and not yet kept is learnt again
        assert once <= len(learnt) <= once + found["kills"]
    assert examine(tmp_path / "a ü").faults == []
    assert sorted(path.name for path in tmp_path.iterdir() if "unfinished" in path.name) == []


def _same(name: str) -> bool:
    """A report holds times, a config its name; a model card tells them."""
    return not re.fullmatch(r"report-.*\.json|config\.json|README\.md", name)


def _timeless(config: dict[str, Any]) -> dict[str, Any]:
    record = config["quantization_config"]
    passes = [{k: v for k, v in each.items() if k == "spec"} for each in record.get("passes", [])]
    return {**config, "quantization_config": {**record, "report": None, "passes": passes}}
