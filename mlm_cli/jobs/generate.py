"""`mlm generate`: load a model, answer prompts. Rank 0 reads, decides and writes; the others compute along."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mlm_cli import __version__, distributed, log
from mlm_cli.checkpoint.compressed_tensors import is_quantized
from mlm_cli.checkpoint.fingerprint import weights_fingerprint
from mlm_cli.checkpoint.hub import check_vocabulary, load_model_folder, read_model_config, resolve_model
from mlm_cli.checkpoint.manifest import check_weights
from mlm_cli.checkpoint.text_ends import end_ids, start_id
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.generation import prompts as prompt_sources
from mlm_cli.generation.answer import EncodedPrompt, Settings
from mlm_cli.generation.answerer import decoder_of, make_answerer
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.dialogue import Dialogue
from mlm_cli.generation.encoding import PromptEncoder
from mlm_cli.generation.output import AnswerWriter
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.provenance import Provenance
from mlm_cli.generation.sampling import Sampling
from mlm_cli.generation.service import Service
from mlm_cli.generation.text_stream import text_stream
from mlm_cli.jobs.knowledge import check_knowledge, grounded_encoder, tell_dropped, tell_sources
from mlm_cli.jobs.serve import Web
from mlm_cli.jobs.watermark import watermark_of
from mlm_cli.models.model import Model
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks.task_folder import prompt_affixes

if TYPE_CHECKING:
    from mlm_cli.config.requests import GenerateRequest
    from mlm_cli.config.schema import ModelSection

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(request: GenerateRequest) -> int:
    """Answer what ``request`` asks, on every rank of the job. Returns the exit code.

    Raises:
        UsageError: an option out of range, or ranks that do not form one sliced model.
        DataError: prompts or tokenizer that cannot be used.
        CheckpointError: a model that cannot be used.
    """
    settings = _settings(request)
    check_knowledge(request)
    env = distributed.init()
    try:
        if request.tensor != env.world_size:
            raise UsageError(
                f"parallel.tensor={request.tensor} with {env.world_size} ranks",
                hint="generation slices one model over all ranks; start as many prompts files as you want copies",
            )
        parallel = ParallelContext.create(tensor=request.tensor, device=env.device)
        folder = resolve_model(request.model)
        if env.rank == 0:
            return _lead(request, settings, folder, parallel)
        return _follow(request, settings, folder, parallel)
    finally:
        distributed.shutdown()


def _settings(request: GenerateRequest) -> Settings:
    sampling = Sampling(
        request.temperature, request.top_k, request.top_p, request.repetition_penalty, seed=request.seed
    )
    if request.batch_size < 1:
        raise UsageError(f"batch size {request.batch_size} is below 1")
    settings = Settings(
        sampling,
        request.max_new_tokens,
        request.stop,
        beams=request.beams,
        length_penalty=request.length_penalty,
        contrastive_alpha=request.contrastive_alpha,
    )
    if settings.searches and (request.serve or request.interactive):
        raise UsageError(
            f"`{'--serve' if request.serve else '--interactive'}` samples its answers; it cannot search for them",
            hint="leave generate.beams and generate.contrastive_alpha out",
        )
    if request.provenance and request.format != "json" and not request.serve:
        raise UsageError(
            "generate.provenance stands in JSON answers, and these are text",
            hint="add `--format json`, or set generate.provenance=false",
        )
    return settings


def _follow(request: GenerateRequest, settings: Settings, folder: Path, parallel: ParallelContext) -> int:
    """Any other rank."""
    with _meeting(parallel) as told:
        model = _load(request, folder, parallel)
    if told.ready:
        if request.interactive or request.serve:  # there Ctrl-C is for rank 0, though the terminal sends it to all
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if request.serve:  # rank 0 finishes what is under way, and then lets the others go
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _decoder(request, settings, folder, model).follow()
    return 0


def _lead(request: GenerateRequest, settings: Settings, folder: Path, parallel: ParallelContext) -> int:
    """Rank 0: everything that can be wrong with the input is found before the weights are read."""
    with _meeting(parallel) as told:
        section, config = read_model_config(folder)
        _check_family(section, request)
        settings = _marked(request, settings)
        tokenizer = load_tokenizer(request.tokenizer or str(folder))
        check_vocabulary(section, tokenizer, str(folder))
        settings = replace(settings, end_ids=end_ids(folder, tokenizer))
        affixes = prompt_affixes(config, section.family) if request.as_trained and not request.interactive else ("", "")
        web = Web(request) if request.serve else None
        ends = section.family == "t5"
        if request.retrieval is not None:
            encoder = grounded_encoder(request, tokenizer, section.seq_length, parallel, ends=ends, affixes=affixes)
        else:
            encoder = PromptEncoder(tokenizer, section.seq_length, ends=ends, affixes=affixes)
        prompts = None if request.interactive or request.serve else _prompts(request, encoder)
        check_weights(folder)  # a flipped bit is no error to the reader, and words all the same
        decoder = _decoder(request, settings, folder, _load(request, folder, parallel))
        origin = _provenance(request, folder, decoder.model.dtype) if request.provenance else None
        told.ready = True
    try:
        if web is not None:
            service = Service(decoder, settings, lambda: text_stream(tokenizer))
            web.serve(service, encoder, settings, section, origin)
        elif prompts is None:
            _talk(request, settings, decoder, tokenizer, origin)
        else:
            _answer_all(request, settings, decoder, tokenizer, prompts, origin)
    finally:
        with suppress(RuntimeError):  # a rank that is gone cannot be told; the first error counts
            decoder.close()
    return 0


def _marked(request: GenerateRequest, settings: Settings) -> Settings:
    """With the watermark that is asked for."""
    if request.watermark_bias == 0:
        return settings
    return replace(settings, sampling=replace(settings.sampling, watermark=watermark_of(request)))


@dataclass
class _Told:
    """Whether rank 0 has work for the others."""

    ready: bool = False


@contextmanager
def _meeting(parallel: ParallelContext) -> Iterator[_Told]:
    """Prepare apart, then meet: each rank comes, whatever befell it, so that none waits for one that failed."""
    told = _Told()
    try:
        yield told
    finally:
        with suppress(RuntimeError):  # a rank that is gone; what happened to this one, if anything, is the news
            flag = torch.tensor([int(told.ready)], device=parallel.device)
            told.ready = bool(parallel.tensor.broadcast_(flag).item())


def _check_family(section: ModelSection, request: GenerateRequest) -> None:
    """Refuse what a family cannot do."""
    if section.family == "bert":
        raise UsageError(
            f"{request.model} is a masked language model: it fills gaps, and does not write on",
            hint="generate with a model of family gpt or t5",
        )
    if section.family == "t5" and request.interactive:
        raise UsageError(
            f"{request.model} answers a text that it reads as a whole; it cannot go on with a conversation",
            hint="give texts with --prompt, --prompts or on standard input",
        )


def _decoder(request: GenerateRequest, settings: Settings, folder: Path, model: Model) -> Decoder:
    """What runs the model, equal on all ranks."""
    texts = 1 if request.interactive else request.batch_size
    start = start_id(folder, model.config) if model.config.family == "t5" else None
    return decoder_of(model, texts, settings, start_id=start)


def _load(request: GenerateRequest, folder: Path, parallel: ParallelContext) -> Model:
    """The model in the precision asked for; ``auto`` is that of the files. Matrices that are int8 there stay int8."""
    dtype, (_, config) = _DTYPES.get(request.precision), read_model_config(folder)
    if dtype is None:
        stored = config.values.get("dtype") or config.values.get("torch_dtype")
        dtype = _STORED.get(str(stored), torch.float32)
    options = {"keep_int8": True} if is_quantized(config) else {}
    model, _ = load_model_folder(folder, parallel, dtype=dtype, **options)
    return model.eval().requires_grad_(False)


def _prompts(request: GenerateRequest, encoder: PromptEncoder) -> Iterable[EncodedPrompt]:
    """What to answer. A prompts file is read and checked once beforehand, so that a mistake in its last line costs no
    time; standard input can be read only once and is taken as it comes."""
    if request.prompts:
        return list(encoder.encode_all(prompt_sources.from_texts(request.prompts)))
    if request.prompts_file is None:
        return [encoder.encode(prompt_sources.from_text_stream(sys.stdin.buffer))]
    if request.prompts_file != "-":
        for prompt in prompt_sources.from_jsonl(request.prompts_file):
            encoder.check(prompt)
    return encoder.encode_all(prompt_sources.from_jsonl(request.prompts_file))


def _answer_all(
    request: GenerateRequest,
    settings: Settings,
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Iterable[EncodedPrompt],
    origin: Provenance | None,
) -> None:
    many = request.prompts_file is not None or len(request.prompts) > 1
    with _writer(request, settings, origin, many=many) as writer:
        show: Callable[[Prompt, str], None] | None = writer.show if writer.streams else None
        answerer = make_answerer(decoder, settings, lambda: text_stream(tokenizer), show)
        begin = time.perf_counter()
        num_answers = num_tokens = cut = dropped = 0
        for answer in answerer.answers(prompts):
            writer.write(answer)
            tell_sources(answer, request)
            num_answers += 1
            dropped += bool(answer.prompt.retrieved and answer.prompt.retrieved.num_dropped)
            num_tokens += len(answer.tokens)
            cut += answer.finish_reason == "context"
    seconds = time.perf_counter() - begin
    if cut:
        log.warn(f"{cut} of {num_answers} answers end where the model's context of {decoder.max_length} tokens does")
    if dropped:
        tell_dropped(dropped, num_answers)
    answers = "1 answer" if num_answers == 1 else f"{num_answers} answers"
    log.info(f"{answers}, {num_tokens} tokens in {seconds:.1f} s ({num_tokens / max(seconds, 1e-9):.0f} tokens/s)")


def _talk(
    request: GenerateRequest, settings: Settings, decoder: Decoder, tokenizer: Tokenizer, origin: Provenance | None
) -> None:
    log.info("Ctrl-C stops a reply, Ctrl-D leaves")
    with _writer(request, settings, origin, many=False) as writer:
        Dialogue(decoder, tokenizer, settings, writer).run()


def _writer(request: GenerateRequest, settings: Settings, origin: Provenance | None, *, many: bool) -> AnswerWriter:
    told = None if origin is None else origin.record(settings)
    return AnswerWriter(request.output, as_json=request.format == "json", many=many, provenance=told)


def _provenance(request: GenerateRequest, folder: Path, dtype: torch.dtype) -> Provenance:
    """What the model is, after ``check_weights``. Who asks a server is not told its paths."""
    weights, step = weights_fingerprint(folder)
    name = Path(request.model).name if request.serve else request.model
    facts = {"mlm_version": __version__, "model": name, "step": step, "weights_sha256": weights}
    return Provenance(facts | {"dtype": str(dtype).removeprefix("torch."), "as_trained": request.as_trained})
