"""Contrastive search: of the likeliest tokens the one whose state is least like those of the text so far.

Su et al. 2022, A Contrastive Framework for Neural Text Generation, equation 5: ``argmax (1 - alpha) p(v) - alpha max
cos(h_v, h_j)`` over the ``top_k`` likeliest tokens ``v`` and all earlier tokens ``j``. For models trained with
``train.contrastive_margin`` above all: where states of all tokens are alike, there is little to choose by. The last
token of a full context has no state, for it is never read: there the likeliest is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_cli.errors import UsageError
from mlm_cli.generation.search import Search, Searched


@dataclass(eq=False, kw_only=True)
class _Contrasted(Searched):
    """A text with the directions of its tokens' states.

    Attributes:
        states: ``[room, h]`` float32 of length 1, the first ``length`` in use.
        probabilities: ``[top_k]`` of ``next_tokens``.
    """

    states: Tensor = field(default_factory=lambda: torch.empty(0))
    probabilities: Tensor = field(default_factory=lambda: torch.empty(0))


class ContrastiveSearch(Search[_Contrasted]):
    """Answers prompts by contrastive search; see ``Search``. The decoder is made with ``keep_states``.

    It chooses among the ``top_k`` of the settings' sampling; their ``contrastive_alpha`` goes from 0 (the likeliest
    token) to 1 (the least similar one).
    """

    text_type = _Contrasted

    def _check_vocabulary(self, size: int) -> None:
        if self._width > size:
            raise UsageError(f"top-k {self._width} is more than the vocabulary of {size}", hint="use --top-k 4")

    def _begin(self, text: _Contrasted, logits: Tensor) -> None:
        states = F.normalize(self._decoder.states.float(), dim=-1)
        text.states = states.new_empty(text.num_prefix + text.limit, states.shape[-1])
        text.states[: text.num_prefix] = states
        self._propose(text, logits)

    def _propose(self, text: _Contrasted, logits: Tensor) -> None:
        """The likeliest tokens, one a row, behind ``logits [v]``; where there is no room for one, it is taken."""
        logits = logits.clone()
        self._adjust(logits, text, text.tokens)
        text.probabilities, tokens = torch.softmax(logits, -1).topk(self._width)
        text.next_tokens = tokens.tolist()
        if text.length == text.max_length:
            text.take(text.next_tokens[0])

    def _take(self, logits: Tensor) -> None:
        texts, width, alpha = self._texts, self._width, self._settings.contrastive_alpha
        states = F.normalize(self._decoder.states.float(), dim=-1).view(len(texts), width, -1)
        alike = torch.stack(
            [(own @ text.states[: text.length].T).amax(-1) for text, own in zip(texts, states, strict=True)]
        )
        probabilities = torch.stack([text.probabilities for text in texts])
        chosen = ((1 - alpha) * probabilities - alpha * alike).argmax(-1).tolist()
        for text, own, row, rows in zip(texts, states, chosen, logits, strict=True):
            text.states[text.length] = own[row]
            text.parents = [row] * width
            text.take(text.next_tokens[row])
            if text.finish is None:
                self._propose(text, rows[row])
