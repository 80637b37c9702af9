"""How many logits exist at a time: the output layer works within it, and the plan of a run counts with it.

Without torch, which a plan does not wait for.
"""

from __future__ import annotations

# By kind of device. Few, large blocks, because each adds to a gradient as large as the weight; a GPU has more memory,
# and spends more of its time on that addition.
LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
