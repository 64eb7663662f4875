"""Tests of lightning_init/distributed."""
