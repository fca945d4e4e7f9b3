"""What computes: one contract (:mod:`.base`), one room per way to keep it."""
