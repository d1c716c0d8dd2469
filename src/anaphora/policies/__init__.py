"""What leaves first. Pure, synchronous, keys only: sizes and bytes belong to the caller."""
