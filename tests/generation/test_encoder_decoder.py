"""Answers of an encoder-decoder against `transformers`, in batches of different lengths and sliced over ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.config.requests import GenerateRequest
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.generation.answer import Answer, EncodedPrompt, Settings
from mlm_cli.generation.encoder_decoder import EncoderDecoder
from mlm_cli.generation.generator import Generator
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import Sampling
from mlm_cli.generation.text_stream import TextStream
from mlm_cli.jobs import generate
from mlm_cli.models.t5 import T5
from mlm_cli.parallel.context import ParallelContext
from tests.generation.folders import save_tokenizer

PROMPTS = [[5, 9, 200, 31, 1], [17, 1], list(range(40, 140)), [300, 2, 2, 300, 2, 1], [399, 1], [8, 8, 8]]
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 20, "naïve café — 東京 " * 40]


class Pair(NamedTuple):
    """A model folder and the same model in `transformers`."""

    folder: Path
    model: transformers.PreTrainedModel


def make_t5(folder: Path, kind: str) -> transformers.PreTrainedModel:
    """A random model, ``v1.0`` or ``v1.1``, saved; its greedy text does not just repeat itself."""
    torch.manual_seed(0)
    settings = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if kind == "v1.1" else {}
    config = transformers.T5Config(
        vocab_size=400, d_model=64, d_kv=12, d_ff=96, num_layers=2, num_heads=4,
        relative_attention_max_distance=40, decoder_start_token_id=0, n_positions=128, **settings,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(("wo.weight", "o.weight")):  # large enough that what was said is not just said again
                param.normal_(std=1.0)
            if "relative" in name:
                param.normal_(std=6.0)
            if "shared" in name:
                param.mul_(0.3)
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=["v1.0", "v1.1"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("t5")
    model = make_t5(folder, request.param)
    save_tokenizer(folder, TEXTS)
    return Pair(folder, model)


class Numbers(TextStream):
    """Shows ids instead of text."""

    def feed(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def load(folder: Path, parallel: ParallelContext) -> T5:
    model = load_model_folder(folder, parallel)[0].eval()
    assert isinstance(model, T5)
    return model


def answers(model: T5, slots: int, **settings: Any) -> list[Answer]:
    sampling = Sampling(**{k: settings.pop(k) for k in list(settings) if k in Sampling.__dataclass_fields__})
    decoder = EncoderDecoder(model, slots, max_length=settings["max_new_tokens"] + 1, start_id=0)
    prompts = [EncodedPrompt(Prompt(n, "", n, ""), tokens) for n, tokens in enumerate(PROMPTS)]
    generator = Generator(decoder, Settings(sampling, end_ids=frozenset({1}), **settings), Numbers)
    return list(generator.answers(prompts))


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_answers_are_those_of_transformers(pair: Pair, penalty: float) -> None:
    model = load(pair.folder, ParallelContext.single())
    ours = answers(model, 3, temperature=0, max_new_tokens=30, repetition_penalty=penalty)
    lengths = set()
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        theirs = pair.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=30, repetition_penalty=penalty
        )[0, 1:].tolist()
        assert answer.tokens == [token for token in theirs if token != 1]
        assert answer.finish_reason == ("eod" if theirs[-1] == 1 else "length")
        assert answer.num_prompt_tokens == len(prompt)
        lengths.add(len(set(theirs)))
    assert max(lengths) > (5 if penalty == 1.0 else 10), "the model only repeats itself: the test shows nothing"


@pytest.mark.parametrize("slots", [2, 6])
def test_an_answer_does_not_depend_on_the_batch(pair: Pair, slots: int) -> None:
    model = load(pair.folder, ParallelContext.single())
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 3, "max_new_tokens": 16}
    assert answers(model, slots, **options) == answers(model, 1, **options)


def _sliced(rank: int, size: int, folder: str) -> list[list[int]]:
    model = load(Path(folder), ParallelContext.create(tensor=size))
    if rank:
        EncoderDecoder(model, 3, max_length=13, start_id=0).follow()
        return []
    decoder = EncoderDecoder(model, 3, max_length=13, start_id=0)
    prompts = [EncodedPrompt(Prompt(n, "", n, ""), tokens) for n, tokens in enumerate(PROMPTS)]
    generator = Generator(decoder, Settings(Sampling(temperature=0), 12, end_ids=frozenset({1})), Numbers)
    found = [answer.tokens for answer in generator.answers(prompts)]
    decoder.close()
    return found


def test_slicing_changes_no_answer(pair: Pair, run_ranks: Callable[..., list[Any]]) -> None:
    model = load(pair.folder, ParallelContext.single())
    expected = [answer.tokens for answer in answers(model, 3, temperature=0, max_new_tokens=12)]
    assert run_ranks(_sliced, 2, str(pair.folder))[0] == expected


def test_the_command_ends_the_text_that_is_read(pair: Pair, capsys: Any) -> None:
    """As `transformers` has taught T5: a text ends with its end-of-text token, an answer begins with padding."""
    assert generate.run(GenerateRequest(str(pair.folder), ("The quick",), temperature=0.0, max_new_tokens=12)) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.folder)
    ids = [*tokenizer("The quick").input_ids, tokenizer.eos_token_id]
    # 1: what the model's own settings call the end of a text, beside that of the tokenizer, 0
    theirs = pair.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=[0, 1])[0, 1:]
    text = tokenizer.decode([token for token in theirs.tolist() if token > 1])
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")
    with pytest.raises(UsageError, match="reads as a whole"):
        generate.run(GenerateRequest(str(pair.folder), interactive=True))


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_the_command_begins_and_ends_as_the_settings_say(
    pair: Pair, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`config.json` where there is no other, as `transformers` reads older folders."""
    folder = tmp_path / "model"
    shutil.copytree(pair.folder, folder)
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    settings = json.loads((folder / file).read_text())

    def write(**changes: Any) -> None:
        (folder / file).write_text(json.dumps({**settings, **changes}))

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[*tokenizer("The quick").input_ids, tokenizer.eos_token_id]])
    command = GenerateRequest(str(folder), ("The quick",), temperature=0.0, max_new_tokens=12, format="json")
    seen = set()
    for start in (5, 77):
        write(decoder_start_token_id=start, eos_token_id=1)
        theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder)
        plain = theirs.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=[0, 1])[0, 1:].tolist()
        last = max(plain)
        for ends in ([1], [1, last]):
            write(decoder_start_token_id=start, eos_token_id=ends)
            kept = plain[: plain.index(last)] if last in ends else plain
            assert generate.run(command) == 0
            answer = json.loads(capsys.readouterr().out)
            assert answer["text"] == tokenizer.decode([token for token in kept if token > 1])
            seen.add(answer["text"])
    assert len(seen) > 2
    write(decoder_start_token_id=4000)
    with pytest.raises(CheckpointError, match=r"`decoder_start_token_id` is 4000, the model has 400 tokens"):
        generate.run(command)
    if file == "generation_config.json":
        (folder / file).write_text("{")
        with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
            generate.run(command)
