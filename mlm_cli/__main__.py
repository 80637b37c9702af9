"""``python -m mlm_cli`` is ``mlm``."""

from mlm_cli.cli.app import main

if __name__ == "__main__":
    main()
