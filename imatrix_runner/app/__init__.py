"""What each command does, in order; the rooms below hold how it is done."""
