"""Traces, metrics and logs, alike in every service."""
