"""Where bytes lie. Every tier has the same four verbs, batched."""
