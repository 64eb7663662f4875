"""Tests of lightning_init/schemes."""
