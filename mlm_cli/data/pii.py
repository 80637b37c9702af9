"""Personal data that has a form: e-mail and IP addresses, telephone, card, account and social security numbers.

Names, postal addresses, dates of birth and whatever else has no form of its own are not found: they need a model of
the language. What has a checksum or a register of valid values is checked against it. Tags are those of Presidio.
"""

from __future__ import annotations

import bisect
import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlm_cli.errors import UsageError

KINDS = ("EMAIL_ADDRESS", "IBAN_CODE", "CREDIT_CARD", "US_SSN", "IP_ADDRESS", "PHONE_NUMBER")  # the first one wins


@dataclass(frozen=True)
class Span:
    """A piece of a text, in characters."""

    kind: str
    start: int
    end: int


_EMAIL = re.compile(
    r"(?<![\w.!#$%&'*+/=?^`{|}~-])[\w!#$%&'*+/=?^`{|}~-][\w.!#$%&'*+/=?^`{|}~-]{0,63}"
    r"@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,63}(?![\w@])"
)
# The patterns below begin with a digit, and look back from it, because `re` finds a first character quickly.
# ISO 13616: two letters, two check digits, and the account, as one word or in groups of four.
_IBAN = re.compile(
    r"[0-9]{2}(?<=[A-Za-z]{2}[0-9]{2})(?<!\w[A-Za-z]{2}[0-9]{2})(?: ?[A-Za-z0-9]{4}){2,7}(?: ?[A-Za-z0-9]{1,3})?(?!\w)"
)
_IBAN_LENGTHS = {
    code: int(length)
    for length, codes in {
        15: "NO",
        16: "BE",
        18: "DK FK FI FO GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK",
        21: "CH CR HR LI LV",
        22: "BG BH DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU YE",
        31: "MT SC",
        32: "LC",
        33: "RU",
    }.items()
    for code in codes.split()
}
_CARD = re.compile(
    r"[0-9](?<![\w.,-][0-9])(?:[0-9]{11,18}|[0-9]{3}(?P<mid>[ -])[0-9]{6}(?P=mid)[0-9]{4,5}"
    r"|[0-9]{3}(?P<sep>[ -])[0-9]{4}(?:(?P=sep)[0-9]{4}){1,2}(?:(?P=sep)[0-9]{1,4})?)(?![\w-]|[.,][0-9])"
)
# First digits and lengths of ISO/IEC 7812 issuers: Visa, Mastercard, Amex, Diners, Discover, JCB, UnionPay, Maestro.
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-59]|[689]\d)\d{11}|(?:2131|1800)\d{11}|35\d{14,17}|(?:50|5[6-8]|6\d)\d{10,17}"
)
_SSN = re.compile(r"[0-9](?<![\w.-][0-9])[0-9]{2}(?P<sep>[ -])[0-9]{2}(?P=sep)[0-9]{4}(?![\w-]|\.[0-9])")
_IPV4 = re.compile(r"[0-9](?<![\w.][0-9])[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?!\w|\.[0-9])")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}|:)(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_MAYBE_IPV6 = re.compile(r":[0-9A-Fa-f]{0,4}:")
_MAYBE_PHONE = re.compile(r"[0-9](?:[^\w\n]{0,3}[0-9]){6}")  # the matcher takes long, and most texts have no number


def find(text: str, regions: tuple[str, ...] = ()) -> list[Span]:
    """Every piece of ``text`` that looks like personal data, in order, none overlapping another.

    Args:
        regions: countries (ISO 3166) whose numbers are known without their +NN too; none: no telephone numbers at all.
    """
    found: list[Span] = []
    for finder in (_emails, _ibans, _cards, _security_numbers, _addresses):
        found += finder(text)
    if regions and _MAYBE_PHONE.search(text):
        found += _phones(text, regions)
    rank = {kind: number for number, kind in enumerate(KINDS)}
    taken: list[Span] = []  # in order
    for span in sorted(found, key=lambda span: (rank[span.kind], span.start, -span.end)):
        at = bisect.bisect_right(taken, span.start, key=lambda other: other.start)
        free_before = at == 0 or taken[at - 1].end <= span.start
        if free_before and (at == len(taken) or span.end <= taken[at].start):
            taken.insert(at, span)
    return taken


def redact(text: str, spans: list[Span]) -> str:
    """``text`` with each of ``spans`` replaced by its kind, as `<EMAIL_ADDRESS>`."""
    pieces: list[str] = []
    at = 0
    for span in spans:
        pieces += [text[at : span.start], f"<{span.kind}>"]
        at = span.end
    return "".join([*pieces, text[at:]])


def _matches(pattern: re.Pattern[str], kind: str, text: str, valid: Callable[[str], bool]) -> Iterator[Span]:
    for match in pattern.finditer(text):
        if valid(match.group()):
            yield Span(kind, match.start(), match.end())


def _emails(text: str) -> Iterator[Span]:
    if "@" in text:
        yield from _matches(_EMAIL, "EMAIL_ADDRESS", text, lambda _: True)


def _ibans(text: str) -> Iterator[Span]:
    """Of the length its country has, with a right checksum; what follows in groups of four may be other words."""
    at = 0
    while match := _IBAN.search(text, at):
        start = match.start() - 2
        length = _IBAN_LENGTHS.get(text[start : start + 2].upper())
        end = _end_of(text, start, match.end(), length) if length else None
        if end is not None and iban_is_valid(text[start:end]):
            yield Span("IBAN_CODE", start, end)
            at = end
        else:
            at = match.start() + 2


def _end_of(text: str, start: int, stop: int, length: int) -> int | None:
    """Where ``length`` characters that are no spaces end, if a word ends there."""
    for position in range(start, stop):
        length -= text[position] != " "
        if not length:
            whole = position + 1 == len(text) or not text[position + 1].isalnum()
            return position + 1 if whole else None
    return None


def iban_is_valid(text: str) -> bool:
    """ISO 7064 MOD 97-10: letters as 10 to 35, the first four characters last, remainder 1."""
    plain = text.replace(" ", "").upper()
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97 == 1


def luhn_is_valid(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    doubled = [int(digit) * 2 for digit in digits[-2::-2]]
    return (sum(map(int, digits[::-2])) + sum(number - 9 * (number > 9) for number in doubled)) % 10 == 0


def _cards(text: str) -> Iterator[Span]:
    def valid(number: str) -> bool:
        digits = number.replace(" ", "").replace("-", "")
        return bool(_ISSUERS.fullmatch(digits)) and luhn_is_valid(digits)

    yield from _matches(_CARD, "CREDIT_CARD", text, valid)


def _security_numbers(text: str) -> Iterator[Span]:
    """Of the areas, groups and serial numbers that are given out (since 2011: all but 000, 666, 9xx; 00; 0000)."""

    def valid(number: str) -> bool:
        area, group, serial = number[:3], number[4:6], number[7:]
        return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"

    yield from _matches(_SSN, "US_SSN", text, valid)


def _addresses(text: str) -> Iterator[Span]:
    """Addresses that anybody can reach: 127.0.0.1, 192.168.1.1 and the like are nobody's."""

    def valid(address: str) -> bool:
        try:
            return ipaddress.ip_address(address).is_global
        except ValueError:
            return False

    yield from _matches(_IPV4, "IP_ADDRESS", text, valid)
    if _MAYBE_IPV6.search(text):
        # `a::b` is an address too, and far more often something of a programming language
        yield from _matches(_IPV6, "IP_ADDRESS", text, lambda found: found.count(":") > 2 and valid(found))


def _phones(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    from phonenumbers import Leniency, PhoneNumberMatcher

    for region in regions:
        # by itself the matcher gives up after 65,535 numbers that are none
        for match in PhoneNumberMatcher(text, region, leniency=Leniency.VALID, max_tries=len(text)):
            yield Span("PHONE_NUMBER", match.start, match.end)


def check_regions(regions: tuple[str, ...]) -> None:
    """Are these countries known, and is the library that reads their numbers there?

    Raises:
        UsageError: neither.
    """
    try:
        import phonenumbers
    except ModuleNotFoundError:
        raise UsageError(
            "`preprocess.clean.pii` reads telephone numbers with `phonenumbers`, which is not installed",
            hint="pip install 'mlm-cli[pii]', or `preprocess.clean.phone_regions=[]` to leave these numbers alone",
        ) from None
    for region in regions:
        if region not in phonenumbers.SUPPORTED_REGIONS:
            raise UsageError(
                f"`preprocess.clean.phone_regions`: `{region}` is no country", hint="ISO 3166 codes, such as US, GB, DE"
            )
