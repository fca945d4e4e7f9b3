"""Renders the report's document as a page, a model card, charts and tables."""
