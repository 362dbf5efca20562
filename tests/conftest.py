"""Settings of the whole suite."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

# A busy machine is no failure: examples may take as long as they take.
settings.register_profile("autotp", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("autotp")
torch.set_num_threads(1)
