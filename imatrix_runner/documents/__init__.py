"""Texts, records and conversations in files of any kind, read as a stream of documents."""
