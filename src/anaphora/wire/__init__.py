"""Dialects: request body ↔ `types.Request`, deltas ↔ response body or SSE. Used by the server and by upstreams."""
