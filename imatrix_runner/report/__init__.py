"""Facts -> ``report.json`` -> HTML, Markdown, PNG."""
