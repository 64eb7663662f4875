"""Tests of lightning_init/cli."""
