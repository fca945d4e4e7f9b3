"""From a request to files: plan purely, then walk the plan."""
