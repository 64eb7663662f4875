"""Tests of lightning_init/show."""
