"""The zoo: every text architecture of transformers, small, dense against autotp."""
