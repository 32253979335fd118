"""Helpers that do not depend on LogME."""
