"""Tests of autotp.saving."""
