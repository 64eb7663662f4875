"""``python -m lightning_init.cli``: the ``lightning-init`` command."""

from lightning_init.cli.init_cli import main

if __name__ == "__main__":
    main()
