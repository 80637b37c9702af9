"""BERT in Megatron-LM's classic layout, both ways, against transformers and a forward pass from its description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.bert_models import SECTIONS, shake

from mlm_cli.checkpoint.hub import load_model_folder, read_model_config
from mlm_cli.checkpoint.megatron_folder import open_megatron
from mlm_cli.checkpoint.megatron_read import load_section, read_section
from mlm_cli.checkpoint.megatron_write import save_megatron_folder
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.models.bert import Bert
from mlm_cli.models.registry import build_model
from tests.checkpoint import megatron_oracle_files as megatron
from tests.checkpoint.megatron_bert_oracle import attention_hidden
from tests.checkpoint.test_hub import ONE
from tests.checkpoint.test_megatron import LAYOUTS, TOKENS, VOCAB, with_vocabulary

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 24, "layer_norm_eps": 1e-5,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("MegatronBertForPreTraining", {"hidden_act": "gelu_new"}),
    "exact": ("MegatronBertForPreTraining", {"hidden_act": "gelu", "layer_norm_eps": 1e-12}),
    "words": ("MegatronBertForMaskedLM", {"hidden_act": "gelu_new"}),
}
TYPES = (torch.arange(TOKENS.shape[1]) >= 7).long().expand_as(TOKENS)
LENGTHS = torch.tensor([20, 13])
REAL = torch.arange(20) < LENGTHS[:, None]
HIDDEN = attention_hidden(LENGTHS, 20)


def theirs(kind: str) -> Any:
    name, settings = MODELS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(1)
    model = cls(cls.config_class(**{**BASE, **settings}))
    shake(model)
    if kind == "words":  # trained by Megatron-LM it has no token types
        torch.nn.init.zeros_(model.bert.embeddings.token_type_embeddings.weight)
    return model.eval()


@torch.no_grad()
def expected(model: Any, types: torch.Tensor = TYPES) -> list[torch.Tensor]:
    """Logits of the words at real places, and of the binary head."""
    out = model(TOKENS, attention_mask=REAL.long(), token_type_ids=types)
    if "prediction_logits" in out:
        return [out.prediction_logits[REAL], out.seq_relationship_logits]
    return [out.logits[REAL]]


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor = TOKENS) -> list[torch.Tensor]:
    assert isinstance(model, Bert)
    hidden = model.eval().hidden(tokens, lengths=LENGTHS, token_types=TYPES)
    found = [model.gather_logits(model.logits(hidden))[REAL]]
    return found if model.head.binary is None else [*found, model.head.binary_logits(hidden)]


def megatron_logits(where: Path, vocab: int, tokens: torch.Tensor = TOKENS) -> list[torch.Tensor]:
    words, binary = megatron.logits(where, tokens, TYPES, HIDDEN)
    return [words[REAL][:, :vocab]] if binary is None else [words[REAL][:, :vocab], binary]


def check_equal(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    assert len(found) == len(wanted)
    for ours, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_reads_what_megatron_wrote(
    kind: str, tensor: int, pipeline: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = theirs(kind)
    names = ["new", "classic"][(tensor + pipeline) % 2]
    where = megatron.write(model, tmp_path, tensor=tensor, pipeline=pipeline, names=names)
    # the fixture means what it says: Megatron's own arithmetic on these files gives the logits of transformers
    check_equal(megatron_logits(where, VOCAB), expected(model))
    ours, section = load_model_folder(with_vocabulary(tmp_path), ONE)
    check_equal(logits_of(ours), expected(model))
    assert section.binary_head == ("none" if kind == "words" else "sentence_order")
    assert section.activation == ("gelu_erf" if kind == "exact" else "gelu") and section.num_token_types == 2
    assert read_model_config(tmp_path)[1].values["architectures"] == ["Megatron-LM BERT"]
    assert "GELU" not in capsys.readouterr().err


@pytest.mark.parametrize("names", ["old", "classic", "new"])
@pytest.mark.parametrize("version", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("tensor", [1, 2])
def test_every_row_order(version: float, names: str, tensor: int, tmp_path: Path) -> None:
    model = theirs("tanh")
    where = megatron.write(model, tmp_path, tensor=tensor, version=version, names=names)
    check_equal(megatron_logits(where, VOCAB), expected(model))
    check_equal(logits_of(load_model_folder(with_vocabulary(tmp_path), ONE)[0]), expected(model))


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_wrong_row_order_is_another_model(tensor: int, tmp_path: Path) -> None:
    """The tests above can fail: the same files under another version give other logits, far outside the tolerance."""
    model = theirs("tanh")
    for rows in (0.0, 1.0, 2.0):
        for said in (0.0, 1.0, 2.0):
            folder = tmp_path / f"{rows}-{said}"
            where = megatron.write(model, folder, tensor=tensor, version=rows)
            for path in where.glob("*/*.pt"):
                state = megatron.load(path)
                megatron.save(state | {"checkpoint_version": said}, path)
            found = logits_of(load_model_folder(with_vocabulary(folder), ONE)[0])
            errors = [(ours - right).abs().max() for ours, right in zip(found, expected(model), strict=True)]
            assert max(errors) < 1e-4 if rows == said else min(errors) > 0.05, (rows, said, errors)


def test_releases_without_args(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the published BERT 345M: no args, names and rows of the first version."""
    model = theirs("tanh")
    megatron.write(model, tmp_path, version=0.0, names="old", iteration=None, args=False, legacy_file=True)
    files = open_megatron(tmp_path)
    section = read_section(files, tmp_path, {"num_attention_heads": 4}, vocab_size=VOCAB)
    assert section.family == "bert" and section.binary_head == "sentence_order" and section.num_token_types == 2
    check_equal(logits_of(load_section(files, section, ONE, dtype=torch.float32)), expected(model))
    assert "exact GELU" in capsys.readouterr().err  # which its args would tell


