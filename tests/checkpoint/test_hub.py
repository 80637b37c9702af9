"""Models cross to transformers and back with the same logits; whatever the layout that wrote or reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlm_cli.checkpoint.hub import Head, WeightFiles, load_model_folder, resolve_model, save_model_folder
from mlm_cli.config.schema import ModelSection
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.models.gpt import GPT
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext
from tests.checkpoint.their_sizes import THEIR_SIZES

transformers = pytest.importorskip("transformers")

ONE = ParallelContext.single()
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 24,
    "vocab_size": 259,
}
LLAMA: dict[str, Any] = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu"}
OURS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 no bias": {"bias": False},
    "gpt2 untied": {"tie_embeddings": False, "activation": "gelu_erf", "ffn_hidden_size": 56, "norm_eps": 1e-3},
    "llama": {**LLAMA, "bias": False},
    "llama grouped untied": {
        **LLAMA,
        "num_query_groups": 2,
        "tie_embeddings": False,
        "bias": False,
        "rotary_base": 500.0,
    },
    "llama head_dim bias": {
        **LLAMA,
        "num_query_groups": 1,
        "head_dim": 12,
        "bias": True,
        "make_vocab_size_divisible_by": 8,
    },
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": 101}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 48}),
    "llama": ("Llama", {}),
    "llama grouped": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 10}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_theta": 777.0}),
    "llama attention bias only": ("Llama", {"attention_bias": True, "num_key_value_heads": 4}),
}


def shake(model: torch.nn.Module) -> None:
    """Make every weight matter, biases and norms too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.empty_like(param).normal_(0, 0.15, generator=generator))


def ours(kind: str) -> GPT:
    model = build_gpt(ModelSection(**{**SIZES, **OURS[kind]}), ONE)
    shake(model)
    with torch.no_grad():  # whatever is in the padding rows must not matter
        for name, param in model.named_parameters():
            if name in ("embedding.word.weight", "head.weight"):
                param[model.vocab_size :] = 1e4
    return model.eval()


def theirs(kind: str) -> Any:
    family, settings = THEIRS[kind]
    base = GPT2 if family == "GPT2" else THEIR_SIZES
    config = getattr(transformers, f"{family}Config")(**{**base, **settings}, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(1)
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else "LlamaForCausalLM")(config)
    shake(model)
    return model.eval()


def tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, 20), generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def our_logits(model: GPT) -> torch.Tensor:
    return model.gather_logits(model(tokens(model.vocab_size)))


@torch.no_grad()
def their_logits(folder: Path) -> torch.Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()(tokens(model.config.vocab_size)).logits


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000], ids=["one file", "index"])
def test_transformers_opens_ours(kind: str, shard_bytes: int, tmp_path: Path) -> None:
    model = ours(kind)
    records = save_model_folder(model, tmp_path, max_shard_bytes=shard_bytes)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert sorted(records) == files and (len(files) > 1) == (tmp_path / "model.safetensors.index.json").exists()
    torch.testing.assert_close(their_logits(tmp_path), our_logits(model), rtol=1e-4, atol=1e-4)
    for path in tmp_path.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert not tensor.numel() or tensor.abs().max() < 100, f"padding leaked into {name}"

    again, section = load_model_folder(tmp_path, ONE)
    assert our_logits(again.eval()).equal(our_logits(model))
    default = {"ffn_hidden_size", "head_dim", "num_query_groups"}  # written out in full
    assert section.model_dump(exclude=default) == model.config.model_dump(exclude=default)


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_we_open_theirs(kind: str, shard_size: str, tmp_path: Path) -> None:
    model = theirs(kind)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    mine, _ = load_model_folder(tmp_path / "theirs", ONE)
    with torch.no_grad():
        expected = model(tokens(101)).logits
    torch.testing.assert_close(our_logits(mine.eval()), expected, rtol=1e-4, atol=1e-4)
    save_model_folder(mine, tmp_path / "back")
    torch.testing.assert_close(their_logits(tmp_path / "back"), expected, rtol=1e-4, atol=1e-4)


def test_bare_names_and_old_buffers(tmp_path: Path) -> None:
    """The files of the first GPT-2: no `transformer.` prefix, masks among the weights, the tied layer written out."""
    model = theirs("gpt2")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24) for i in range(2)}
    state |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    state["lm_head.weight"] = state["wte.weight"].clone()
    save_file(state, path)
    with torch.no_grad():
        expected = model(tokens(101)).logits
    mine, _ = load_model_folder(tmp_path, ONE)
    torch.testing.assert_close(our_logits(mine.eval()), expected, rtol=1e-4, atol=1e-4)


