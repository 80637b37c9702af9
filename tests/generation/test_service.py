"""Jobs from many threads: each answered as if it were alone, by its own settings."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.errors import NumericsError, ResourceError
from mlm_cli.generation.answer import Answer, EncodedPrompt, Settings
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.generator import Generator
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import Sampling
from mlm_cli.generation.service import Job, Service
from mlm_cli.parallel.context import ParallelContext
from tests.generation.folders import save_model
from tests.generation.test_generator import PROMPTS, Numbers

RULES = [
    Settings(Sampling(temperature=0), 20),
    Settings(Sampling(temperature=0.9, top_k=40, seed=3), 12),
    Settings(Sampling(temperature=0, repetition_penalty=1.4), 24, end_ids=frozenset({0})),
    Settings(Sampling(temperature=0.9, top_k=40, seed=4), 12),
    Settings(Sampling(temperature=1.1, top_p=0.8, seed=5), 9),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("gpt2")
    save_model(folder, "gpt2")
    return load_model_folder(folder, ParallelContext.single())[0].eval()


Ask = Callable[[int, Settings], tuple[Job, "queue.Queue[str | Answer | None]"]]


@pytest.fixture
def service(model: Any) -> Iterator[Service]:
    made = Service(Decoder(model, 3), RULES[0], Numbers, most_waiting=40, rest=0.05)
    thread = threading.Thread(target=made.run)
    thread.start()
    yield made
    made.stop(at_once=True)
    thread.join(timeout=20)
    assert not thread.is_alive()


def ask(service: Service, number: int, settings: Settings) -> tuple[Job, queue.Queue[str | Answer | None]]:
    news: queue.Queue[str | Answer | None] = queue.Queue()
    job = Job(EncodedPrompt(Prompt(number, "", None, ""), PROMPTS[number], settings), news.put, news.put)
    service.submit([job])
    return job, news


def end(news: queue.Queue[str | Answer | None]) -> tuple[str, Answer | None]:
    """All pieces, and what came last."""
    pieces = ""
    while isinstance(item := news.get(timeout=30), str):
        pieces += item
    return pieces, item


def alone(model: Any, number: int, settings: Settings) -> Answer:
    prompt = EncodedPrompt(Prompt(number, "", None, ""), PROMPTS[number])
    return next(Generator(Decoder(model), settings, Numbers).answers([prompt]))


def test_each_job_is_answered_by_its_own_settings(model: Any, service: Service) -> None:
    """More jobs than rows, of all rules beside each other, brought by several threads."""
    asked: list[tuple[int, Settings, queue.Queue[str | Answer | None]]] = []

    def bring(rule: Settings) -> None:
        for number in range(len(PROMPTS)):
            asked.append((number, rule, ask(service, number, rule)[1]))

    threads = [threading.Thread(target=bring, args=(rule,)) for rule in RULES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == len(RULES) * len(PROMPTS)
    for number, rule, news in asked:
        pieces, answer = end(news)
        expected = alone(model, number, rule)
        assert answer is not None
        assert (answer.tokens, answer.finish_reason) == (expected.tokens, expected.finish_reason)
        assert pieces == answer.text == expected.text


def test_who_no_longer_waits_frees_the_row(service: Service) -> None:
    endless = Settings(Sampling(temperature=0), 90)
    gone = [ask(service, 1, endless) for _ in range(3)]
    _, waiting = ask(service, 4, RULES[1])
    service.cancel([job for job, _ in gone])
    assert end(waiting)[1] is not None
    assert all(end(news)[1] is None for _, news in gone)


def test_who_left_takes_no_place_in_the_queue(model: Any) -> None:
    service = Service(Decoder(model, 1), RULES[0], Numbers, most_waiting=2)
    gone = [ask(service, number, RULES[0]) for number in range(2)]
    service.cancel([job for job, _ in gone])
    stays = ask(service, 2, RULES[0])[1]
    prompt = EncodedPrompt(Prompt(0, "", None, ""), PROMPTS[0])
    with pytest.raises(ResourceError, match="1 prompts are waiting already"):  # of two jobs none is taken
        service.submit([Job(prompt, print, print), Job(prompt, print, print)])
    service.stop()
    service.run()
    assert end(stays)[1] is not None and [end(news)[1] for _, news in gone] == [None, None]


def test_a_full_queue_and_a_stopped_service_say_no(model: Any) -> None:
    service = Service(Decoder(model, 1), RULES[0], Numbers, most_waiting=2)
    first, second = ask(service, 0, RULES[0])[1], ask(service, 1, RULES[3])[1]
    with pytest.raises(ResourceError, match="2 prompts are waiting already"):
        ask(service, 2, RULES[0])
    service.stop()
    with pytest.raises(ResourceError, match="ending"):
        ask(service, 2, RULES[0])
    service.run()  # what was taken is answered first
    assert end(first)[1] is not None and end(second)[1] is not None


def test_logits_that_are_not_numbers_end_one_answer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row that has them in its third step; its neighbours go on as if alone, and so does who comes next."""
    service = Service(Decoder(model, 2), RULES[0], Numbers)
    news = [ask(service, number, RULES[0])[1] for number in range(4)]
    service.stop()
    real, steps = Decoder.step, [0]

    def spoiled(decoder: Decoder, tokens: Any) -> Any:
        logits = real(decoder, tokens).clone()
        steps[0] += 1
        if steps[0] == 3:
            logits[0, 5] = float("nan")
        return logits

    monkeypatch.setattr(Decoder, "step", spoiled)
    service.run()
    monkeypatch.undo()
    answers = [end(each)[1] for each in news]
    reasons = [answer.finish_reason for answer in answers if answer is not None]
    assert len(reasons) == 4 and reasons.count("error") == 1
    for number, answer in enumerate(answers):
        if answer is not None and answer.finish_reason != "error":
            assert answer.tokens == alone(model, number, RULES[0]).tokens
    with pytest.raises(NumericsError, match="finite"):
        monkeypatch.setattr(Decoder, "step", lambda decoder, tokens: real(decoder, tokens) * float("nan"))
        alone(model, 0, RULES[0])


def test_whatever_ends_it_every_job_is_told(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(Decoder(model, 1), RULES[0], Numbers)
    news = [ask(service, number, RULES[0])[1] for number in range(3)]
    monkeypatch.setattr(Decoder, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        service.run()
    assert [end(each)[1] for each in news] == [None] * 3
    with pytest.raises(ResourceError, match="ending"):
        ask(service, 0, RULES[0])
