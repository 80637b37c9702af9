"""`mlm preprocess --inspect` and `--merge`: look into finished sets, and join them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlm_cli import log
from mlm_cli.data.indexed import IndexedDataset, IndexedParts, resolve_prefix
from mlm_cli.data.merge import merge_pairs, publish
from mlm_cli.data.sidecar import Sidecar, load_sidecar, sidecar_path
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import DataError, MlmError, UsageError
from mlm_cli.jobs.preprocess_clean import filter_text

_SAMPLED = 1 << 20
_SHOWN_TOKENS = 96
_SHOWN_SOURCES = 40


def inspect(prefix: str, *, tokenizer: str | None = None, documents: int = 3) -> dict[str, Any]:
    """Counts, lengths and first documents of a set. Lengths beyond a million sequences are an even sample.

    Raises:
        DataError: no such set, or a damaged one; or a ``tokenizer`` asked for that does not load.
    """
    dataset = IndexedDataset(prefix)
    sidecar = load_sidecar(dataset.prefix)
    lengths = dataset.lengths[:: max(1, dataset.num_sequences // _SAMPLED)]
    report: dict[str, Any] = {
        "prefix": dataset.prefix,
        "dtype": str(dataset.dtype),
        "documents": dataset.num_documents,
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "bytes": {"bin": Path(dataset.bin_path).stat().st_size, "idx": Path(dataset.idx_path).stat().st_size},
        "contiguous": dataset.contiguous,
        "max_token_id": dataset.max_token(),
        "sequence_lengths": _spread(lengths),
    }
    if sidecar is not None:
        report["sidecar"] = {
            "tokenizer": sidecar.tokenizer_spec,
            "tokenizer_fingerprint": sidecar.tokenizer_fingerprint,
            "vocab_size": sidecar.vocab_size,
            "eod_id": sidecar.eod_id,
            "sources": len(sidecar.sources),
            "skipped": sidecar.bad_lines.get("count", 0),
            "filters": sidecar.filters,
        }
        report["characters_per_token"] = _characters_per_token(sidecar)
    known = _tokenizer_of(tokenizer, sidecar)
    report["first_documents"] = []
    for number in range(min(documents, dataset.num_documents)):
        ids = dataset.document(number)
        head = [int(token) for token in ids[:_SHOWN_TOKENS]]
        text = known.decode(head) if known is not None else None
        report["first_documents"].append({"tokens": len(ids), "ids": head[:16], "text": text})
    dataset.close()
    return report


def _spread(lengths: Any) -> dict[str, float]:
    if not len(lengths):
        return {}
    low, middle, high, top = np.percentile(lengths, [0, 50, 99, 100])
    return {
        "min": int(low),
        "median": float(middle),
        "p99": float(high),
        "max": int(top),
        "mean": float(lengths.mean()),
    }


def _characters_per_token(sidecar: Sidecar) -> list[dict[str, Any]]:
    """How well the tokenizer fits each input, worst first. Exact: counted when the text was read.

    With an input a language this compares languages: a language cut into many tokens gets less text into a sample.
    """
    counted = [source for source in sidecar.sources if source.get("text_tokens")]
    found = [
        {
            "source": source["path"],
            "characters": source["characters"],
            "tokens": source["text_tokens"],
            "characters_per_token": round(source["characters"] / source["text_tokens"], 4),
        }
        for source in counted
    ]
    return sorted(found, key=lambda entry: entry["characters_per_token"])


def _tokenizer_of(asked: str | None, sidecar: Sidecar | None) -> Tokenizer | None:
    """The tokenizer asked for; else that of the sidecar, where it still is what made the set."""
    if asked is not None:
        return load_tokenizer(asked)
    if sidecar is None:
        log.warn("no sidecar says which tokenizer made this; documents are shown as ids (--tokenizer decodes them)")
        return None
    try:
        found = load_tokenizer(sidecar.tokenizer_spec)
    except MlmError as error:
        log.warn(f"{error.message}; documents are shown as ids (--tokenizer decodes them)")
        return None
    if found.fingerprint != sidecar.tokenizer_fingerprint:
        log.warn(
            f"tokenizer `{sidecar.tokenizer_spec}` has changed since this set was made; documents are shown as ids"
        )
        return None
    return found


def inspection_text(report: dict[str, Any]) -> str:
    """The report for people."""
    spread = report["sequence_lengths"]
    lines = [
        f"{report['prefix']}: {report['documents']:,} documents, {report['sequences']:,} sequences, "
        f"{report['tokens']:,} tokens ({report['dtype']})"
    ]
    if spread:
        lines.append(
            f"sequence lengths: min {spread['min']:,}, median {spread['median']:,.0f}, mean {spread['mean']:,.1f}, "
            f"99% below {spread['p99']:,.0f}, max {spread['max']:,}; largest id {report['max_token_id']:,}"
        )
    if side := report.get("sidecar"):
        lines.append(
            f"made with {side['tokenizer']} ({side['vocab_size']:,} tokens, {side['tokenizer_fingerprint'][:12]}) "
            f"from {side['sources']:,} inputs, {side['skipped']:,} lines skipped"
        )
        lines += [f"cleaned by {filter_text(entry)}" for entry in side["filters"]]
    if fits := report.get("characters_per_token"):
        mean = sum(entry["characters"] for entry in fits) / sum(entry["tokens"] for entry in fits)
        lines.append(f"characters per token: {mean:.2f}" + ("; by input, lowest first:" if len(fits) > 1 else ""))
        shown = fits[:_SHOWN_SOURCES] if len(fits) > 1 else []
        lines += [f"{entry['characters_per_token']:8.2f}  {entry['source']}" for entry in shown]
        if len(fits) > len(shown) > 0:
            lines.append(f"          ... and {len(fits) - len(shown):,} more (--format json lists all)")
    for number, document in enumerate(report["first_documents"]):
        content = repr(document["text"]) if document["text"] is not None else str(document["ids"])
        lines.append(f"[{number}] {document['tokens']:,} tokens: {content}")
    return "\n".join(lines)


def merge(prefixes: Sequence[str], output: str, *, overwrite: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Join sets in the order given; each may be an ``--output`` prefix (all its pairs) or the prefix of one pair.

    Raises:
        UsageError: fewer than two sets, or the output exists. DataError: sets that do not fit together.
    """
    if len(prefixes) < 2:
        raise UsageError("`--merge` joins two sets or more", hint="mlm preprocess --merge A B --output C")
    sidecars = [load_sidecar(prefix) for prefix in prefixes]
    _same_tokenizer(prefixes, sidecars)
    pairs = [_pairs(prefix, sidecar) for prefix, sidecar in zip(prefixes, sidecars, strict=True)]
    names = list(pairs[0])
    for prefix, found in zip(prefixes, pairs, strict=True):
        if found.keys() != pairs[0].keys():
            raise DataError(
                f"`{prefixes[0]}` has {_listed(pairs[0])}, `{prefix}` has {_listed(found)}: a part would be left out",
                hint=f"name the pairs to be joined: {' '.join(f'{one}_KEY_document' for one in (prefixes[0], prefix))}",
            )
    for name in names:
        target = f"{output}_{name}"
        if any(Path(found[name]).absolute() == Path(target).absolute() for found in pairs):
            raise UsageError(f"`{target}` is one of the inputs", hint="choose another --output")
        if Path(target + ".idx").exists() and not overwrite:
            raise UsageError(f"`{target}.idx` exists already", hint="give --overwrite, or another --output")
    if dry_run:
        return {"prefix": output, "outputs": [f"{output}_{name}" for name in names], "merged": list(prefixes)}
    folder = Path(output + ".merging")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        parts = {name: merge_pairs([found[name] for found in pairs], folder, name) for name in names}
        outputs = [_entry(output, name, part, pairs, sidecars) for name, part in parts.items()]
        known = [sidecar for sidecar in sidecars if sidecar is not None]
        if len(known) == len(sidecars):
            (folder / "sidecar.json").write_text(_joined(known, outputs, list(prefixes)).text(), encoding="utf-8")
        publish(parts, folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {"prefix": output, "outputs": outputs, "documents": outputs[0]["documents"], "merged": list(prefixes)}


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"`{name}`" for name in found)


