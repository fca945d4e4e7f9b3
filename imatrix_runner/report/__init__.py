"""Reports of workspaces: facts become ``report.json``, and that becomes HTML, Markdown and PNG."""
