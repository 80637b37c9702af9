"""``python -m mlm_cli.ops.build [--cuda auto|off|on]``: build the fused kernels. All of it is in ``compiler.py``."""

from __future__ import annotations

from mlm_cli.ops.compiler import main

if __name__ == "__main__":
    raise SystemExit(main())
