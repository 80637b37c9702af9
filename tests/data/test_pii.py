"""Personal data against Presidio's synthetic set, which says where it is, and against values with known checksums."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from mlm_cli.data import pii
from mlm_cli.errors import UsageError

# Least precision and recall on the set; telephone numbers with the eight countries that Presidio reads.
LEAST = {
    "EMAIL_ADDRESS": (1.0, 1.0),
    "IBAN_CODE": (1.0, 1.0),
    "CREDIT_CARD": (1.0, 0.99),
    "US_SSN": (1.0, 1.0),
    "IP_ADDRESS": (1.0, 1.0),
    "PHONE_NUMBER": (0.9, 0.55),
}
REGIONS = ("US", "GB", "DE", "FR", "IL", "IN", "CA", "BR")


def kinds(text: str, regions: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    return [(span.kind, text[span.start : span.end]) for span in pii.find(text, regions)]


def test_presidios_synthetic_set(test_data: Path) -> None:
    pytest.importorskip("phonenumbers")
    found, right, there, covered = Counter(), Counter(), Counter(), Counter()
    for example in json.loads((test_data / "privacy/presidio_synth_dataset_v2.json").read_text(encoding="utf-8")):
        told = [(span["entity_type"], span["start_position"], span["end_position"]) for span in example["spans"]]
        spans = pii.find(example["full_text"], REGIONS)
        for span in spans:
            found[span.kind] += 1
            right[span.kind] += any(span.kind == kind and span.start < b and a < span.end for kind, a, b in told)
        for kind, a, b in told:
            there[kind] += 1
            covered[kind] += any(span.kind == kind and span.start <= a and b <= span.end for span in spans)
    assert there["CREDIT_CARD"] == 136 and there["PHONE_NUMBER"] == 92
    for kind, (precision, recall) in LEAST.items():
        assert right[kind] / found[kind] >= precision, kind
        assert covered[kind] / there[kind] >= recall, kind


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("write to jo.smith+list@mail.example.co.uk.", "EMAIL_ADDRESS", "jo.smith+list@mail.example.co.uk"),
        ("<müller@exämple.de>", "EMAIL_ADDRESS", "müller@exämple.de"),
        ("IBAN GB82 WEST 1234 5698 7654 32 is an example", "IBAN_CODE", "GB82 WEST 1234 5698 7654 32"),
        ("(de89370400440532013000)", "IBAN_CODE", "de89370400440532013000"),
        ("NO93 8601 1117 947", "IBAN_CODE", "NO93 8601 1117 947"),
        ("card 4111 1111 1111 1111, thanks", "CREDIT_CARD", "4111 1111 1111 1111"),
        ("5555-5555-5555-4444", "CREDIT_CARD", "5555-5555-5555-4444"),
        ("3782 822463 10005", "CREDIT_CARD", "3782 822463 10005"),
        ("from 8.8.8.8.", "IP_ADDRESS", "8.8.8.8"),
        ("[2001:4860:4860::8888]", "IP_ADDRESS", "2001:4860:4860::8888"),
        ("SSN: 219-09-9999", "US_SSN", "219-09-9999"),
    ],
)
def test_found(text: str, kind: str, value: str) -> None:
    assert kinds(text) == [(kind, value)]
    start = text.index(value)
    assert pii.redact(text, pii.find(text)) == f"{text[:start]}<{kind}>{text[start + len(value) :]}"


@pytest.mark.parametrize(
    "text",
    [
        "@home, at a@b, me@localhost, user@@example.org, decorators like @cache.setter",
        "GB82 WEST 1234 5698 7654 33",  # a checksum that is wrong
        "XX89370400440532013000",  # no such country
        "DE8937040044053201300",  # too short for its country
        "4111 1111 1111 1112",  # Luhn
        "9111111111111111117",  # no issuer
        "127.0.0.1 10.0.0.1 192.168.1.1 300.1.1.1 1.2.3 1.2.3.4.5 ::1 fe80::1",
        "std::vector a::b 12:30:45 00:1A:2B:3C:4D:5E",
        "000-12-3456 666-12-3456 900-12-3456 123-00-4567 123-45-0000 123-45 6789 123456789",
        "in 1861-1865, pp. 12-14, 3.14159265358979, 1,000,000,000,000, ISBN 978-3-16-148410-0",
        "",
    ],
)
def test_left_alone(text: str) -> None:
    assert kinds(text) == []
    assert pii.redact(text, []) == text


def test_one_piece_is_one_kind_and_nothing_else_changes() -> None:
    values = ["4111111111111111", "a@b.org", "GB82WEST12345698765432", "219-09-9999", "8.8.4.4"]
    chance = random.Random(3)
    for _ in range(300):
        chosen = [chance.choice(values) for _ in range(chance.randint(1, 5))]
        between = ["".join(chance.choices("xyz ,;\n", k=6)) + " " for _ in chosen]
        text = "".join(f"{gap}{value} " for gap, value in zip(between, chosen, strict=True))
        spans = pii.find(text)
        assert [text[span.start : span.end] for span in spans] == chosen
        wanted = "".join(f"{gap}<{span.kind}> " for gap, span in zip(between, spans, strict=True))
        assert pii.redact(text, spans) == wanted and not pii.find(wanted)
    assert kinds("7@4111111111111111.org") == [("EMAIL_ADDRESS", "7@4111111111111111.org")]  # which holds a card


@pytest.mark.parametrize("digits", ["79927398713", "4539578763621486", "0"])
def test_luhn_finds_every_wrong_digit(digits: str) -> None:
    assert pii.luhn_is_valid(digits)
    for place, right in enumerate(digits):
        for wrong in set("0123456789") - {right}:
            assert not pii.luhn_is_valid(digits[:place] + wrong + digits[place + 1 :])


def test_telephone_numbers_by_country() -> None:
    pytest.importorskip("phonenumbers")
    text = "Call (415) 555-2671, 020 7946 0958 or +49 30 901820."
    assert kinds(text) == []
    assert kinds(text, ("US",)) == [("PHONE_NUMBER", "(415) 555-2671"), ("PHONE_NUMBER", "+49 30 901820")]
    assert [value for _, value in kinds(text, ("US", "GB"))] == ["(415) 555-2671", "020 7946 0958", "+49 30 901820"]
    with pytest.raises(UsageError, match="`XX` is no country"):
        pii.check_regions(("US", "XX"))


@pytest.mark.parametrize(
    "piece", ["1", "1 ", "12:", ":", "a@", "a.", "AB12", "AB12 AB12 ", "1.2.3.4", "a@b.c", "4111 "]
)
def test_no_text_takes_long(piece: str) -> None:
    """Half a megabyte of what a pattern could trip over: time must not grow with the square of the length."""
    begun = time.process_time()
    pii.find(piece * (500_000 // len(piece)))
    assert time.process_time() - begun < 8
