"""Vectors of texts, each computed once: the `level`; what it knows without its store (`recent`); vectors as bytes (`rows`)."""

from anaphora.levels.embedding.level import Compute, Embedded, EmbeddingLevel, EmbeddingOptions, Encoded, Space
from anaphora.levels.embedding.rows import Storage, Vectors

__all__ = ["Compute", "Embedded", "EmbeddingLevel", "EmbeddingOptions", "Encoded", "Space", "Storage", "Vectors"]
