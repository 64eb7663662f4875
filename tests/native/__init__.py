"""Tests of lightning_init/native."""
