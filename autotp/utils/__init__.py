"""The ground floor: hashes, generated code, tables, kinds of values.

Small things that several packages need go here. Its files are imported by name, and know neither models nor ranks.
"""

__all__: list[str] = []
