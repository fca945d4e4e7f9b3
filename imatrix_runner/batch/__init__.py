"""A list of models that is worked through: read, checked, scheduled, recorded, shown."""
