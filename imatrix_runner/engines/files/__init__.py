"""File formats shared by both engines, the worker and the packages above: one reader and one writer each."""
