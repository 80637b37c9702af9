"""Bad folders of Megatron-LM: one error that names the file and the tensor, and nothing in a pickle is ever run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_cli.checkpoint.hub import load_model_folder, read_model_config
from mlm_cli.checkpoint.pickled import load_pickled
from mlm_cli.errors import CheckpointError
from tests.checkpoint import megatron_oracle_files as megatron
from tests.checkpoint.test_hub import ONE
from tests.checkpoint.test_megatron import theirs, with_vocabulary

transformers = pytest.importorskip("transformers")
QKV = "layers.0.self_attention.query_key_value.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    megatron.write(theirs("gpt2"), folder, tensor=2, pipeline=2)
    return with_vocabulary(folder)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def rank_file(folder: Path, rank: str = "00_000") -> Path:
    return folder / "iter_0000123" / f"mp_rank_{rank}" / "model_optim_rng.pt"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], rank: str = "00_000") -> None:
    state = megatron.load(rank_file(folder, rank))
    change(state)
    megatron.save(state, rank_file(folder, rank))


def edit_all(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    for rank in ("00_000", "01_000", "00_001", "01_001"):
        edit(folder, change, rank)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model_folder(folder, ONE)
    assert str(folder) in caught.value.message
    return caught.value.message


def encoder(state: dict[str, Any]) -> Any:
    return state["model"]["language_model"]["encoder"]


def test_the_sound_one_loads(folder: Path) -> None:
    load_model_folder(folder, ONE)
    load_model_folder(folder / "iter_0000123", ONE)  # the tokenizer lies above it


@pytest.mark.parametrize("rank", ["00_000", "01_000", "00_001", "01_001"])
def test_a_missing_rank(folder: Path, rank: str) -> None:
    shutil.rmtree(rank_file(folder, rank).parent)
    message = refusal(folder)
    assert f"mp_rank_{rank}" in message or "its args say 2" in message


def test_whole_axes_missing(folder: Path) -> None:
    for rank in ("00_001", "01_001"):
        shutil.rmtree(rank_file(folder, rank).parent)
    assert "1 pipeline rank; its args say 2" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    path = rank_file(folder, "01_000")
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(folder)
    assert "mp_rank_01_000" in message and "truncated or corrupt" in message


def test_mixed_checkpoints(folder: Path) -> None:
    edit(folder, lambda state: state.update(iteration=122), "01_001")
    message = refusal(folder)
    assert "mp_rank_01_001" in message and "iteration 122" in message and "123" in message


def test_another_iteration_than_the_folder_says(folder: Path) -> None:
    edit_all(folder, lambda state: state.update(iteration=5))
    assert "iteration 5" in refusal(folder)


@pytest.mark.parametrize(("version", "words"), [(1.5, "1.5"), (4.0, "4"), ("three", "three")])
def test_an_unknown_version(folder: Path, version: Any, words: str) -> None:
    edit_all(folder, lambda state: state.update(checkpoint_version=version))
    message = refusal(folder)
    assert "checkpoint_version" in message and words in message


def test_versions_that_differ(folder: Path) -> None:
    edit(folder, lambda state: state.update(checkpoint_version=2.0), "01_001")
    assert "mp_rank_01_001" in refusal(folder)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"hidden_size": 64}, ["word_embeddings.weight", "[52, 32]", "64"]),
        ({"num_layers": 6}, ["4 layers", "6"]),
        ({"num_layers": None}, ["args.num_layers is missing"]),
        ({"num_attention_heads": "four"}, ["args.num_attention_heads", "'four'"]),
        ({"num_attention_heads": 5}, ["5 heads"]),
        ({"num_attention_heads": 1, "kv_channels": 32}, ["2 tensor ranks", "1 heads"]),
        ({"ffn_hidden_size": 100}, ["dense_h_to_4h.weight", "[64, 32]", "[50, 32]"]),
        ({"max_position_embeddings": 48}, ["position_embeddings.weight", "[24, 32]", "[48, 32]"]),
        ({"num_experts": 8}, ["num_experts is 8", "experts"]),
        ({"position_embedding_type": "alibi"}, ["position_embedding_type", "alibi"]),
        ({"normalization": "LayerNorm1P"}, ["normalization", "LayerNorm1P"]),
        ({"apply_layernorm_1p": True}, ["apply_layernorm_1p"]),
        ({"squared_relu": True}, ["squared_relu"]),
        ({"rotary_seq_len_interpolation_factor": 4}, ["scaled rotary positions"]),
        ({"untie_embeddings_and_output_weights": True}, ["output_layer.weight is missing"]),
        ({"add_bias_linear": False}, ["unexpected tensor", ".bias"]),
        ({"position_embedding_type": "rope"}, ["unexpected tensor", "position_embeddings"]),
        ({"tensor_model_parallel_size": 4}, ["2 tensor ranks", "4"]),
    ],
    ids=str,
)
def test_args_that_do_not_fit(folder: Path, args: dict[str, Any], words: list[str]) -> None:
    edit_all(folder, lambda state: vars(state["args"]).update(args))
    message = refusal(folder)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: encoder(state).pop(QKV), [QKV, "is missing"]),
        (lambda state: encoder(state).update(extra=torch.zeros(2)), ["extra"]),
        (lambda state: encoder(state).update({QKV: torch.zeros(40, 32)}), ["query_key_value.weight", "[40, 32]"]),
        (lambda state: encoder(state).update({QKV: torch.zeros(48, 32).int()}), ["query_key_value.weight", "int32"]),
        (lambda state: state.pop("model"), ["no `model`"]),
        (lambda state: state.update(model={"embedding.word_embeddings.weight": torch.zeros(4, 4)}), ["mp_rank_01_000"]),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[dict[str, Any]], Any], words: list[str]) -> None:
    edit(folder, change, "01_000")
    message = refusal(folder)
    assert "mp_rank_01_000" in message and all(word in message for word in words), message


def test_a_tensor_that_all_ranks_lack(folder: Path) -> None:
    for rank in ("00_001", "01_001"):
        edit(folder, lambda state: encoder(state).pop("final_norm.bias"), rank)
    message = refusal(folder)
    assert "final_layernorm.bias is missing" in message


def test_tied_words_that_differ(folder: Path) -> None:
    edit(folder, lambda state: state["model"]["word_embeddings_for_head"]["weight"].add_(1), "01_001")
    message = refusal(folder)
    assert "mp_rank" in message and "word_embeddings_for_head" in message


def test_norms_that_differ_between_ranks_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, lambda state: encoder(state)["layers.0.input_norm.weight"].add_(1e-3), "01_000")
    load_model_folder(folder, ONE)
    assert "input_layernorm.weight differs between tensor ranks" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "12a", "../../etc", "99"])
def test_a_bad_tracker(folder: Path, text: str) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text(text)
    assert "latest_checkpointed_iteration.txt" in refusal(folder)


def test_an_unknown_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="104 vocabulary rows") as caught:
        read_model_config(folder)
    assert caught.value.hint is not None and f"mlm convert {folder}" in caught.value.hint
    with_vocabulary(folder, 105)
    with pytest.raises(CheckpointError, match="104 rows, the vocabulary 105 tokens"):
        read_model_config(folder)
    with_vocabulary(folder, 97)  # 7 rows of padding: less than the multiple of 4 x 2
    assert read_model_config(folder)[0].vocab_size == 97
    with_vocabulary(folder, 96)
    with pytest.raises(CheckpointError, match="multiple of 4 x 2"):
        read_model_config(folder)


def test_other_kinds_and_layouts(folder: Path) -> None:
    for rank in ("00_001", "01_001"):
        edit(folder, lambda state: state["model"].update(multichoice_head={"bias": torch.zeros(2)}), rank)
    assert "unknown architecture (tensor multichoice_head.bias)" in refusal(folder)
    decoder = {"layers.0.mlp.dense_h_to_4h.weight": torch.zeros(2, 2)}
    for rank in ("00_001", "01_001"):
        edit(folder, lambda state: state["model"]["language_model"].update(decoder=decoder), rank)
    assert "holds a T5; read in this layout: GPT, BERT" in refusal(folder)
    edit_all(folder, lambda state: state.update(model={"decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(4, 4)}))
    assert "Megatron-Core" in refusal(folder)
    (folder / "iter_0000123" / "__0_0.distcp").touch()
    assert "distributed checkpoint" in refusal(folder)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Known:
    """A class of the reader's own, which an import would find."""

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("was built")


