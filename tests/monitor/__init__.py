"""Tests of lightning_init/monitor."""
