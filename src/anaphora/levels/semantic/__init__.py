"""Answers to questions asked before in other words."""
