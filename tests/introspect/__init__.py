"""Tests of lightning_init/introspect."""