def test_greedy_continuation_is_theirs(tmp_path: Path) -> None:
    model = ours("llama grouped untied")
    save_model_folder(model, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = tokens(259)[:1, :6]
    expected = other.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        cache, seen, step = model.new_cache(1, 24), prompt, prompt
        for _ in range(12):
            step = model.gather_logits(model(step, cache=cache))[:, -1:].argmax(-1)
            seen = torch.cat([seen, step], 1)
    assert seen.tolist() == expected.tolist()


def test_tokenizer_and_card_travel_along(tmp_path: Path) -> None:
    model, tokenizer = ours("gpt2"), load_tokenizer("bytes")
    assert tokenizer.vocab_size <= 259
    save_model_folder(model, tmp_path, tokenizer, meta={"name": "Tiny", "steps": 12, "data": "a | b"})
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    card = (tmp_path / "README.md").read_text()
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert f"{stored:,}" in card and "# Tiny" in card and "license: unknown" in card and "| steps | 12 |" in card
    assert "GPT2LMHeadModel" in card and "\\|" in card
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eod_id
    theirs_read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs_read("hello", add_special_tokens=False)["input_ids"] == tokenizer.encode("hello")


def test_dtype_of_the_files(tmp_path: Path) -> None:
    model = ours("gpt2")
    save_model_folder(model, tmp_path / "half", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    coarse, _ = load_model_folder(tmp_path / "half", ONE, dtype=torch.bfloat16)
    masters = {name: param.detach() for name, param in model.named_parameters()}
    save_model_folder(coarse, tmp_path / "masters", weights=masters)
    again, _ = load_model_folder(tmp_path / "masters", ONE)
    assert our_logits(again.eval()).equal(our_logits(model))


@pytest.mark.parametrize("kind", ["gpt2 untied", "llama grouped untied"])
def test_a_classifier_crosses_too(kind: str, tmp_path: Path) -> None:
    """A head in place of the output layer; transformers gives the same class scores."""
    save_model_folder(ours(kind), tmp_path / "whole")
    model, _ = load_model_folder(tmp_path / "whole", ONE, head=False)
    score = torch.randn(3, 32)
    head = Head("ForSequenceClassification", {"score.weight": score}, {"num_labels": 3, "pad_token_id": 0})
    save_model_folder(model, tmp_path, head=head)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = tokens(258) + 1  # no padding token among them
    again, _ = load_model_folder(tmp_path, ONE, head=False)
    with WeightFiles(tmp_path) as files, torch.no_grad():
        mine = again.eval().hidden(ids)[:, -1] @ files.read("score.weight").t()
        torch.testing.assert_close(other(ids).logits, mine, rtol=1e-4, atol=1e-4)


def any_layout(rank: int, world_size: int, folder: str) -> dict[str, np.ndarray]:
    """Read each folder at this tensor size, write it again, and give the logits."""
    parallel = ParallelContext.create(tensor=world_size)
    found = {}
    for source in sorted(Path(folder).glob("*.one")):
        model, _ = load_model_folder(source, parallel)
        save_model_folder(model, source.with_suffix(f".t{world_size}"), max_shard_bytes=20_000)
        found[source.stem] = our_logits(model.eval()).numpy()
    return found


def test_any_tensor_size_reads_and_writes_the_same(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    expected = {}
    for kind in OURS:
        if kind != "llama head_dim bias":  # one key head cannot be shared
            save_model_folder(ours(kind), tmp_path / f"{kind}.one")
            expected[kind] = our_logits(ours(kind)).numpy()
    for answer in run_ranks(any_layout, 2, str(tmp_path)):
        for kind, logits in expected.items():
            np.testing.assert_allclose(answer[kind], logits, rtol=1e-4, atol=1e-4)
    for kind in expected:
        with WeightFiles(tmp_path / f"{kind}.one") as first, WeightFiles(tmp_path / f"{kind}.t2") as second:
            assert sorted(first.names()) == sorted(second.names())
            for name in first.names():
                assert first.read(name).equal(second.read(name)), f"{kind}: {name}"


def test_sizes_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    save_model_folder(ours("llama head_dim bias"), tmp_path)
    from mlm_cli.parallel.context import Group

    with pytest.raises(UsageError, match="query groups") as caught:
        load_model_folder(tmp_path, ParallelContext(tensor=Group(0, 2)))
    assert caught.value.hint is not None and "tensor=1" in caught.value.hint


def test_what_no_layout_holds_is_refused(tmp_path: Path) -> None:
    model = build_gpt(ModelSection(**{**SIZES, "position": "rotary"}), ONE)
    with pytest.raises(UsageError, match="no Hugging Face architecture"):
        save_model_folder(model, tmp_path)


@pytest.mark.parametrize(
    ("latest", "said"),
    [("", "is empty"), ("../../etc", "names no checkpoint"), ("step-00000009\n", "step-00000009")],
)
def test_a_damaged_pointer_leads_to_the_newest_complete_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], latest: str, said: str
) -> None:
    run = tmp_path / "run"
    for step, complete in ((1, True), (2, True), (3, False)):
        folder = run / f"step-{step:08d}"
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
        if complete:
            (folder / "manifest.json").write_text("{}")
    (run / "latest").write_text(latest)
    assert resolve_model(run) == run / "step-00000002" / "model"
    err = capsys.readouterr().err
    assert said in err and "step-00000002" in err and err.count("warning") == 1


def test_model_names(tmp_path: Path) -> None:
    model = tmp_path / "run" / "step-00000002" / "model"
    save_model_folder(ours("gpt2"), model)
    with pytest.raises(CheckpointError, match="holds no model"):
        resolve_model(tmp_path / "run")
    (tmp_path / "run" / "latest").write_text("step-00000002\n")
    for spec in (tmp_path / "run", model.parent, model, str(model)):
        assert resolve_model(spec) == model
    (tmp_path / "run" / "latest").write_text("step-00000009\n")
    with pytest.raises(CheckpointError, match="step-00000009"):
        resolve_model(tmp_path / "run")
    (tmp_path / "run" / "latest").write_text("../../etc")
    with pytest.raises(CheckpointError, match="names no checkpoint"):
        resolve_model(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no model folder"):
        resolve_model(tmp_path / "nowhere" / "at all")
    with pytest.raises(CheckpointError, match="Hub"):
        resolve_model("no-such-user/no-such-model")