def _same_tokenizer(prefixes: Sequence[str], sidecars: Sequence[Sidecar | None]) -> None:
    if len({sidecar.append_eod for sidecar in sidecars if sidecar is not None}) > 1:
        log.warn("some of these sets end their documents with an end-of-document id, and some do not")
    first: tuple[str, Sidecar] | None = None
    for prefix, sidecar in zip(prefixes, sidecars, strict=True):
        if sidecar is None:
            log.warn(f"`{prefix}` has no sidecar: nothing says that it was made with the same tokenizer")
        elif first is None:
            first = (prefix, sidecar)
        elif sidecar.tokenizer_fingerprint != first[1].tokenizer_fingerprint:
            raise DataError(
                f"`{prefix}` was made with another tokenizer ({sidecar.tokenizer_spec}) than `{first[0]}` "
                f"({first[1].tokenizer_spec})",
                hint="a model reads one tokenizer: preprocess one of them again",
            )


def _pairs(prefix: str, sidecar: Sidecar | None) -> dict[str, str]:
    """Name (`KEY_document`) -> prefix of each pair meant."""
    if sidecar is not None:
        base = str(sidecar_path(prefix)).removesuffix(".json")
        whole = {entry["prefix"].removeprefix(Path(base).name + "_"): entry["prefix"] for entry in sidecar.outputs}
        found = {name: str(Path(base).with_name(pair)) for name, pair in whole.items()}
        if Path(prefix).absolute() == Path(base).absolute():
            return found
        pair = resolve_prefix(prefix)
        return {name: path for name, path in found.items() if Path(path).absolute() == Path(pair).absolute()}
    pair = resolve_prefix(prefix)
    match = re.search(r"_([^_/]+_(?:document|sentence))$", pair)
    return {match.group(1) if match else "text_document": pair}


