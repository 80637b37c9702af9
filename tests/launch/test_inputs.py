"""A mistake in data, tokenizer or output folder is told before torch is imported or a rank started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlm_cli import log
from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.cli.app import run as mlm
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.errors import DataError
from mlm_cli.launch.inputs import check_pretraining_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "text"
    assert mlm(["preprocess", str(tiny_text), "--tokenizer", "bytes", "--output", str(prefix), "-q"]) == 0
    return prefix


def files(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(f"{prefix.name}_text_document.idx"), prefix.with_name(f"{prefix.name}_text_document.bin")


def copy(prefix: Path, folder: Path) -> Path:
    for file in (*files(prefix), prefix.with_suffix(".json")):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / prefix.name


def pretrain(*arguments: str) -> tuple[int, str, bool]:
    """Exit code, what was said on stderr, was torch imported; in a process of its own."""
    code = (
        "import sys; from mlm_cli.cli.app import run; code = run(sys.argv[1:]);"
        "sys.stderr.write(f\"LOADED {'torch' in sys.modules}\"); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "pretrain", "debug/gpt", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    said, _, loaded = done.stderr.partition("LOADED ")
    return done.returncode, said, loaded == "True"


@pytest.mark.parametrize("ranks", [[], ["--nproc", "2"]])
def test_data_cut_short(data: Path, tmp_path: Path, ranks: list[str]) -> None:
    prefix = copy(data, tmp_path)
    os.truncate(files(prefix)[1], 1000)
    code, said, torch = pretrain("tokenizer=bytes", f"data.path={prefix}", "-o", str(tmp_path / "run"), *ranks)
    assert (code, torch) == (3, False)
    assert "should be" in said and "but is 1,000" in said
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use(data: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path).lock():
        code, said, torch = pretrain("tokenizer=bytes", f"data.path={data}", "-o", str(tmp_path))
    assert (code, torch) == (2, False)
    assert f"in use by process {os.getpid()}" in said


def refusal(**keys: str) -> str:
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in keys.items()]
    with pytest.raises(DataError) as caught:
        check_pretraining_data(resolve_recipe("debug/gpt", overrides, verb="pretrain", world_size=1))
    return caught.value.message


def test_data_and_tokenizer_that_do_not_belong_together(data: Path, tiny_text: Path, tmp_path: Path) -> None:
    assert "no indexed data set" in refusal(tokenizer="bytes", data__path=str(tmp_path / "none"))
    assert "does not exist" in refusal(tokenizer=str(tmp_path / "none"), data__path=str(data))
    assert mlm(["tokenizer", "train", str(tiny_text), "--kind", "bpe", "--vocab-size", "300", "-q",
                "--output", str(tmp_path / "tok")]) == 0  # fmt: skip
    assert "made with another tokenizer" in refusal(tokenizer=str(tmp_path / "tok"), data__path=str(data))
    prefix = copy(data, tmp_path)
    tokens = np.fromfile(files(prefix)[1], dtype=np.uint16)
    tokens[100] = 60_000
    tokens.tofile(files(prefix)[1])
    assert "token id 60000 (token 100)" in refusal(tokenizer="bytes", data__path=str(prefix))


def test_says_nothing_itself(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(verbose=True)
    check_pretraining_data(
        resolve_recipe(
            "debug/gpt",
            [f"data.path={data}", "tokenizer=bytes", 'data.split="1000,0,0"'],
            verb="pretrain",
            world_size=1,
        )
    )
    assert capsys.readouterr().err == ""


def test_a_run_with_checkpoints_does_not_need_its_data_to_say_that_it_is_complete(tmp_path: Path) -> None:
    (tmp_path / "run" / "step-00000010").mkdir(parents=True)
    keys = [f"data.path={tmp_path}/gone", "tokenizer=bytes", f"output={tmp_path / 'run'}"]
    check_pretraining_data(resolve_recipe("debug/gpt", keys, verb="pretrain", world_size=1))
