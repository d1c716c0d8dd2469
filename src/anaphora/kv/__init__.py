"""The KV prefix cache: which blocks of attention state exist, and where they lie."""
