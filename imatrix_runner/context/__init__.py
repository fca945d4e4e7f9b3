"""The context of steps: the request, the open model, the workspace, the chosen engine."""
