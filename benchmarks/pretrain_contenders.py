"""One contender of ``benchmarks/pretrain.py``: trains a GPT on the CPU, so many steps each time it is asked.

All see the same random tokens, the same shapes (tied embeddings, no dropout), AdamW and a gradient norm clipped at 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from interleave import serve
from torch import Tensor, nn

LAYERS, HIDDEN, HEADS, LENGTH = 6, 384, 6, 256
LR, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {  # how two ranks are laid out, and the stage of ZeRO
    "tensor2": ({"tensor": 2}, 0),
    "tensor2-sequence": ({"tensor": 2, "sequence": True}, 0),
    "data2": ({}, 0),
    "data2-zero1": ({}, 1),
    "pipeline2": ({"pipeline": 2}, 1),
}
Work = Callable[[int], dict[str, Any] | None]


def tokens(vocab: int, batch: int) -> Iterator[Tensor]:
    """Rows of ``LENGTH + 1`` ids, the same for every contender; uniform ids, so losses stay near ln(vocab)."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, vocab, (batch, LENGTH + 1), generator=generator)


class Block(nn.Module):
    """nanoGPT's block, as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        q, k, v = (t.view(b, s, HEADS, h // HEADS).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(h, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, h)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(vocab, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        nn.init.normal_(self.word.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.word(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.word.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def plain_step(model: nn.Module, *, compiled: bool, bf16: bool) -> Callable[[Tensor], Tensor]:
    """A step of a plain loop on rows of ids: autocast for bf16, torch's fused AdamW."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
    run: Any = torch.compile(model) if compiled else model

    def step(rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss: Tensor = run(rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def plain(args: argparse.Namespace, *, compiled: bool) -> Work:
    step = plain_step(PlainGPT(args.vocab), compiled=compiled, bf16=args.precision == "bf16")
    data = tokens(args.vocab, args.batch)

    def work(steps: int) -> dict[str, Any]:
        for _ in range(steps):
            loss = step(next(data))
        return {"loss": float(loss)}

    return work


def litgpt(args: argparse.Namespace) -> Work:
    """litgpt's own pretraining step (`litgpt/pretrain.py`: Fabric, torch.compile, its chunked cross entropy)."""
    import lightning as L
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer

    precision = {"fp32": "32-true", "bf16": "bf16-true" if args.contender.endswith("-true") else "bf16-mixed"}
    fabric = L.Fabric(devices=1, accelerator="cpu", precision=precision[args.precision])
    config = Config(
        block_size=LENGTH, n_layer=LAYERS, n_embd=HIDDEN, n_head=HEADS, vocab_size=args.vocab,
        padded_vocab_size=args.vocab, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP",
        intermediate_size=4 * HIDDEN, gelu_approximate="tanh", bias=True, lm_head_bias=False, parallel_residual=False,
    )  # fmt: skip
    with fabric.init_module():
        model = GPT(config)
    model.transformer.wte.weight = model.lm_head.weight
    nn.init.normal_(model.lm_head.weight, std=0.02)
    model = fabric.setup(torch.compile(model))
    chosen = {"class_path": "torch.optim.AdamW", "init_args": {"lr": LR, "betas": BETAS, "weight_decay": DECAY}}
    optimizer = fabric.setup_optimizers(instantiate_torch_optimizer(chosen, model.parameters(), fused=True))
    data = tokens(args.vocab, args.batch)

    def work(steps: int) -> dict[str, Any]:
        for _ in range(steps):
            rows = next(data)
            loss = chunked_cross_entropy(model(rows[:, :-1].contiguous()), rows[:, 1:].contiguous())
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": float(loss)}

    return work


def trainer(args: argparse.Namespace) -> None:
    """transformers.Trainer on GPT2LMHeadModel; it runs its own loop, and waits for its turn between steps."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    config = GPT2Config(vocab_size=args.vocab, n_positions=LENGTH, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)  # fmt: skip

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for rows in tokens(args.vocab, args.batch):
                for row in rows:
                    yield {"input_ids": row[:-1], "labels": row[:-1]}

    class Turns(TrainerCallback):
        """Counts steps; hands control to ``serve`` by running it in a thread that this callback feeds."""

        def __init__(self) -> None:
            import threading

            self.left, self.go, self.done = 3, threading.Event(), threading.Event()
            self.first = True
            self.server = threading.Thread(target=serve, args=(self.ask,), daemon=True)

        def ask(self, steps: int) -> None:
            self.left = steps
            self.done.clear()
            self.go.set()
            self.done.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.left -= 1
            if self.left:
                return
            if self.first:
                self.first = False
                self.server.start()
            else:
                self.done.set()
            while not self.go.wait(0.2):
                if not self.server.is_alive():
                    os._exit(0)
            self.go.clear()

    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.batch, max_steps=10**6, learning_rate=LR,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=DECAY, max_grad_norm=CLIP, bf16=args.precision == "bf16",
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        lr_scheduler_type="constant", dataloader_num_workers=0, optim="adamw_torch_fused",
    )  # fmt: skip
    Trainer(GPT2LMHeadModel(config), settings, train_dataset=Rows(), callbacks=[Turns()]).train()


def mlm_step(
    section: Any, parallel: Any, dtype: torch.dtype, batch: int, *, micro_batches: int = 1, zero: int = 0
) -> Callable[[list[Tensor]], Tensor]:
    """Ours on micro-batches of rows of ids: model, engine and objective as `mlm pretrain` builds them."""
    from mlm_cli.jobs.pretrain import objective
    from mlm_cli.models.registry import build_gpt
    from mlm_cli.training.engine import OptimizerSettings
    from mlm_cli.training.engine_choice import build_engine, choose_engine

    model = build_gpt(section, parallel, seed=1).train()
    model.dtype = dtype
    engine = build_engine(
        choose_engine("auto", zero=zero, parallel=parallel),
        model,
        parallel,
        OptimizerSettings(betas=BETAS, weight_decay=DECAY, clip_grad=CLIP),
        dtype=dtype,
        accumulation=micro_batches,
        micro_batch_size=batch // parallel.data.size,
        zero=zero,
    )

    def step(rows: list[Tensor]) -> Tensor:
        outcomes = engine.accumulate(objective, [{"tokens": row[:, :-1], "labels": row[:, 1:]} for row in rows])
        engine.step(LR)
        return outcomes[-1].loss

    return step


def mlm(args: argparse.Namespace) -> Work:
    """Ours, on as many ranks as this job has."""
    from mlm_cli import distributed
    from mlm_cli.config.schema import ModelSection
    from mlm_cli.parallel.context import ParallelContext
    from mlm_cli.training.allocator import keep_freed_memory

    env = distributed.init()
    keep_freed_memory()
    layout, zero = LAYOUTS.get(args.contender, ({}, 0))
    parallel = ParallelContext.create(**layout, device=env.device)
    section = ModelSection(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, seq_length=LENGTH, vocab_size=args.vocab
    )
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    step = mlm_step(section, parallel, dtype, args.batch, micro_batches=args.micro_batches, zero=zero)
    data = tokens(args.vocab, args.batch)
    mine = slice(parallel.data.rank, None, parallel.data.size)

    def work(steps: int) -> dict[str, Any]:
        steps = int(parallel.world.broadcast_(torch.tensor(steps)))
        for _ in range(steps):
            loss = step([next(data)[mine] for _ in range(args.micro_batches)])
        return {"loss": float(loss)}

    return work


def megatron_core(args: argparse.Namespace) -> Work:
    """NVIDIA's GPTModel at tensor size 2 over gloo, as their ``examples/run_simple_mcore_train_loop.py`` builds it.

    It asks for CUDA in two places that the CPU can do without: the device of a scratch buffer, and the streams of
    dropout, which is off. AdamW is torch's fused one; in bfloat16 it updates the bfloat16 weights alone, ours keeps
    float32 masters: less work for the rival.
    """
    import torch.distributed as dist

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    dist.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    get_cuda_rng_tracker().fork = lambda *_, **__: contextlib.nullcontext()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, ffn_hidden_size=4 * HIDDEN,
        tensor_model_parallel_size=2, use_cpu_initialization=True, params_dtype=dtype, pipeline_dtype=dtype,
        bf16=args.precision == "bf16", hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=False,
    )  # fmt: skip
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=args.vocab,
        max_sequence_length=LENGTH,
        share_embeddings_and_output_weights=True,
    ).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    counted = [p for p in model.parameters() if first or getattr(p, "tensor_model_parallel", False)]
    data, positions = tokens(args.vocab, args.batch), torch.arange(LENGTH).expand(args.batch, -1)
    hidden = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)

    def work(steps: int) -> dict[str, Any]:
        asked = torch.tensor(steps)
        dist.broadcast(asked, 0)
        for _ in range(int(asked)):
            rows = next(data)
            loss = model(rows[:, :-1].contiguous(), positions, hidden, labels=rows[:, 1:].contiguous()).mean()
            loss.backward()
            squares = torch.stack(torch._foreach_norm([p.grad for p in counted])).float().square().sum()
            dist.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
            factor = min(1.0, CLIP / (float(squares.sqrt()) + 1e-6))
            torch._foreach_mul_([p.grad for p in model.parameters()], factor)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss)}

    return work


def two_ranks(args: argparse.Namespace, make: Callable[[argparse.Namespace], Work]) -> Work | None:
    """Two ranks with half of the cores each: this process is rank 0 and starts the other."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    rank = int(os.environ.get("RANK", "0"))
    if "RANK" not in os.environ:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "RANK": "1"}, stdin=subprocess.DEVNULL)
        os.environ["RANK"] = "0"
    os.sched_setaffinity(0, cores[rank * half : (rank + 1) * half])
    torch.set_num_threads(half)
    work = make(args)
    if rank == 0:
        return work
    with contextlib.suppress(RuntimeError):  # rank 0 leaves when its stdin closes
        while True:
            work(0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--micro-batches", type=int, default=1, help="of one step; ours alone")
    args = parser.parse_args()
    torch.manual_seed(1)
    if args.contender == "trainer":
        trainer(args)
        return
    makers: dict[str, Callable[[], Work | None]] = {
        "mlm": lambda: mlm(args),
        "mlm-again": lambda: mlm(args),
        "plain": lambda: plain(args, compiled=False),
        "compile": lambda: plain(args, compiled=True),
        **{name: lambda: two_ranks(args, mlm) for name in LAYOUTS},
        "megatron-core": lambda: two_ranks(args, megatron_core),
        "litgpt": lambda: litgpt(args),
        "litgpt-true": lambda: litgpt(args),
    }
    if args.contender not in makers:
        sys.exit(f"error: no contender `{args.contender}`; there are {', '.join(makers)} and trainer")
    work = makers[args.contender]()
    if work is not None:
        work(3)
        serve(work)


if __name__ == "__main__":
    main()
