"""The ground floor: hashes, generated code, tables, kinds of values.

Small tools of several packages go here. The files are imported by name, and know neither models nor ranks.
"""

__all__: list[str] = []
