"""Checkpoints of the dense model, written by all ranks together without a gather.

Change what is written, and how a folder is replaced, here. Layouts come with the model's runtime: nothing here decides
how a weight is split.
"""

from autotp.saving.pretrained import wrap_save_pretrained
from autotp.saving.save import save

__all__ = ["save", "wrap_save_pretrained"]
