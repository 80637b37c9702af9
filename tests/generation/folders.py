"""Small model folders made by `transformers`, with a byte-level tokenizer trained on the spot."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.jobs.tokenizer import TrainRequest, train

END = "<|endoftext|>"


def save_tokenizer(folder: Path, texts: list[str], vocab_size: int = 400) -> None:
    """A byte-level BPE tokenizer in Hugging Face layout."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


def save_model(folder: Path, kind: str, vocab_size: int = 400, context: int = 96) -> transformers.PreTrainedModel:
    """A random model, `gpt2` or `llama`, with weights large enough that its greedy text does not just repeat itself."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocab_size, n_positions=context, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
        )
        model: transformers.PreTrainedModel = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=vocab_size, max_position_embeddings=context, hidden_size=64, intermediate_size=96,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(std=0.3) if param.ndim > 1 else param.add_(torch.randn_like(param) * 0.1)
            if name.endswith("wpe.weight"):
                param.normal_(std=1.0)
    model.generation_config.eos_token_id = 0
    model.eval().save_pretrained(folder)
    return model


def save_bert(folder: Path, texts: list[str], vocab_size: int, context: int = 40) -> transformers.PreTrainedModel:
    """A random masked language model and a WordPiece tokenizer trained on the texts."""
    text = folder.with_name("text.txt")
    text.write_text("\n".join(texts))
    train(TrainRequest((str(text),), str(folder), "wordpiece", vocab_size, special_tokens="bert"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=load_tokenizer(str(folder)).vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=context, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    model.save_pretrained(folder)
    return model


def save_folder(folder: Path, kind: str, texts: list[str]) -> transformers.PreTrainedModel:
    """Tokenizer and model of one size."""
    save_tokenizer(folder, texts)
    return save_model(folder, kind)
