"""Tests of lightning_init/callbacks."""
