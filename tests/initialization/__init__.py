"""Tests of lightning_init/initialization."""
