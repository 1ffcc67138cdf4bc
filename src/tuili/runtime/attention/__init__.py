"""Who attends over paged KV: one file per backend."""
