"""Weight constraints and gradient transforms that attach to a torch optimizer."""
