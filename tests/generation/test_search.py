"""Beam search against `transformers`, contrastive search against the paper's formula over whole passes in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.config.requests import GenerateRequest
from mlm_cli.errors import NumericsError, UsageError
from mlm_cli.generation.answer import Answer, EncodedPrompt, Settings
from mlm_cli.generation.answerer import decoder_of, make_answerer
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import Sampling
from mlm_cli.jobs import generate
from mlm_cli.models.model import Model
from mlm_cli.parallel.context import ParallelContext
from tests.generation.pairs import KINDS, Pair, make_pair
from tests.generation.test_generator import Numbers


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


def load(folder: Path, parallel: ParallelContext) -> Model:
    return load_model_folder(folder, parallel)[0].eval()


@pytest.fixture(scope="module")
def model(pair: Pair) -> Model:
    return load(pair.folder, ParallelContext.single())


def settings_of(ends: list[int], **given: Any) -> Settings:
    rule = {key: given.pop(key) for key in list(given) if key in Sampling.__dataclass_fields__}
    return Settings(Sampling(**{"temperature": 0.0, **rule}), end_ids=frozenset(ends), **given)


def answers(pair: Pair, model: Model, ends: list[int], texts: int = 1, **given: Any) -> list[Answer]:
    settings = settings_of(ends, **given)
    decoder = decoder_of(model, texts, settings, start_id=pair.start)
    prompts = [EncodedPrompt(Prompt(n, "", n, ""), tokens) for n, tokens in enumerate(pair.prompts)]
    return list(make_answerer(decoder, settings, Numbers).answers(prompts))


def their_beams(pair: Pair, prompt: list[int], ends: list[int], **given: Any) -> list[int]:
    """Ids behind the prompt up to the end, without it."""
    out = pair.theirs.generate(torch.tensor([prompt]), do_sample=False, eos_token_id=ends, pad_token_id=0, **given)
    ids = out[0, 1 if pair.start is not None else len(prompt) :].tolist()
    cut = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:cut]


@pytest.mark.parametrize(
    ("beams", "length_penalty", "penalty", "num_ends"),
    [(2, 1.0, 1.0, 1), (4, 1.0, 1.3, 6), (5, 0.0, 1.0, 6), (4, -1.0, 1.0, 12), (3, 2.5, 1.0, 12), (8, 0.6, 1.0, 40)],
)
def test_beams_are_those_of_transformers(
    pair: Pair, model: Model, beams: int, length_penalty: float, penalty: float, num_ends: int
) -> None:
    """With many tokens that end a text, so that hypotheses of several lengths compete."""
    ends = [pair.end, *range(50, 49 + num_ends)]
    ours = answers(
        pair, model, ends, texts=2, beams=beams, length_penalty=length_penalty, repetition_penalty=penalty,
        max_new_tokens=24,
    )  # fmt: skip
    greedy = answers(pair, model, ends, max_new_tokens=24, repetition_penalty=penalty)
    for prompt, answer in zip(pair.prompts, ours, strict=True):
        expected = their_beams(
            pair, prompt, ends, num_beams=beams, length_penalty=length_penalty, repetition_penalty=penalty,
            max_new_tokens=24,
        )  # fmt: skip
        assert answer.tokens == expected, prompt
        assert answer.finish_reason == ("length" if len(expected) == 24 else "eod")
        assert answer.text == "".join(f"{token} " for token in expected)
    assert [a.tokens for a in ours] != [a.tokens for a in greedy], "the search finds nothing: the test shows nothing"


@pytest.mark.parametrize("texts", [1, 3])
def test_a_search_ends_where_the_context_does(pair: Pair, model: Model, texts: int) -> None:
    """The last token is never read itself, also where candidates are; and a short text beside it is none the worse."""
    if pair.start is not None:
        pytest.skip("an encoder-decoder's answer has a room of its own")
    prompts = [list(range(1, 91)), [5, 9], list(range(1, 97))]
    long = Pair(pair.folder, pair.theirs, prompts, pair.end, None)
    for given in ({"beams": 3}, {"top_k": 3, "contrastive_alpha": 0.5}):
        found = answers(long, model, [], texts=texts, max_new_tokens=20, **given)
        assert [answer.finish_reason for answer in found] == ["context", "length", "context"]
        assert [len(answer.tokens) for answer in found] == [7, 20, 1]
    assert found[0].tokens[:6] == by_hand(long, prompts[0], [], 3, 0.5, 6)
    one = answers(long, model, [], texts=texts, max_new_tokens=1, top_k=3, contrastive_alpha=0.5)
    assert [answer.finish_reason for answer in one] == ["length"] * 3


def test_a_stop_string_cuts_what_the_beams_found(pair: Pair, model: Model) -> None:
    whole = answers(pair, model, [pair.end], beams=3, max_new_tokens=20, repetition_penalty=1.4)[0]
    place = next(n for n, token in enumerate(whole.tokens) if n and token != whole.tokens[0])
    stop = f" {whole.tokens[place]} "
    found = answers(pair, model, [pair.end], beams=3, max_new_tokens=20, repetition_penalty=1.4, stops=(stop,))[0]
    assert found.finish_reason == "stop" and found.text == " ".join(map(str, whole.tokens[:place]))


def by_hand(
    pair: Pair, prompt: list[int], ends: list[int], top_k: int, alpha: float, count: int, penalty: float = 1.0
) -> list[int]:
    """Equation 5 of the paper: every candidate in a whole pass of its own, in float64, nothing kept."""
    model = pair.theirs.double()

    def states(answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if pair.start is None:
            out = model(torch.tensor([[*prompt, *answer]]), output_hidden_states=True)
            return F.normalize(out.hidden_states[-1][0], dim=-1), out.logits[0, -1]
        decoder_ids = torch.tensor([[pair.start, *answer]])
        out = model(torch.tensor([prompt]), decoder_input_ids=decoder_ids, output_hidden_states=True)
        return F.normalize(out.decoder_hidden_states[-1][0], dim=-1), out.logits[0, -1]

    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < count:
            logits, said = states(answer)[1], [*(prompt if pair.start is None else [pair.start]), *answer]
            for token in set(said):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            probabilities, tokens = torch.softmax(logits, -1).topk(top_k)
            scores = []
            for probability, token in zip(probabilities.tolist(), tokens.tolist(), strict=True):
                unit, _ = states([*answer, token])
                scores.append((1 - alpha) * probability - alpha * float((unit[:-1] @ unit[-1]).max()))
            token = int(tokens[scores.index(max(scores))])
            if token in ends:
                break
            answer.append(token)
    pair.theirs.float()
    return answer


@pytest.mark.parametrize(("top_k", "alpha", "penalty"), [(4, 0.6, 1.0), (7, 0.3, 1.3), (2, 1.0, 1.0)])
def test_contrastive_answers_are_those_of_the_formula(
    pair: Pair, model: Model, top_k: int, alpha: float, penalty: float
) -> None:
    ends = [pair.end, *range(50, 60)]
    given = {"contrastive_alpha": alpha, "repetition_penalty": penalty}
    ours = answers(pair, model, ends, texts=3, top_k=top_k, max_new_tokens=12, **given)
    for prompt, answer in zip(pair.prompts, ours, strict=True):
        assert answer.tokens == by_hand(pair, prompt, ends, top_k, alpha, 12, penalty), prompt
    greedy = answers(pair, model, ends, max_new_tokens=12)
    assert [a.tokens for a in ours] != [a.tokens for a in greedy]


@pytest.mark.parametrize("given", [{"beams": 3}, {"top_k": 3, "contrastive_alpha": 0.5}], ids=["beams", "contrastive"])
@pytest.mark.parametrize("texts", [2, 6])
def test_an_answer_does_not_depend_on_its_company(
    pair: Pair, model: Model, given: dict[str, Any], texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of different length that begin and end at different times, in a cache that has to grow."""
    ends = [pair.end, *range(50, 90)]
    alone = answers(pair, model, ends, max_new_tokens=20, **given)
    monkeypatch.setattr("mlm_cli.generation.slots._FIRST_CAPACITY", 2)
    assert answers(pair, model, ends, texts=texts, max_new_tokens=20, **given) == alone
    assert len({len(answer.tokens) for answer in alone}) > 2