def test_two_gelus_in_one_model_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron's default: the layers' fused kernel is the tanh form, the head's GELU exact. We have one for both."""
    where = megatron.write(theirs("tanh"), tmp_path, openai_gelu=False, bias_gelu_fusion=True)
    found = logits_of(load_model_folder(with_vocabulary(tmp_path), ONE)[0])
    assert "exact GELU" in capsys.readouterr().err
    words, binary = megatron_logits(where, VOCAB)
    torch.testing.assert_close(found[1], binary, rtol=1e-4, atol=1e-4)
    error = (found[0] - words).abs().max().item()
    assert 1e-5 < error < 1e-2, error


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@pytest.mark.parametrize("version", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("kind", ["megatron", "exact", "next sentence", "words"])
def test_megatron_reads_what_we_write(
    kind: str, version: float, tensor: int, pipeline: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {
        "megatron": {},
        "exact": {"activation": "gelu_erf", "ffn_hidden_size": 56, "norm_eps": 1e-12},
        "next sentence": {"binary_head": "next_sentence"},
        "words": {"binary_head": "none"},
    }[kind]
    model = build_model(SECTIONS["megatron"].model_copy(update={**changes, "vocab_size": 259}), ONE)
    shake(model)
    with torch.no_grad():  # whatever is in the padding must not matter
        for name, param in model.named_parameters():
            if name in ("embedding.word.weight", "head.bias"):
                param[259:] = 1e4
    options: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline, "version": version, "iteration": 7}
    if version < 3 and pipeline > 1:
        with pytest.raises(UsageError):
            save_megatron_folder(model, tmp_path, **options)
        return
    command = save_megatron_folder(model, tmp_path, load_tokenizer("bytes"), **options)
    assert ("--bert-no-binary-head" in command) == (kind == "words")
    assert ("builds no token types" in capsys.readouterr().err) == (kind == "words")
    tokens = torch.randint(0, 259, (2, 20), generator=torch.Generator().manual_seed(8))
    check_equal(megatron_logits(tmp_path / "iter_0000007", 259, tokens), logits_of(model, tokens))
    step = 128 * tensor
    words = megatron.logits(tmp_path / "iter_0000007", tokens, TYPES, HIDDEN)[0]
    assert words.shape[-1] == -(-259 // step) * step and not words[..., 259:].any()  # padding is zeros

    again, section = load_model_folder(tmp_path, ONE)
    assert "GELU" not in capsys.readouterr().err
    for name, param in again.named_parameters():
        mine = dict(model.named_parameters())[name].detach()
        rows = 259 if name in ("embedding.word.weight", "head.bias") else len(mine)
        assert param[:rows].equal(mine[:rows]), name
    filled = {"ffn_hidden_size", "head_dim", "num_query_groups"}
    assert section.model_dump(exclude=filled) == model.config.model_dump(exclude=filled)


def test_the_names_are_those_that_transformers_converts(tmp_path: Path) -> None:
    """Every name that `convert_megatron_bert_checkpoint.py` looks up, in both ages of the layout."""
    model = build_model(SECTIONS["megatron"], ONE)
    for version, body in ((0.0, "transformer"), (3.0, "encoder")):
        save_megatron_folder(model, tmp_path / body, version=version)
        state = megatron.load(tmp_path / body / "release" / "mp_rank_00" / "model_optim_rng.pt")["model"]
        lm = state["language_model"]
        assert set(lm) == {"embedding", body, "pooler"} and set(state) == {"language_model", "lm_head", "binary_head"}
        assert {f"{kind}_embeddings" for kind in ("word", "position", "tokentype")} == set(lm["embedding"])
        assert "final_layernorm.weight" in lm[body] and set(lm["pooler"]) == {"dense.weight", "dense.bias"}
        wanted = {"bias", "dense.weight", "dense.bias", "layernorm.weight", "layernorm.bias"}
        assert set(state["lm_head"]) == wanted and set(state["binary_head"]) == {"weight", "bias"}
        attention = "attention" if version < 2 else "self_attention"
        assert f"layers.1.{attention}.query_key_value.weight" in lm[body]
