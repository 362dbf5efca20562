"""Proved programs broken in every place in which they can be, and what the proof says of each."""