def _sliced(rank: int, size: int, folder: str, prompts: list[list[int]], end: int, start: int | None) -> list[Any]:
    model, found = load(Path(folder), ParallelContext.create(tensor=size)), []
    for given in ({"beams": 3}, {"top_k": 3, "contrastive_alpha": 0.5}):
        settings = settings_of([end], max_new_tokens=10, **given)
        decoder = decoder_of(model, 2, settings, start_id=start)
        if rank:
            decoder.follow()
            continue
        encoded = [EncodedPrompt(Prompt(n, "", n, ""), tokens) for n, tokens in enumerate(prompts)]
        found.append([answer.tokens for answer in make_answerer(decoder, settings, Numbers).answers(encoded)])
        decoder.close()
    return found


def test_slicing_changes_no_answer(pair: Pair, run_ranks: Callable[..., list[Any]]) -> None:
    given = (str(pair.folder), pair.prompts, pair.end, pair.start)
    assert run_ranks(_sliced, 2, *given)[0] == _sliced(0, 1, *given)


def test_the_command_searches(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    request = {"prompts": ("The quick",), "max_new_tokens": 8, "format": "json"}
    texts = []
    for given in ({"beams": 4}, {"contrastive_alpha": 0.6, "top_k": 4}, {"temperature": 0.0}):
        assert generate.run(GenerateRequest(str(pair.folder), **request, **given)) == 0  # type: ignore[arg-type]
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"beams": 4, "contrastive_alpha": 0.5, "top_k": 4}, "two searches"),
        ({"contrastive_alpha": 0.5}, "top-k is 0"),
        ({"contrastive_alpha": 0.5, "top_k": 129}, "the 2 to 128 likeliest tokens, and top-k is 129"),
        ({"length_penalty": 2.0}, "length_penalty 2.0 is for a beam search, and there is none"),
        ({"beams": 4, "top_k": 4}, "top-k 4 is for sampling, and generate.beams searches"),
        ({"beams": 4, "temperature": 0.7}, "temperature 0.7 is for sampling"),
        ({"contrastive_alpha": 0.5, "top_k": 4, "top_p": 0.9}, "top-p 0.9 is for sampling"),
        ({"beams": 2, "interactive": True}, "`--interactive` samples its answers"),
        ({"beams": 2, "serve": True}, "`--serve` samples its answers"),
    ],
)
def test_what_excludes_each_other_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        generate.run(GenerateRequest("nowhere", ("x",), **given))


def test_more_candidates_than_tokens(pair: Pair, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"20 beams chooses among 420 tokens at a time, and the vocabulary has 400"):
        answers(pair, model, list(range(20)), beams=20)
    monkeypatch.setattr(type(model), "vocab_size", 3)
    with pytest.raises(UsageError, match=r"top-k 4 is more than the vocabulary of 3"):
        answers(pair, model, [pair.end], top_k=4, contrastive_alpha=0.5)


def test_logits_that_are_no_numbers_end_the_run(pair: Pair, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, tokens: step(self, tokens) * float("nan"))
    for given in ({"beams": 3}, {"top_k": 3, "contrastive_alpha": 0.5}):
        with pytest.raises(NumericsError, match="not finite"):
            answers(pair, model, [pair.end], max_new_tokens=4, **given)
