"""Tests of the repository itself: layout, packaging, examples, benchmarks, the tests own tools."""
