"""Anaphora: compute once, reuse everywhere. One cache for every level of LLM and multimodal inference."""

__version__ = "0.1.0"
