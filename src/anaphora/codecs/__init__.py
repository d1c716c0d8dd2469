"""KV blocks as bytes: one file per kind of encoding, and the frame around what they make."""
