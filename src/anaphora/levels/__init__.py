"""One file per kind of question that can be remembered."""
