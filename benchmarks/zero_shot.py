"""Few-shot questions: our scoring, which reads shared beginnings once, against lm-evaluation-harness over transformers.

    python benchmarks/zero_shot.py --requests arc_easy/val_rc_5shot/requests.jsonl.gz --tokenizer gpt2/

Both have the same weights (random, saved once) and the same token ids, and score the same questions; what they find is
compared, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from interleave import save

SIZES = {"6 x 384": (6, 384, 6), "12 x 768": (12, 768, 12)}


def questions(path: str, count: int) -> list[tuple[str, str]]:
    from mlm_cli.evaluation.ranked_choice import read_questions

    return [pair for question in read_questions(path)[:count] for pair in question.pairs()[: len(question.choices)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", required=True)
    parser.add_argument("--tokenizer", required=True, help="folder or name")
    parser.add_argument("--size", choices=SIZES, default="6 x 384")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    from mlm_cli.checkpoint.hub import load_model_folder
    from mlm_cli.data.tokenizer import load_tokenizer
    from mlm_cli.evaluation.likelihood import encode_rows, score_rows
    from mlm_cli.parallel.context import ParallelContext

    layers, hidden, heads = SIZES[args.size]
    tokenizer = load_tokenizer(args.tokenizer)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size, n_layer=layers, n_embd=hidden, n_head=heads, n_positions=1024,
        initializer_range=0.1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        theirs = transformers.GPT2LMHeadModel(config).eval()
        theirs.save_pretrained(folder)
        ours = load_model_folder(Path(folder), ParallelContext.single())[0].eval()
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.reference, eos_token="<|endoftext|>")
    rival = HFLM(pretrained=theirs, tokenizer=plain, batch_size=args.batch)
    pairs = questions(args.requests, args.questions)
    rows = encode_rows(tokenizer, pairs, ["row"] * len(pairs))
    requests = [(("", ""), list(row.ids[: row.begin]), list(row.ids[row.begin :])) for row in rows]

    def mine() -> Any:
        return [one.total for one in score_rows(ours, rows, length=1024, batch_size=args.batch)]

    def harness() -> Any:
        return [score for score, _ in rival._loglikelihood_tokens(requests, disable_tqdm=True)]

    contenders = {"mlm": mine, "lm-eval over transformers": harness, "mlm again": mine}
    scores = {name: work() for name, work in contenders.items()}
    apart = max(abs(a / b - 1) for a, b in zip(scores["mlm"], scores["lm-eval over transformers"], strict=True))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(args.rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    report: dict[str, Any] = {
        "rows": len(rows),
        "tokens": sum(len(row.ids) for row in rows),
        "largest difference": apart,
    }
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times["mlm"], strict=True))
        report[name] = {"seconds": statistics.median(seconds), "mlm is": ratio}
        print(f"{name:<28} {statistics.median(seconds):8.2f} s   mlm is {ratio:5.2f}x")
    print(f"{report['rows']} rows, {report['tokens']:,} tokens; scores apart by at most {apart:.1e}")
    print(f"written to {save('zero_shot', report)}", file=sys.stderr)


if __name__ == "__main__":
    main()
