"""Helpers that know nothing about LogME."""
