"""Tests with clusters of several nodes."""
