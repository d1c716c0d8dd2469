"""Contract suites for every axis: inherit one, and a new kind is tested. For us and for third parties."""
