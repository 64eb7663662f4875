"""``python -m lightning_init.cli`` does what the ``lightning-init`` command does."""

from lightning_init.cli.init_cli import main

if __name__ == "__main__":
    main()
