"""What computes: one contract (:mod:`.contract`), one room per way to keep it."""