@pytest.mark.parametrize("legacy_file", [False, True])
def test_what_is_read_does_not_depend_on_what_else_is_imported(folder: Path, legacy_file: bool) -> None:
    megatron.save(megatron.load(rank_file(folder)), rank_file(folder), _use_new_zipfile_serialization=not legacy_file)
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        assert "language_model" in load_pickled(rank_file(folder))["model"]
        torch.serialization.add_safe_globals([getattr, Known])  # as torch.distributed.tensor does
        assert "language_model" in load_pickled(rank_file(folder))["model"]
        assert set(torch.serialization.get_safe_globals()) == {getattr, Known}
        megatron.save({"optimizer": Known()}, rank_file(folder), _use_new_zipfile_serialization=not legacy_file)
        assert "Known" in refusal(folder)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize("legacy_file", [False, True])
def test_nothing_in_a_pickle_is_run(folder: Path, tmp_path: Path, legacy_file: bool) -> None:
    sound_state = megatron.load(rank_file(folder))
    for bait, name in ((Trap(tmp_path / "sprung"), "mkdir"), (Known(), "Known"), (print, "print")):
        state = {**sound_state, "optimizer": bait}
        megatron.save(state, rank_file(folder), _use_new_zipfile_serialization=not legacy_file)
        message = refusal(folder)
        assert "holds more than weights" in message and name in message
        assert not (tmp_path / "sprung").exists()
    with megatron.installed():  # the trap works where it is let
        torch.save({**sound_state, "optimizer": Trap(tmp_path / "sprung")}, rank_file(folder))
        torch.load(rank_file(folder), weights_only=False)
    assert (tmp_path / "sprung").exists()