def _entry(
    output: str,
    name: str,
    part: IndexedParts,
    pairs: Sequence[dict[str, str]],
    sidecars: Sequence[Sidecar | None],
) -> dict[str, Any]:
    entries = [
        sidecar.output(found[name]) for found, sidecar in zip(pairs, sidecars, strict=True) if sidecar is not None
    ]
    tops = [entry["max_token_id"] for entry in entries if entry is not None]
    return {
        "key": name.rpartition("_")[0],
        "prefix": f"{Path(output).name}_{name}",
        "dtype": str(part.dtype),
        "documents": part.num_documents,
        "sequences": part.num_sequences,
        "tokens": part.sizes[0] // part.dtype.itemsize,
        "max_token_id": max(tops) if len(tops) == len(pairs) else None,
    }


def _joined(known: Sequence[Sidecar], outputs: list[dict[str, Any]], prefixes: list[str]) -> Sidecar:
    first = known[0]
    return Sidecar(
        tokenizer_fingerprint=first.tokenizer_fingerprint,
        tokenizer_spec=first.tokenizer_spec,
        vocab_size=first.vocab_size,
        eod_id=first.eod_id,
        append_eod=all(sidecar.append_eod for sidecar in known),
        documents=outputs[0]["documents"],
        outputs=outputs,
        sources=[source for sidecar in known for source in sidecar.sources],
        filters=[entry for sidecar in known for entry in sidecar.filters],
        bad_lines={"count": sum(sidecar.bad_lines.get("count", 0) for sidecar in known), "first": []},
        made_by=first.made_by | {"merged_from": prefixes},
    )
