"""`mlm`: Megatron-LM as a command suite, from raw text to a language model."""

__version__ = "0.1.0"
