"""Megatron-LM's classic layout, both ways, against files and a forward pass written from its published description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_cli.checkpoint.hub import load_model_folder, read_model_config, resolve_model
from mlm_cli.checkpoint.megatron_keys import RowOrder
from mlm_cli.checkpoint.megatron_write import save_megatron_folder
from mlm_cli.config.schema import ModelSection
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.models.registry import build_gpt
from mlm_cli.parallel.context import ParallelContext
from tests.checkpoint import megatron_oracle_files as megatron
from tests.checkpoint.test_hub import ONE, OURS, SIZES, ours, shake

transformers = pytest.importorskip("transformers")

VOCAB = 101
TOKENS = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(8))
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 24, "vocab_size": VOCAB}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "tie_word_embeddings": False,
    "rope_theta": 500.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 untied erf": {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 48},
    "llama": {},
    "llama tied biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
    "llama no groups": {"num_key_value_heads": 4},
}


def theirs(kind: str) -> Any:
    family = transformers.GPT2Config if kind.startswith("gpt2") else transformers.LlamaConfig
    config = family(
        **{**(GPT2 if kind.startswith("gpt2") else LLAMA), **MODELS[kind]}, bos_token_id=None, eos_token_id=0
    )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    shake(model)
    return model.eval()


@torch.no_grad()
def expected(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@torch.no_grad()
def our_logits(folder: Path, parallel: ParallelContext = ONE, **changes: Any) -> torch.Tensor:
    model, _ = load_model_folder(folder, parallel, **changes)
    return model.eval().gather_logits(model(TOKENS))


def with_vocabulary(folder: Path, size: int = VOCAB) -> Path:
    """What tells padding from words where Megatron keeps no record: a tokenizer beside the checkpoint."""
    model = {"type": "WordLevel", "vocab": {f"w{n}": n for n in range(size)}, "unk_token": "w0"}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    return folder


LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_reads_what_megatron_wrote(kind: str, tensor: int, pipeline: int, tmp_path: Path) -> None:
    model = theirs(kind)
    names = ["new", "classic"][(tensor + pipeline) % 2]
    where = megatron.write(model, tmp_path, tensor=tensor, pipeline=pipeline, names=names)
    # the fixture means what it says: Megatron's own arithmetic on these files gives the logits of transformers
    torch.testing.assert_close(megatron.logits(where, TOKENS)[..., :VOCAB], expected(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(our_logits(with_vocabulary(tmp_path)), expected(model), rtol=1e-4, atol=1e-4)
    assert read_model_config(tmp_path)[1].values["dtype"] == "float32"


@pytest.mark.parametrize("names", ["old", "classic", "new"])
@pytest.mark.parametrize("version", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("tensor", [1, 2])
def test_every_row_order(version: float, names: str, tensor: int, tmp_path: Path) -> None:
    model = theirs("gpt2")
    where = megatron.write(model, tmp_path, tensor=tensor, version=version, names=names)
    torch.testing.assert_close(our_logits(with_vocabulary(tmp_path)), expected(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(megatron.logits(where, TOKENS)[..., :VOCAB], expected(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_wrong_row_order_is_another_model(tensor: int, tmp_path: Path) -> None:
    """The tests above can fail: the same files under another version give other logits, far outside the tolerance."""
    model = theirs("gpt2")
    for rows in (0.0, 1.0, 2.0):
        for said in (0.0, 1.0, 2.0):
            folder = tmp_path / f"{rows}-{said}"
            where = megatron.write(model, folder, tensor=tensor, version=rows)
            for path in where.glob("*/*.pt"):
                state = megatron.load(path)
                megatron.save(state | {"checkpoint_version": said}, path)
            error = (our_logits(with_vocabulary(folder)) - expected(model)).abs().max()
            assert error < 1e-4 if rows == said else error > 0.1, (rows, said, error)


def test_row_orders_are_inverse_to_each_other() -> None:
    for version, groups in ((0.0, 4), (1.0, 4), (2.0, 4), (3.0, 2)):
        order = RowOrder(version, 4, groups, 5)
        rows = torch.arange((4 + 2 * groups) * 5.0)[:, None].expand(-1, 3)
        assert order.to_ours(order.to_theirs(rows)).equal(rows)
        assert order.to_ours(order.to_theirs(rows[:, 0])).equal(rows[:, 0])
        assert order.to_theirs(rows).equal(rows) == (version == 0)


def test_stages_in_several_parts(tmp_path: Path) -> None:
    """An interleaved schedule: stage 0 holds layers 0 and 2, stage 1 layers 1 and 3."""
    model = theirs("llama")
    megatron.write(model, tmp_path, pipeline=2, virtual=2)
    torch.testing.assert_close(our_logits(with_vocabulary(tmp_path)), expected(model), rtol=1e-4, atol=1e-4)


def test_releases_without_args_and_files_of_old_torch(tmp_path: Path) -> None:
    from mlm_cli.checkpoint.megatron_folder import open_megatron
    from mlm_cli.checkpoint.megatron_read import load_section, read_section

    model = theirs("gpt2")
    megatron.write(model, tmp_path, version=0.0, names="old", iteration=None, args=False, legacy_file=True)
    files = open_megatron(tmp_path)
    section = read_section(files, tmp_path, {"num_attention_heads": 4}, vocab_size=VOCAB)
    mine = load_section(files, section, ONE, dtype=torch.float32).eval()
    with torch.no_grad():
        found = mine.gather_logits(mine(TOKENS))
    torch.testing.assert_close(found, expected(model), rtol=1e-4, atol=1e-4)


def test_biases_on_queries_and_keys_only(tmp_path: Path) -> None:
    """`--add-qkv-bias --disable-bias-linear`: the other linear layers have none."""
    model = theirs("llama tied biases")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(".bias") and ("o_proj" in name or "mlp" in name):
                param.zero_()
    where = megatron.write(model, tmp_path, add_bias_linear=False, add_qkv_bias=True)
    for path in where.glob("*/*.pt"):
        state = megatron.load(path)
        encoder = state["model"]["language_model"]["encoder"]
        for name in [name for name in encoder if name.endswith(("dense.bias", "4h.bias", "h.bias"))]:
            del encoder[name]
        megatron.save(state, path)
    torch.testing.assert_close(our_logits(with_vocabulary(tmp_path)), expected(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@pytest.mark.parametrize("version", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("kind", OURS)
def test_megatron_reads_what_we_write(kind: str, version: float, tensor: int, pipeline: int, tmp_path: Path) -> None:
    model = ours(kind)  # its padding rows hold 1e4
    groups = model.config.num_query_groups or 4
    options: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline, "version": version, "iteration": 7}
    if groups % tensor or (version < 3 and pipeline > 1) or (version < 2 and groups != 4):
        with pytest.raises(UsageError):
            save_megatron_folder(model, tmp_path, **options)
        assert not list(tmp_path.iterdir())
        return
    command = save_megatron_folder(model, tmp_path, load_tokenizer("bytes"), **options)
    tokens = torch.randint(0, 259, (2, 20), generator=torch.Generator().manual_seed(8))
    found = megatron.logits(tmp_path / "iter_0000007", tokens)
    with torch.no_grad():
        wanted = model.gather_logits(model(tokens))
    torch.testing.assert_close(found[..., :259], wanted, rtol=1e-4, atol=1e-4)
    step = model.config.make_vocab_size_divisible_by * tensor
    assert found.shape[-1] == -(-259 // step) * step and not found[..., 259:].any()  # padding rows are zeros
    assert command[command.index("--num-layers") + 1] == "2"

    assert resolve_model(tmp_path) == tmp_path
    again, section = load_model_folder(tmp_path, ONE)
    for name, param in again.named_parameters():
        mine = dict(model.named_parameters())[name].detach()
        rows = 259 if name in ("embedding.word.weight", "head.weight") else len(mine)
        assert param[:rows].equal(mine[:rows]), name
    filled = {"ffn_hidden_size", "head_dim", "num_query_groups"}
    assert section.model_dump(exclude=filled) == model.config.model_dump(exclude=filled)
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer("bytes").fingerprint


def test_half_precision_stays(tmp_path: Path) -> None:
    model = build_gpt(ModelSection(**SIZES), ONE, dtype=torch.float16)
    save_megatron_folder(model, tmp_path)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert read_model_config(tmp_path)[1].values["dtype"] == "float16"
    again, _ = load_model_folder(tmp_path, ONE, dtype=torch.float16)
    assert all(
        param.equal(mine)
        for param, mine in zip(again.parameters(), model.parameters(), strict=True)
        if param.dim() == 1
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"norm_order": "post"}, "model.norm_order: post"),
        ({"position": "relative"}, "model.position: relative"),
        ({"activation": "geglu"}, "model.activation: geglu"),
        ({"num_token_types": 2}, "model.num_token_types: 2"),
        ({"family": "bert"}, "model.family: bert"),
    ],
)
def test_what_the_layout_cannot_express_is_refused(settings: dict[str, Any], words: str) -> None:
    from mlm_cli.checkpoint.megatron_write import check_layout

    with pytest.raises(UsageError, match="cannot express") as caught:
        check_layout(ModelSection(**{**SIZES, **settings}), tensor=1, pipeline=1, version=3.0)
    assert words in caught.value.message
