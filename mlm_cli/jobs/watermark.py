"""The watermark that a request names, with its secret key read from where it is kept."""

from __future__ import annotations

import os
from pathlib import Path

from mlm_cli.config.requests import EvaluateRequest, GenerateRequest
from mlm_cli.errors import UsageError
from mlm_cli.generation.watermark import USUAL_CONTEXT, Watermark

_FORM = "one whole number from 1 to 2^63 - 1"


def watermark_of(request: GenerateRequest | EvaluateRequest) -> Watermark:
    """Only rank 0 needs it: it alone chooses tokens, and looks for marks.

    Raises:
        UsageError: there is no key where the request says. What is there instead is not shown.
    """
    bias = request.watermark_bias if isinstance(request, GenerateRequest) else 0.0
    context = request.watermark_context or USUAL_CONTEXT[request.watermark_scheme]
    return Watermark(_key(request.watermark_key), bias, request.watermark_ratio, request.watermark_scheme, context)


def _key(reference: str | None) -> int:
    kind, _, name = (reference or "").partition(":")
    if kind == "env":
        text = os.environ.get(name, "")
    elif kind == "file":
        try:
            text = Path(name).read_text(encoding="ascii")
        except OSError as error:
            raise UsageError(f"cannot read the watermark's key in `{name}`: {error.strerror}") from None
        except UnicodeDecodeError:
            text = ""
    else:
        raise UsageError("the watermark has no key", hint="generate.watermark_key=env:NAME or =file:PATH")
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 20 and 0 < int(text) < 2**63):
        where = f"the environment variable `{name}`" if kind == "env" else f"`{name}`"
        raise UsageError(f"{where} does not hold a watermark's key: {_FORM}", hint="it is not shown here")
    return int(text)
