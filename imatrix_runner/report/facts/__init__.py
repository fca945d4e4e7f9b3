"""Gathers the report's document from the journal and the files of a workspace."""
