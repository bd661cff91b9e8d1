"""Whom to ask, and how to fuse what they say."""
